"""The adaptation methods, one module a method."""

from keras_randadapt.adapters.adalora import AdaLoRA
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.adapters.bitfit import BitFit
from keras_randadapt.adapters.bottleneck import Bottleneck
from keras_randadapt.adapters.dora import DoRA
from keras_randadapt.adapters.dylora import DyLoRA
from keras_randadapt.adapters.fourierft import FourierFT
from keras_randadapt.adapters.hira import HiRA
from keras_randadapt.adapters.hydra import Hydra
from keras_randadapt.adapters.ia3 import IA3
from keras_randadapt.adapters.loha import LoHa
from keras_randadapt.adapters.lokr import LoKr
from keras_randadapt.adapters.lora import LoRA
from keras_randadapt.adapters.lorafa import LoRAFA
from keras_randadapt.adapters.miss import MiSS
from keras_randadapt.adapters.nola import NOLA
from keras_randadapt.adapters.oft import OFT
from keras_randadapt.adapters.randlora import RandLoRA
from keras_randadapt.adapters.rlora import RLoRA
from keras_randadapt.adapters.rmlora import RMLoRA
from keras_randadapt.adapters.said import SAID
from keras_randadapt.adapters.shira import SHiRA
from keras_randadapt.adapters.sora import SoRA
from keras_randadapt.adapters.vera import VeRA

__all__ = [
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "DyLoRA",
    "FourierFT",
    "HiRA",
    "Hydra",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "MiSS",
    "NOLA",
    "OFT",
    "RandLoRA",
    "RLoRA",
    "RMLoRA",
    "SAID",
    "SHiRA",
    "SoRA",
    "VeRA",
]


def __dir__():
    return __all__
