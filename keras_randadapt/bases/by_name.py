"""The bases that adapters take by name."""

import math
from typing import TypeAlias

from keras_randadapt.bases.random_matrix import Gaussian
from keras_randadapt.bases.random_matrix import RandomMatrix
from keras_randadapt.bases.random_matrix import SparseTernary
from keras_randadapt.bases.random_matrix import Uniform
from keras_randadapt.bases.randomized_hadamard import RandomizedHadamard

#: The type of the bases that `make_basis` makes.
Basis: TypeAlias = RandomMatrix | RandomizedHadamard
#: The names of bases.
KINDS = ("gaussian", "uniform", "sparse", "very_sparse", "hadamard")


def check_kind(basis: str, argument: str = "basis") -> str:
    """Raises `ValueError` unless `basis` names a basis."""
    if basis not in KINDS:
        raise ValueError(
            f"`{argument}` must be one of {KINDS}. "
            f"Received: {argument}={basis!r}"
        )
    return basis


def make_basis(
    basis: str,
    dim: int,
    rank: int,
    seed: int,
    role: str,
    *,
    expand: bool = False,
    smaller_dim: int | None = None,
    fill: bool | str = False,
    stages: int = 2,
) -> Basis:
    """A basis of shape `(rank, dim)`, or `(dim, rank)` with `expand`.

    Args:
        basis: One of `KINDS`: independent normal or uniform entries; ternary
            entries, of which one in three or one in `sqrt(smaller_dim)` is
            not 0; or a randomized Hadamard transform along `dim`.
        dim: int. A dimension of the site.
        rank: int.
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the basis.
        expand: bool. See above.
        smaller_dim: int. The smaller dimension of the site; `dim` by default.
        fill: bool, or `"full_rank"`. See `SparseTernary`.
        stages: See `RandomizedHadamard`.

    Returns:
        A basis, with the attributes that `RandomMatrix` and
        `RandomizedHadamard` share: `matvec`, `adjoint`, `scale`, `dense`,
        `digest` and others.
    """
    check_kind(basis)
    if basis == "hadamard":
        return RandomizedHadamard(dim, rank, seed, role, stages, expand=expand)
    shape = (dim, rank) if expand else (rank, dim)
    if basis == "gaussian":
        return Gaussian(*shape, seed, role)
    if basis == "uniform":
        return Uniform(*shape, seed, role)
    sparsity = 3.0
    if basis == "very_sparse":
        sparsity = math.sqrt(dim if smaller_dim is None else smaller_dim)
    return SparseTernary(*shape, seed, role, sparsity, fill)
