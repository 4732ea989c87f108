"""Analyses of trained adapters: ranks, spectra, similarity, loss planes."""

from keras_randadapt.analysis.information import LayerInformation
from keras_randadapt.analysis.information import layer_information
from keras_randadapt.analysis.keyed_weights import kernels
from keras_randadapt.analysis.lora_error_bound import LoRAErrorBound
from keras_randadapt.analysis.lora_error_bound import lora_error_bound
from keras_randadapt.analysis.loss_plane import LossPlane
from keras_randadapt.analysis.loss_plane import mode_connectivity
from keras_randadapt.analysis.pac_bayes_bound import PACBayesBound
from keras_randadapt.analysis.pac_bayes_bound import pac_bayes_bound
from keras_randadapt.analysis.randlora_errors import RandLoRAErrors
from keras_randadapt.analysis.randlora_errors import randlora_errors
from keras_randadapt.analysis.rank import SingularValues
from keras_randadapt.analysis.rank import delta_statistics
from keras_randadapt.analysis.rank import effective_rank
from keras_randadapt.analysis.rank import intrinsic_rank
from keras_randadapt.analysis.rank import orthogonality_loss
from keras_randadapt.analysis.rank import singular_values
from keras_randadapt.analysis.similarity import Similarity
from keras_randadapt.analysis.similarity import cka
from keras_randadapt.analysis.similarity import linear_cka
from keras_randadapt.analysis.table import SiteTable
from keras_randadapt.analysis.table import Table
from keras_randadapt.analysis.update_posterior import UpdatePosterior
from keras_randadapt.analysis.update_posterior import update_posterior

__all__ = [
    "cka",
    "delta_statistics",
    "effective_rank",
    "intrinsic_rank",
    "kernels",
    "layer_information",
    "LayerInformation",
    "linear_cka",
    "lora_error_bound",
    "LoRAErrorBound",
    "LossPlane",
    "mode_connectivity",
    "orthogonality_loss",
    "pac_bayes_bound",
    "PACBayesBound",
    "randlora_errors",
    "RandLoRAErrors",
    "Similarity",
    "singular_values",
    "SingularValues",
    "SiteTable",
    "Table",
    "update_posterior",
    "UpdatePosterior",
]


def __dir__():
    return __all__
