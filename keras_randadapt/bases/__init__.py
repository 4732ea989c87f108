"""Frozen random matrices that a seed determines and no file stores."""

from keras_randadapt.bases.by_name import KINDS
from keras_randadapt.bases.by_name import check_kind
from keras_randadapt.bases.by_name import make_basis
from keras_randadapt.bases.random_matrix import Gaussian
from keras_randadapt.bases.random_matrix import RandomMatrix
from keras_randadapt.bases.random_matrix import SparseTernary
from keras_randadapt.bases.random_matrix import Uniform
from keras_randadapt.bases.random_matrix import fence_operands
from keras_randadapt.bases.randomized_hadamard import RandomizedHadamard
from keras_randadapt.bases.regenerated import RegeneratedUniform

__all__ = [
    "check_kind",
    "fence_operands",
    "Gaussian",
    "KINDS",
    "make_basis",
    "RandomizedHadamard",
    "RandomMatrix",
    "RegeneratedUniform",
    "SparseTernary",
    "Uniform",
]


def __dir__():
    return __all__
