"""Adapters whose updates are multiplied by a weight.

A weight is data: it is the value of a variable, which compiled functions read,
so that changing it compiles nothing. One adapter of a model has one weight.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_randadapt._types import Store
from keras_randadapt._types import Tensor
from keras_randadapt.sites.product import Product


class WeightLayer(keras.layers.Layer):
    """Holds the variable of an adapter's weight, a float32 scalar."""

    def __init__(self, name: str):
        super().__init__(name=name, dtype="float32")

    def build(self) -> None:
        self.weight = self.add_weight(
            name="weight",
            shape=(),
            initializer="ones",
            trainable=False,
            autocast=False,
        )

    def load_own_variables(self, store: Store) -> None:
        # Files without the weight have none to load.
        if len(store.keys()):
            super().load_own_variables(store)


class Weight:
    """The weight of an adapter, which all its sites refer to.

    Attributes:
        layer: The `WeightLayer` that has the variable.
        address: The site whose stack holds the layer.
        value: float, the variable's value.
    """

    def __init__(self, layer: WeightLayer, address: str):
        self.layer = layer
        self.address = address
        self.value = 1.0


class Weighted:
    """An additive adapter as a site sees it, with its update times a weight.

    What is not written here is the adapter's own.

    Args:
        adapter: A built, additive adapter.
        weight: A scalar variable, or a float that is a constant of the
            computation.
    """

    def __init__(self, adapter: Any, weight: keras.Variable | float):
        self.adapter = adapter
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def _times(self, update):
        return update * ops.cast(self.weight, update.dtype)

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        if not self.adapter.adapts_kernel:
            return self.adapter.adapt(x, linear, training)
        return linear(x) + self.delta(self.adapter.drop(x, training), training)

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._times(self.adapter.delta(x, training))

    @property
    def delta_of_stack(self) -> Callable[..., Tensor] | None:
        of_stack = getattr(self.adapter, "delta_of_stack", None)
        if of_stack is None:
            return None

        def weighted(x, training=None, onto=None):
            delta = self._times(of_stack(x, training))
            return delta if onto is None else onto + delta

        return weighted

    def delta_kernel(self) -> Tensor:
        return self._times(self.adapter.delta_kernel())

    def training_delta_kernel(self) -> Tensor:
        return self._times(self.adapter.training_delta_kernel())

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        return self._times(self.adapter.delta_transpose(x, training))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        return self._times(self.adapter.lookup(ids, dtype, training))

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        if training:
            return kernel + self.training_delta_kernel()
        return kernel + self.delta_kernel()

    def merged_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        change = self.adapter.merged_bias(base, base) - base
        return bias + self._times(change)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        factors = self.adapter.factors()
        if factors is None:
            return None
        a, b = factors
        return self._times(a), b
