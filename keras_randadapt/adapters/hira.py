"""HiRA: the product, entry by entry, of the kernel and a low-rank matrix."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.formed_products import formed_product
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.product import kernel_to_change
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class HiRA(base.Adapter):
    """Hadamard high-rank adaptation.

    The adapted kernel is `W + scaling * W * (A B)`, where `*` between matrices
    multiplies entry by entry. `A`, `(input_dim, rank)`, and `B`, `(rank,
    output_dim)`, are trained, which makes `rank * (input_dim + output_dim)`
    weights a site. `B` starts at zero, so the update starts at zero. The
    update's rank may be up to `rank` times that of `W`, so it is nearly always
    full.

    The update depends on the base kernel: beside other active adapters, it
    adds `scaling * W * (A B)`. Entries of the kernel that are zero stay zero.

    A step forms the adapted kernel and multiplies each input once. In use it
    costs nothing once it is merged. Beyond the base product, the backward pass
    computes the gradient of a whole kernel. With dropout in training, in 16
    bits and beside other active adapters the update is multiplied apart. On a
    quantized kernel, the kernel is dequantized in every step besides.

    Train it at a learning rate of 1e-3 to 1e-2 (AdamW): entries of `W` are
    small, and so are the gradients that they scale.

    Args:
        rank: int. The rank of `A B`.
        scaling: float. A constant factor of the update.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range. At injection, if a site is
            an embedding, or if `rank` exceeds the smaller dimension of a
            kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.HiRA(8), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank
          Adaptation for Large Language Models", ICLR 2025
          ([OpenReview](https://openreview.net/forum?id=TwJrTz9cRS)), section
          3.
    """

    recommended_learning_rate = 3e-3
    additive = False
    depends_on_base = True
    site_kinds = ("product", "convolution")

    def __init__(
        self,
        rank: int = 8,
        *,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.scaling = arguments.check_scaling(scaling)

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)

    def build(self, site: Site) -> None:
        self.check(site)
        self.hira_a = self.add_trainable(
            "hira_a", (self.input_dim, self.rank), "kaiming_uniform"
        )
        self.hira_b = self.add_trainable(
            "hira_b", (self.rank, self.output_dim), "zeros"
        )

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        dropped = bool(training and self.dropout)
        kernel = kernel_to_change(linear, x, dropped)
        if kernel is not None:
            return self._product(x, kernel, 1.0)
        # Keras's quantized product has a gradient of its own, which nothing
        # needs here.
        kernel = ops.stop_gradient(linear.base_kernel())
        return linear(x) + self._product(self.drop(x, training), kernel, 0.0)

    def adapt_per_example(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        # x (W * (a b)) = ((x * a) W) * b for vectors a and b.
        y = product(x)
        a, b = weights["hira_a"], weights["hira_b"] * self.scaling
        update = 0.0
        for k in range(self.rank):
            part = product(x * of_examples(a[..., k], x.dtype))
            update = update + part * of_examples(b[:, k], part.dtype)
        return y + update

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        del training  # The update is the same in training.
        a, b = self._factors()
        return kernel + base * matmul(a, b)

    def _factors(self):
        """`A` and the scaled `B`, float32."""
        b = ops.cast(self.hira_b, "float32")
        b = b if self.scaling == 1 else b * self.scaling
        return ops.cast(self.hira_a, "float32"), b

    def _product(self, x, kernel, one):
        """`x (W * (one + A B))`."""
        dtype = x.dtype

        def form(kernel, a, b):
            factor = ops.cast(matmul(a, b), kernel.dtype)
            factor = factor + one if one else factor
            return ops.cast(kernel * factor, dtype)

        def gradients(arguments, of_matrix):
            kernel, a, b = arguments
            of_matrix = ops.cast(of_matrix, kernel.dtype)
            of_product = ops.cast(of_matrix * kernel, "float32")
            factor = ops.cast(matmul(a, b), kernel.dtype) + one
            return (
                of_matrix * factor,
                matmul(of_product, ops.transpose(b)),
                matmul(ops.transpose(a), of_product),
            )

        return formed_product(x, form, gradients, (kernel,), self._factors())

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "scaling": self.scaling,
            **super().get_config(),
        }
