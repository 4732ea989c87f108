"""Parameter-efficient adapters for any Keras model.

Pick an adapter, inject it into a model, train with `model.fit` on TensorFlow,
JAX or PyTorch, and ship a file of a few kilobytes or a merged SavedModel.
"""

from keras_randadapt import adapters
from keras_randadapt import analysis
from keras_randadapt import bases
from keras_randadapt import callbacks
from keras_randadapt import hadamard
from keras_randadapt import ops
from keras_randadapt import optimizers
from keras_randadapt import random
from keras_randadapt import regularizers
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import NOLA
from keras_randadapt.adapters import SAID
from keras_randadapt.adapters import AdaLoRA
from keras_randadapt.adapters import Adapter
from keras_randadapt.adapters import BitFit
from keras_randadapt.adapters import Bottleneck
from keras_randadapt.adapters import DoRA
from keras_randadapt.adapters import DyLoRA
from keras_randadapt.adapters import Hydra
from keras_randadapt.adapters import LoRA
from keras_randadapt.adapters import LoRAFA
from keras_randadapt.adapters import RandLoRA
from keras_randadapt.adapters import RLoRA
from keras_randadapt.adapters import RMLoRA
from keras_randadapt.adapters import SoRA
from keras_randadapt.adapters import VeRA
from keras_randadapt.compaction import compact
from keras_randadapt.compaction import truncate
from keras_randadapt.injection import disabled
from keras_randadapt.injection import eject
from keras_randadapt.injection import inject
from keras_randadapt.injection import set_active
from keras_randadapt.injection import sites
from keras_randadapt.merging import merge
from keras_randadapt.merging import merged
from keras_randadapt.saving import load_adapter
from keras_randadapt.saving import save_adapter
from keras_randadapt.version import __version__
