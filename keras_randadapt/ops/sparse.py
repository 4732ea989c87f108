"""Dense copies of sparse inputs, for what takes no sparse tensor.

Keras's Dense layer takes TensorFlow's `SparseTensor` and JAX's `BCOO`. Products
with a thin matrix take them too. Random bases, transforms, gradients of one's
own and dropout do not, and make their input dense here.
"""

from typing import Any

import keras
from keras import ops

_BACKEND = keras.config.backend()

if _BACKEND == "tensorflow":
    import tensorflow as tf

    _SPARSE: tuple[type, ...] = (tf.SparseTensor,)
elif _BACKEND == "jax":
    from jax.experimental import sparse

    _SPARSE = (sparse.JAXSparse,)
else:
    # Keras has no sparse tensors on its other backends.
    _SPARSE = ()


def dense(x: Any) -> Any:
    """The same values as a dense tensor; anything else is returned as is."""
    if isinstance(x, _SPARSE):
        return ops.convert_to_tensor(x, sparse=False)
    return x
