"""`TenantHead`: a kept Dense layer with weights of each tenant's own."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class TenantHead(Adapter):
    """Replaces the kernel and the bias of a layer, example by example.

    Without examples the layer computes as it does without this adapter.
    """

    additive = False
    site_kinds = ("product",)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    def build(self, site: Site) -> None:
        self._has_bias = site.bias_shape is not None

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        return linear(x)

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        return kernel

    def adapt_per_example(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        y = ops.matmul(x, ops.cast(weights["kernel"], x.dtype))
        if not self._has_bias:
            return y
        # The layer adds its own bias afterwards.
        return y + of_examples(weights["bias"] - bias, y.dtype)
