"""Many adapters of one model in one batch."""

from keras_randadapt.serving.bank import AdapterBank

__all__ = ["AdapterBank"]


def __dir__():
    return __all__
