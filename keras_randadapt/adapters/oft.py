"""OFT: an orthogonal map of the inputs, by the Cayley transform."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.ops.sparse import dense
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class OFT(base.Adapter):
    """Orthogonal fine-tuning.

    The adapted kernel is `R W`, where `R`, `(input_dim, input_dim)`, is
    orthogonal and block-diagonal. Each block of `block_size` rows is the
    Cayley transform `(I - Q) (I + Q)^-1` of a skew-symmetric `Q`, whose entries
    above the diagonal are trained. This makes `input_dim * (block_size - 1) /
    2` weights a site. Angles between the columns of the kernel stay, and so do
    their lengths. `Q` starts at zero, so `R` starts as the identity.

    Where `block_size` does not divide `input_dim`, blocks are as large as the
    largest divisor below.

    Inputs are multiplied by the blocks, and the base kernel does the rest, so
    a quantized kernel is never dequantized. Beyond the base product a step
    solves a small system for each block and multiplies `block_size` numbers
    for each input. In use it costs nothing once it is merged.

    The update depends on the base kernel: beside other active adapters, it
    adds `(R - I) W`.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        block_size: int, at least 2. The number of rows of a block.
        share_blocks: bool. Whether all blocks are equal, which makes
            `block_size * (block_size - 1) / 2` weights a site.
        seed: int. The method draws nothing. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `block_size` is no integer.
        ValueError: If an argument is out of range. At injection, if a site is
            an embedding, or if its number of inputs has no divisor from 2 to
            `block_size`.

    Example:

    ```python
    kra.inject(
        classifier, kra.OFT(32), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal
          Finetuning", NeurIPS 2023
          ([arXiv 2306.07280](https://arxiv.org/abs/2306.07280)), section 3:
          the blocks and the Cayley transform.
        - Qiu et al., "Orthogonal Finetuning Made Scalable", 2025
          ([arXiv 2506.19847](https://arxiv.org/abs/2506.19847)), section 3:
          inputs are rotated instead of kernels. Its series in the place of the
          inverse is not here, because the result is not orthogonal.
        - Hugging Face PEFT, `OFTConfig` with `use_cayley_neumann=False`.
    """

    recommended_learning_rate = 5e-4
    additive = False
    depends_on_base = True
    site_kinds = ("product", "convolution")

    def __init__(
        self,
        block_size: int = 32,
        *,
        share_blocks: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.block_size = arguments.check_rank(block_size, "block_size", 2)
        self.share_blocks = bool(share_blocks)

    def check(self, site: Site) -> None:
        if self._size(site) < 2:
            raise ValueError(
                f"`block_size` must be at least {_divisor(site.input_dim)}, "
                "the smallest divisor of the number of inputs, "
                f"{site.input_dim}. Received: block_size={self.block_size}. "
                "Raise it, or leave the site out with `exclude`."
            )

    def build(self, site: Site) -> None:
        self.check(site)
        #: The number of rows of a block at this site.
        self.size = self._size(site)
        self._blocks = site.input_dim // self.size
        number = 1 if self.share_blocks else self._blocks
        count = self.size * (self.size - 1) // 2
        self.oft_q = self.add_trainable("oft_q", (number, count), "zeros")

    def _size(self, site):
        most = min(self.block_size, site.input_dim)
        return next(n for n in range(most, 0, -1) if site.input_dim % n == 0)

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        x = dense(x)
        rows = reshape(self.drop(x, training), (-1, self.input_dim))
        change = reshape(self._rotated(rows, self._changes()), ops.shape(x))
        if linear.base is linear:
            return linear(x + change)
        return linear(x) + linear.base(change)

    def adapt_per_example(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        q = ops.cast(weights["oft_q"], "float32")
        changes = _cayley_change(_skew(q, self.size))
        return product(x + self._rotated(x, changes))

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        del training  # The update is the same in training.
        rows = reshape(base, (self._blocks, self.size, self.output_dim))
        change = ops.matmul(self._changes(), rows)
        return kernel + reshape(change, (self.input_dim, self.output_dim))

    def _changes(self):
        """`R - I` for each block, float32."""
        q = ops.cast(self.oft_q, "float32")
        return _cayley_change(_skew(q, self.size))

    def _rotated(self, x, changes):
        """`x (R - I)` for `x` of the shape `(..., tokens, input_dim)`."""
        shape = ops.shape(x)
        changes = ops.cast(changes, x.dtype)
        blocks = reshape(x, (*shape[:-1], self._blocks, self.size))
        if self.share_blocks and len(changes.shape) == 3:
            return reshape(matmul(blocks, changes[0]), shape)
        # A product for each block is faster than one for each token.
        y = ops.matmul(ops.swapaxes(blocks, -2, -3), changes)
        return reshape(ops.swapaxes(y, -2, -3), shape)

    def get_config(self) -> Config:
        config = {"block_size": self.block_size, **super().get_config()}
        if self.share_blocks:
            config["share_blocks"] = True
        return config


def _divisor(dim):
    return next((n for n in range(2, dim) if dim % n == 0), max(dim, 2))


def _skew(entries, size):
    """Skew-symmetric matrices from their entries above the diagonal.

    Args:
        entries: Tensor `(..., size * (size - 1) / 2)`, row by row.
        size: int.

    Returns:
        Tensor `(..., size, size)`.
    """
    rows, columns = np.triu_indices(size, 1)
    places = np.zeros((size, size), "int32")
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    signs = np.triu(np.ones((size, size)), 1) - np.tril(
        np.ones((size, size)), -1
    )
    whole = ops.take(entries, places.ravel(), axis=-1)
    whole = reshape(whole, (*entries.shape[:-1], size, size))
    return whole * ops.convert_to_tensor(signs.astype("float32"))


def _cayley_change(q):
    """`(I - Q) (I + Q)^-1 - I`, which is `-2 Q (I + Q)^-1`.

    The identity is left out, because 16 bits would round what is beside it.

    Args:
        q: Skew-symmetric tensor `(..., size, size)`.
    """
    eye = ops.eye(q.shape[-1], dtype=q.dtype)
    # Q and the inverse of I + Q commute.
    return -2.0 * ops.solve(eye + q, q)
