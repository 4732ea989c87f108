"""LoHa: the product, entry by entry, of two low-rank matrices."""

from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters.formed import FormedAdapter
from keras_randadapt.adapters.window import Window
from keras_randadapt.adapters.window import tucker
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class LoHa(FormedAdapter):
    """Low-rank Hadamard product: `delta = scaling * (A1 B1) * (A2 B2)`.

    `*` between matrices multiplies entry by entry. `A1` and `A2`,
    `(input_dim, rank)`, and `B1` and `B2`, `(rank, output_dim)`, are trained,
    which makes `2 * rank * (input_dim + output_dim)` weights a site, those of
    a LoRA of twice the rank. The delta's rank is up to `rank` squared. `A2`
    starts at zero, so the delta starts at zero.

    With `tucker=True` a convolution's kernel is not flattened. At position `p`
    of its window, each of the two matrices is `A C[p] B`, with `A`,
    `(channels, rank)`, `B`, `(rank, filters)`, and `C`, `(positions, rank,
    rank)`. This makes `2 * rank * (channels + filters + rank * positions)`
    weights. Layers without a window are as before.

    A step forms the delta, adds it to the kernel and multiplies each input
    once. In use it costs nothing once it is merged. Beyond the base product,
    the backward pass computes the gradient of a whole kernel. With dropout in
    training, in 16 bits, where the kernel would absorb a small delta, and
    beside other active adapters the delta is multiplied apart.

    Train it at a learning rate of 1e-3 to 1e-2 (AdamW): one matrix scales the
    gradients of the other, and its entries are small.

    Args:
        rank: int. The rank of both matrices.
        tucker: bool. Whether the window of convolutions is left whole.
        scaling: float. A constant factor of the delta.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds the smaller dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.LoHa(4), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Hyeon-Woo et al., "FedPara", ICLR 2022
          ([arXiv 2108.06098](https://arxiv.org/abs/2108.06098)), section 2.2:
          the product, and proposition 3 for convolutions.
        - Yeh et al., "Navigating Text-To-Image Customization", ICLR 2024
          ([arXiv 2309.14859](https://arxiv.org/abs/2309.14859)), section 3,
          who named it LoHa.
        - Hugging Face PEFT, `LoHaConfig`, whose `use_effective_conv2d` is
          `tucker`. Its `alpha` is `scaling * rank`.
    """

    recommended_learning_rate = 3e-3
    factors_are_cheap = False

    def __init__(
        self,
        rank: int = 4,
        *,
        tucker: bool = False,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.tucker = bool(tucker)
        self.scaling = arguments.check_scaling(scaling)

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)

    def build(self, site: Site) -> None:
        self.check(site)
        # A file without its model does not tell the window.
        self._window = Window.of(site) if self.tucker else None
        #: Whether the site has a window that is left whole.
        self.is_whole = self.tucker and self._window.places > 1
        rows, columns = self.input_dim, self.output_dim
        if self.is_whole:
            rows, columns = self._window.inputs, self._window.outputs
        uniform = "kaiming_uniform"

        def matrix(number, first):
            self._add(f"loha_a{number}", (rows, self.rank), first)
            self._add(f"loha_b{number}", (self.rank, columns), uniform)
            if self.is_whole:
                self._add_core(f"loha_c{number}")

        matrix(1, uniform)
        matrix(2, "zeros")

    def _add_core(self, name):
        places = self._window.places
        # Entries of the matrix then start with the variance of flat ones.
        stddev = (self.rank * places) ** -0.5
        first = {"name": "normal", "stddev": stddev}
        self._add(name, (places, self.rank, self.rank), first)

    def _add(self, name, shape, initializer):
        setattr(self, name, self.add_trainable(name, shape, initializer))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        if self.is_whole:
            return super().lookup(ids, dtype, training)
        a1, b1, a2, b2 = self._matrices()
        first = matmul(ops.take(a1, ids, axis=0), b1)
        return ops.cast(first * matmul(ops.take(a2, ids, axis=0), b2), dtype)

    def delta_kernel(self) -> Tensor:
        if not self.is_whole:
            return super().delta_kernel()

        def matrix(number):
            factors = (getattr(self, f"loha_{n}{number}") for n in "acb")
            return tucker(*(ops.cast(one, "float32") for one in factors))

        return self._window.view(matrix(1) * matrix(2) * self.scaling)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.is_whole:
            return None
        a1, b1, a2, b2 = self._matrices()
        # Each pair of columns gives one column.
        left = ops.expand_dims(a1, 2) * ops.expand_dims(a2, 1)
        right = ops.expand_dims(b1, 1) * ops.expand_dims(b2, 0)
        square = self.rank**2
        return (
            ops.reshape(left, (self.input_dim, square)),
            ops.reshape(right, (square, self.output_dim)),
        )

    def _kernels(self, weights, dtype):
        first = ops.matmul(weights["loha_a1"], weights["loha_b1"])
        second = ops.matmul(weights["loha_a2"], weights["loha_b2"])
        return ops.cast(first * second * self.scaling, dtype)

    def _matrices(self):
        """`A1`, `B1`, `A2` and the scaled `B2`, float32."""
        found = [
            ops.cast(one, "float32")
            for one in (self.loha_a1, self.loha_b1, self.loha_a2, self.loha_b2)
        ]
        if self.scaling != 1:
            found[-1] = found[-1] * self.scaling
        return found

    def _terms(self):
        return (), self._matrices()

    def _formed(self, a1, b1, a2, b2):
        return matmul(a1, b1) * matmul(a2, b2)

    def _gradients(self, terms, of_delta):
        a1, b1, a2, b2 = terms
        of_first = of_delta * matmul(a2, b2)
        of_second = of_delta * matmul(a1, b1)
        return (
            matmul(of_first, ops.transpose(b1)),
            matmul(ops.transpose(a1), of_first),
            matmul(of_second, ops.transpose(b2)),
            matmul(ops.transpose(a2), of_second),
        )

    def _product(self, x, kernel=None, transposed=False):
        if not self.is_whole:
            return super()._product(x, kernel, transposed)
        whole = ops.cast(self.delta_kernel(), x.dtype)
        whole = ops.transpose(whole) if transposed else whole
        return matmul(x, whole if kernel is None else kernel + whole)

    def get_config(self) -> Config:
        config = {
            "rank": self.rank,
            "scaling": self.scaling,
            **super().get_config(),
        }
        if self.tucker:
            config["tucker"] = True
        return config
