"""The methods, one module each."""

from keras_randadapt.adapters.base import Adapter
from keras_randadapt.adapters.lora import LoRA
from keras_randadapt.adapters.rlora import RLoRA
