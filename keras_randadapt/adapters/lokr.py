"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

import math
from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.adapters.window import Window
from keras_randadapt.adapters.window import tucker
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.ops.sparse import dense
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import taken
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class LoKr(base.Adapter):
    """Low-rank Kronecker product: `delta = scaling * kron(C, A B)`.

    The dimensions are split into `input_dim = m n` and `output_dim = k l`,
    as near to squares as their divisors allow, with `m <= n` and `k <= l`. `C`
    is `(m, k)`, `A` `(n, rank)` and `B` `(rank, l)`, and all are trained,
    which makes `m k + rank * (n + l)` weights a site: 1,600 for 1,024 by 1,024
    at rank 9. From a rank of half the larger of `n` and `l` on, one full
    matrix `(n, l)` takes the place of `A B`. The delta's rank is that of `C`
    times that of `A B`. `C` starts at zero, so the delta starts at zero.

    Inputs are multiplied as matrices `(m, n)`, by `A`, by `C` and by `B`, which
    takes less than a LoRA of this rank. No delta is formed.

    A convolution's channels are split, and its window belongs to `A`: that is
    `(positions * n, rank)`. With `tucker=True` `A B` is `A D[p] B` at position
    `p` of the window, with `A`, `(n, rank)`, and `D`, `(positions, rank,
    rank)`.

    Train it at a learning rate of 1e-3 to 1e-2 (AdamW).

    Args:
        rank: int. The rank of `A B`.
        factor: Optional int. The size of `m`, and of `k`, where it divides the
            dimension. Elsewhere it and the root of the dimension bound them,
            and the root alone does by default. A small one makes the adapter
            larger.
        decompose_both: bool. Whether `C` is a product of rank `rank` too, where
            that is below half its larger dimension.
        tucker: bool. Whether the window of convolutions is left whole.
        scaling: float. A constant factor of the delta.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` or `factor` is no integer.
        ValueError: If an argument is out of range.

    Example:

    ```python
    kra.inject(
        classifier, kra.LoKr(8), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Edalati et al., "KronA", 2022
          ([arXiv 2212.10650](https://arxiv.org/abs/2212.10650)), section 3:
          the product, and how inputs are multiplied as matrices.
        - Yeh et al., "Navigating Text-To-Image Customization", ICLR 2024
          ([arXiv 2309.14859](https://arxiv.org/abs/2309.14859)), section 3:
          the low rank of the second factor, and `factor`.
        - Hugging Face PEFT, `LoKrConfig`, whose `decompose_factor` is
          `factor` and whose `use_effective_conv2d` is `tucker`. Its `alpha` is
          `scaling * rank`.
    """

    recommended_learning_rate = 3e-3

    def __init__(
        self,
        rank: int = 8,
        *,
        factor: int | None = None,
        decompose_both: bool = False,
        tucker: bool = False,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        if factor is not None:
            factor = arguments.check_rank(factor, "factor")
        self.factor = factor
        self.decompose_both = bool(decompose_both)
        self.tucker = bool(tucker)
        self.scaling = arguments.check_scaling(scaling)

    def build(self, site: Site) -> None:
        whole = Window.of(site)
        m, n = parts(whole.inputs, self.factor)
        k, columns = parts(whole.outputs, self.factor)
        self._small = m, k
        #: The window of the second factor.
        self._window = Window(whole.row_places, n, whole.column_places, columns)
        uniform = "kaiming_uniform"
        if self.decompose_both and 2 * self.rank < max(m, k):
            self.lokr_c = None
            self._add("lokr_c_a", (m, self.rank), uniform)
            self._add("lokr_c_b", (self.rank, k), "zeros")
        else:
            self._add("lokr_c", (m, k), "zeros")
        rows = n * whole.row_places
        self.lokr_d = None
        if 2 * self.rank >= max(n, columns):
            self._add("lokr_ab", (rows, columns * whole.column_places), uniform)
            return
        self.lokr_ab = None
        if self.tucker and whole.places > 1:
            rows = n
            # Entries of the product start with the variance of flat ones.
            stddev = (self.rank * whole.places) ** -0.5
            core = (whole.places, self.rank, self.rank)
            self._add("lokr_d", core, {"name": "normal", "stddev": stddev})
        else:
            columns *= whole.column_places
        self._add("lokr_a", (rows, self.rank), uniform)
        self._add("lokr_b", (self.rank, columns), uniform)

    def _add(self, name, shape, initializer):
        setattr(self, name, self.add_trainable(name, shape, initializer))

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._multiplied(dense(x), *self._own(x.dtype))

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        return self._multiplied(x, *self._of_examples(weights, x.dtype))

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        c, second = _transposed(*self._own(x.dtype))
        return self._multiplied(x, c, second, back=True)

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        c, second = _transposed(*self._of_examples(weights, x.dtype))
        return self._multiplied(x, c, second, back=True)

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        if self._window.places > 1:
            return super().lookup(ids, dtype, training)
        c, (first, *rest) = self._own(dtype)
        return self._rows(
            ops.take(c, ids // self._window.inputs, axis=0),
            ops.take(first, ids % self._window.inputs, axis=0),
            rest,
        )

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        c, (first, *rest) = self._factors(weights.get, dtype)
        return self._rows(
            taken(c, ids // self._window.inputs),
            taken(first, ids % self._window.inputs),
            rest,
        )

    def delta_kernel(self) -> Tensor:
        c, second = self._own("float32")
        window, (m, k) = self._window, self._small
        c = ops.reshape(c, (1, m, 1, 1, k, 1))
        places = window.row_places, window.column_places
        sizes = (places[0], 1, window.inputs, places[1], 1, window.outputs)
        kernel = c * ops.reshape(_product(second), sizes)
        return ops.reshape(kernel, (self.input_dim, self.output_dim))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        c, second = self._own("float32")
        if len(second) == 1 or self._window.places > 1:
            return None
        a, b = second
        m, k = self._small
        if m <= k:
            return _kron(ops.eye(m, dtype="float32"), a), _kron(c, b)
        return _kron(c, a), _kron(ops.eye(k, dtype="float32"), b)

    def _own(self, dtype):
        return self._factors(lambda name: getattr(self, name, None), dtype)

    def _of_examples(self, weights, dtype):
        # There is an axis of tokens behind that of examples.
        c, second = self._factors(weights.get, dtype)
        second = [ops.expand_dims(one, 1) for one in second]
        return ops.expand_dims(c, 1), second

    def _factors(self, get, dtype):
        """The scaled `C`, and a list with the factors of the second matrix."""

        def cast(name):
            return ops.cast(get(name), "float32")

        if get("lokr_c") is None:
            c = ops.matmul(cast("lokr_c_a"), cast("lokr_c_b"))
        else:
            c = cast("lokr_c")
        c = c if self.scaling == 1 else c * self.scaling
        if get("lokr_ab") is not None:
            second = [cast("lokr_ab")]
        elif get("lokr_d") is not None:
            kernels = tucker(cast("lokr_a"), cast("lokr_d"), cast("lokr_b"))
            second = [self._window.view(kernels)]
        else:
            second = [cast("lokr_a"), cast("lokr_b")]
        return ops.cast(c, dtype), [ops.cast(one, dtype) for one in second]

    def _multiplied(self, x, c, second, back=False):
        """The product with `kron(c, second)`.

        Args:
            x: Tensor `(..., tokens, dim)`.
            c: Tensor `(..., m, k)`.
            second: list of matrices, whose product is the second factor.
            back: Whether the factors are those of the transpose.
        """
        window = self._window
        places = window.row_places, window.column_places
        sizes = window.inputs, window.outputs
        m, k = self._small
        if back:
            places, sizes, (m, k) = places[::-1], sizes[::-1], (k, m)
        lead = ops.shape(x)[:-1]
        x = _exchanged(x, lead, (places[0], m), sizes[0])
        x = reshape(x, (*lead, m, places[0] * sizes[0]))
        first, *rest = second
        # Products with wide batches of small matrices are slow, and products
        # along the last axis are one product.
        x = ops.swapaxes(matmul(x, first), -1, -2)
        x = ops.swapaxes(matmul(x, c), -1, -2)
        for one in rest:
            x = matmul(x, one)
        x = _exchanged(x, lead, (k, places[1]), sizes[1])
        return reshape(x, (*lead, k * places[1] * sizes[1]))

    def _rows(self, of_c, of_second, rest):
        for one in rest:
            of_second = ops.matmul(of_second, one)
        rows = ops.expand_dims(of_c, -1) * ops.expand_dims(of_second, -2)
        return ops.reshape(rows, (*ops.shape(of_c)[:-1], self.output_dim))

    def get_config(self) -> Config:
        config = {
            "rank": self.rank,
            "scaling": self.scaling,
            **super().get_config(),
        }
        if self.factor is not None:
            config["factor"] = self.factor
        if self.decompose_both:
            config["decompose_both"] = True
        if self.tucker:
            config["tucker"] = True
        return config


def parts(dim: int, factor: int | None = None) -> tuple[int, int]:
    """Two integers whose product is a dimension, that of `C` first.

    Args:
        dim: int.
        factor: Optional int; see `LoKr`.
    """
    if factor is not None and dim % factor == 0:
        return factor, dim // factor
    most = math.isqrt(dim) if factor is None else min(factor, math.isqrt(dim))
    small = next(n for n in range(most, 0, -1) if dim % n == 0)
    return small, dim // small


def _transposed(c, second):
    turned = [ops.swapaxes(one, -1, -2) for one in reversed(second)]
    return ops.swapaxes(c, -1, -2), turned


def _product(factors):
    first, *rest = factors
    return matmul(first, *rest) if rest else first


def _kron(a, b):
    """The Kronecker product of two matrices."""
    whole = reshape(a, (a.shape[0], 1, a.shape[1], 1)) * reshape(
        b, (1, b.shape[0], 1, b.shape[1])
    )
    return reshape(whole, (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))


def _exchanged(x, lead, pair, size):
    """Exchanges two of the axes that the last axis is made of."""
    if 1 in pair:
        return x
    x = reshape(x, (*lead, *pair, size))
    return ops.swapaxes(x, -2, -3)
