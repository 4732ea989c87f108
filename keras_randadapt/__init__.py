"""Parameter-efficient adapters for any Keras model.

Pick an adapter, inject it into a model, train with `model.fit` on TensorFlow,
JAX or PyTorch, and ship a file of a few kilobytes or a merged SavedModel.
"""

from keras_randadapt import _start as _start
from keras_randadapt import adapters
from keras_randadapt import analysis
from keras_randadapt import bases
from keras_randadapt import callbacks
from keras_randadapt import hadamard
from keras_randadapt import ops
from keras_randadapt import optimizers
from keras_randadapt import peft
from keras_randadapt import random
from keras_randadapt import regularizers
from keras_randadapt import serving
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import IA3
from keras_randadapt.adapters import NOLA
from keras_randadapt.adapters import OFT
from keras_randadapt.adapters import SAID
from keras_randadapt.adapters import AdaLoRA
from keras_randadapt.adapters import Adapter
from keras_randadapt.adapters import BitFit
from keras_randadapt.adapters import Bottleneck
from keras_randadapt.adapters import DoRA
from keras_randadapt.adapters import DyLoRA
from keras_randadapt.adapters import FourierFT
from keras_randadapt.adapters import HiRA
from keras_randadapt.adapters import Hydra
from keras_randadapt.adapters import LoHa
from keras_randadapt.adapters import LoKr
from keras_randadapt.adapters import LoRA
from keras_randadapt.adapters import LoRAFA
from keras_randadapt.adapters import MiSS
from keras_randadapt.adapters import RandLoRA
from keras_randadapt.adapters import RLoRA
from keras_randadapt.adapters import RMLoRA
from keras_randadapt.adapters import SHiRA
from keras_randadapt.adapters import SoRA
from keras_randadapt.adapters import VeRA
from keras_randadapt.model import whole_model as _whole_model
from keras_randadapt.model.combine import combine
from keras_randadapt.model.compact import compact
from keras_randadapt.model.compact import truncate
from keras_randadapt.model.convert import to_lora
from keras_randadapt.model.inject import inject
from keras_randadapt.model.load import load_adapter
from keras_randadapt.model.merge import merge
from keras_randadapt.model.merge import merged
from keras_randadapt.model.save import save_adapter
from keras_randadapt.model.status import status
from keras_randadapt.model.switch import active
from keras_randadapt.model.switch import disabled
from keras_randadapt.model.switch import eject
from keras_randadapt.model.switch import set_active
from keras_randadapt.model.switch import sites
from keras_randadapt.version import __version__

__all__ = [
    "__version__",
    "AdaLoRA",
    "AdapterWarning",
    "Adapter",
    "active",
    "adapters",
    "analysis",
    "bases",
    "BitFit",
    "Bottleneck",
    "callbacks",
    "combine",
    "compact",
    "disabled",
    "DoRA",
    "DyLoRA",
    "eject",
    "FourierFT",
    "hadamard",
    "HiRA",
    "IA3",
    "Hydra",
    "inject",
    "load_adapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "merge",
    "merged",
    "MiSS",
    "NOLA",
    "OFT",
    "ops",
    "optimizers",
    "peft",
    "RandLoRA",
    "random",
    "regularizers",
    "RLoRA",
    "RMLoRA",
    "SAID",
    "save_adapter",
    "serving",
    "set_active",
    "SHiRA",
    "sites",
    "SoRA",
    "status",
    "to_lora",
    "truncate",
    "VeRA",
]


def __dir__():
    return __all__
