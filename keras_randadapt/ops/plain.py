"""`matmul` and `reshape` of Keras, without what they cost in eager PyTorch.

There Keras spends ten microseconds on looking for symbolic tensors and on
dtypes, of which a site needs neither, and PyTorch one or two on the operation.
On a GPU that time is what a training step of small batches waits for.
"""

import keras

if keras.config.backend() == "torch":
    import torch

    # Keras computes products of float16 in float32 on a CPU.
    _DIRECT = (torch.float32, torch.bfloat16)

    def matmul(x, y):
        if (
            isinstance(x, torch.Tensor)
            and isinstance(y, torch.Tensor)
            and x.dtype == y.dtype
            and x.dtype in _DIRECT
        ):
            return torch.matmul(x, y)
        return keras.ops.matmul(x, y)

    def reshape(x, shape):
        if isinstance(x, torch.Tensor):
            return x.reshape(shape)
        return keras.ops.reshape(x, shape)

else:
    matmul = keras.ops.matmul
    reshape = keras.ops.reshape
