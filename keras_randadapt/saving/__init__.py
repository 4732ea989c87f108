"""Files of adapters."""

from keras_randadapt.saving.adapter_file import load_adapter
from keras_randadapt.saving.adapter_file import save_adapter
