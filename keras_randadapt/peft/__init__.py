"""Adapters in the format of Hugging Face's PEFT, both ways.

An adapter that was trained in Keras is served wherever PEFT's are, and PEFT's
adapters run in Keras. Neither `peft` nor `transformers` is imported: files are
read and written.
"""

from keras_randadapt.peft.loading import load
from keras_randadapt.peft.merged import save_merged
from keras_randadapt.peft.names import NameMap
from keras_randadapt.peft.names import name_map
from keras_randadapt.peft.parts import ModulePart
from keras_randadapt.peft.saving import save

__all__ = [
    "ModulePart",
    "NameMap",
    "load",
    "name_map",
    "save",
    "save_merged",
]


def __dir__():
    return __all__
