"""MiSS: one small trained matrix, repeated over the kernel."""

from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.ops.sparse import dense
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import taken
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class MiSS(base.Adapter):
    """Matrix shard sharing, which was called Bone.

    The kernel view is cut into shards of `rank` rows, and all shards get the
    same update: row `i` of the delta is `scaling * D[i mod rank]`. `D`,
    `(rank, output_dim)`, is trained, which makes `rank * output_dim` weights
    a site. It starts at zero, so the delta starts at zero. Where `rank` does
    not divide `input_dim`, the last shard is cut off.

    With `output_rank`, `D` is `(rank, output_rank)`, and it is repeated over
    the columns too: `delta[i, j] = scaling * D[i mod rank, j mod
    output_rank]`. This makes `rank * output_rank` weights a site.

    Each input is folded first: its entries whose places are equal modulo
    `rank` are added up. This takes one addition an entry where a LoRA of this
    rank takes `rank` multiply-adds, and the backward pass needs the folded
    input, `rank` numbers a token, and not the input itself. With twice the
    rank of a LoRA on a square kernel it trains as many weights.

    The delta's rank is at most `rank`. `factors`, `to_lora` and PEFT's format
    have it as the LoRA `A D`, whose `A` repeats the identity.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The number of rows of a shard.
        output_rank: Optional int. The number of columns of `D`. The default
            is the number of outputs.
        scaling: float. A constant factor of the delta.
        seed: int. The method draws nothing. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If a rank is no integer.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds a site's number of inputs, or `output_rank` that of its
            outputs.

    Example:

    ```python
    kra.inject(
        classifier, kra.MiSS(16), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Kang and Yin, "MiSS", 2024
          ([arXiv 2409.15371](https://arxiv.org/abs/2409.15371)), section 3:
          the form that adds inputs up first.
        - Hugging Face PEFT, `MissConfig`, whose `mini_r` is `output_rank`.
          Its form `"bat"`, which depends on the base kernel, is not here.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 16,
        *,
        output_rank: int | None = None,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        if output_rank is not None:
            output_rank = arguments.check_rank(output_rank, "output_rank")
        self.output_rank = output_rank
        self.scaling = arguments.check_scaling(scaling)

    def check(self, site: Site) -> None:
        _check_fits(self.rank, "rank", site.input_dim, "inputs")
        if self.output_rank is not None:
            _check_fits(
                self.output_rank, "output_rank", site.output_dim, "outputs"
            )

    def build(self, site: Site) -> None:
        self.check(site)
        columns = self.output_rank or self.output_dim
        self.shard = self.add_trainable("shard", (self.rank, columns), "zeros")

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return matmul(_fold(x, self.rank), self._rows(x.dtype))

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        rows = self._rows_of_examples(weights, x.dtype)
        return ops.matmul(_fold(x, self.rank), rows)

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        y = matmul(x, ops.transpose(self._rows(x.dtype)))
        return _unfold(y, self.input_dim)

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        rows = self._rows_of_examples(weights, x.dtype)
        y = ops.matmul(x, ops.swapaxes(rows, -1, -2))
        return _unfold(y, self.input_dim)

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        return ops.take(self._rows(dtype), ids % self.rank, axis=0)

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        rows = self._rows_of_examples(weights, dtype)
        return taken(rows, ids % self.rank)

    def delta_kernel(self) -> Tensor:
        columns = ops.transpose(self._rows("float32"))
        return ops.transpose(_unfold(columns, self.input_dim))

    def factors(self) -> tuple[Tensor, Tensor]:
        left = _unfold(ops.eye(self.rank, dtype="float32"), self.input_dim)
        return ops.transpose(left), self._rows("float32")

    def _rows(self, dtype):
        """The scaled `D`, `(rank, output_dim)`."""
        return self._repeated(ops.cast(self.shard, "float32"), dtype)

    def _rows_of_examples(self, weights, dtype):
        return self._repeated(weights["shard"], dtype)

    def _repeated(self, shard, dtype):
        shard = shard if self.scaling == 1 else shard * self.scaling
        return ops.cast(_unfold(shard, self.output_dim), dtype)

    def get_config(self) -> Config:
        config = {
            "rank": self.rank,
            "scaling": self.scaling,
            **super().get_config(),
        }
        if self.output_rank is not None:
            config["output_rank"] = self.output_rank
        return config


def _check_fits(rank, argument, dim, counted):
    if rank > dim:
        raise ValueError(
            f"`{argument}` must be at most {dim}, the number of {counted}. "
            f"Received: {argument}={rank}. Lower it, or leave the site out "
            "with `exclude`."
        )


def _fold(x, size):
    """Adds up the entries of the last axis that are equal modulo `size`.

    Args:
        x: Tensor `(..., dim)`.
        size: int.

    Returns:
        Tensor `(..., size)`.
    """
    # A product with repeated identities has a gradient that is 10 times
    # slower on a CPU.
    x = dense(x)
    dim = x.shape[-1]
    rest = -dim % size
    if rest:
        x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, rest)])
    shape = (*ops.shape(x)[:-1], (dim + rest) // size, size)
    return ops.sum(reshape(x, shape), axis=-2)


def _unfold(x, dim):
    """Repeats the last axis until it has `dim` entries.

    Args:
        x: Tensor `(..., size)`.
        dim: int.

    Returns:
        Tensor `(..., dim)`.
    """
    size = x.shape[-1]
    if size == dim:
        return x
    repeated = ops.tile(x, [1] * (len(x.shape) - 1) + [-(-dim // size)])
    return repeated[..., :dim]
