"""`matmul` and `reshape` of Keras, without what they cost in eager PyTorch.

There Keras spends ten microseconds of a call on looking for symbolic tensors,
devices and dtypes, and PyTorch one or two on the operation. On a GPU that is
the time that a training step of small batches waits for.
"""

import keras

if keras.config.backend() == "torch":
    import torch

    # Keras computes products of float16 in float32 on a CPU.
    _DIRECT = (torch.float32, torch.bfloat16)
    # Others, such as "meta", have no autocast to ask about.
    _DEVICES = ("cpu", "cuda")

    def matmul(x, y):
        if isinstance(y, keras.Variable):
            y = y.value
        if (
            isinstance(x, torch.Tensor)
            and isinstance(y, torch.Tensor)
            and x.dtype == y.dtype
            and x.dtype in _DIRECT
            # What is elsewhere Keras moves to its default device.
            and x.device == y.device
            and x.device.type in _DEVICES
            # Keras gives the dtype of the arguments there.
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return torch.matmul(x, y)
        return keras.ops.matmul(x, y)

    def reshape(x, shape):
        if isinstance(x, torch.Tensor):
            return x.reshape(shape)
        return keras.ops.reshape(x, shape)

    def placed(x):
        """A tensor on Keras's default device, where layers expect it."""
        return keras.ops.convert_to_tensor(x)

else:
    matmul = keras.ops.matmul
    reshape = keras.ops.reshape

    def placed(x):
        return x
