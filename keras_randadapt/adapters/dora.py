"""DoRA: a magnitude for each output, and any adapter for the direction."""

from collections.abc import Collection
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Rename
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.adapters import configs
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site

# The floor of a squared norm: it lies below the square of any norm that
# matters and far above the smallest float32.
_SMALLEST_SQUARE = 1e-30
# The closed form of a squared norm subtracts nearly equal numbers where a
# delta cancels most of a column. Columns up to `_SHORT` entries are short
# enough for that to happen, so their norms come from the delta itself. In
# longer columns a result below `_ROUNDED` of the terms is rounding error, so
# it is raised to that part.
_SHORT = 64
_ROUNDED = 1e-6


@keras.saving.register_keras_serializable(package="keras_randadapt")
class DoRA(base.Adapter):
    """Weight-decomposed low-rank adaptation around any additive adapter.

    The adapted kernel is `m * (W + delta) / ||W + delta||`. Here `delta` is
    the inner adapter's, `||.||` is the norm of each column of the kernel view
    (a column is an output), and `m`, `(output_dim,)`, is a trained magnitude.
    `m` starts at `||W||`, so the kernel starts at `W` if the inner delta
    starts at zero. A site has `output_dim` weights beside those of the inner
    adapter.

    `DoRA(LoRA(8))` is the paper's method; `DoRA(VeRA(256))` is DVoRA.

    The update depends on the base kernel: beside other active adapters, it
    adds `adapted kernel - W`. `||W||` is computed when the adapter is
    attached, so load a base model's weights before that. If the inner adapter
    has two thin factors and the columns are longer than 64, the norms come
    from products of the factors with the kernel, and no delta is formed.

    Train it at the inner adapter's learning rate.

    Args:
        adapter: The inner adapter, such as `LoRA(8)`, with its seed and
            dropout. It must be additive.
        detach_norm: bool. Whether the gradient treats the norms as constants,
            as in the paper's section 4.3. It saves memory and time.
        dtype: The dtype of `m`. See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `adapter` is no adapter.
        ValueError: If `adapter` is built or not additive. At injection, if a
            site is an embedding, or one that the inner adapter does not take.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.DoRA(kra.LoRA(8)),
        targets=["query", "value"],
        keep_trainable="logits",
    )
    ```

    References:
        - Liu et al., "DoRA", ICML 2024, equations 5, 6 and 11. Its "column"
          of the weight `(output_dim, input_dim)` is a row, as in the
          reference code.
    """

    additive = False
    depends_on_base = True
    site_kinds = ("product", "convolution")

    def __init__(
        self,
        adapter: base.Adapter,
        *,
        detach_norm: bool = True,
        dtype: str = "float32",
        name: str | None = None,
    ):
        if not isinstance(adapter, base.Adapter):
            raise TypeError(
                "`adapter` must be an adapter such as `LoRA(8)`. Received: "
                f"adapter={adapter!r} (of type {type(adapter).__name__})"
            )
        if adapter.built or not adapter.additive or adapter.adapts_bias:
            raise ValueError(
                "`adapter` must be an unbuilt adapter that adds a delta which "
                "does not depend on the base kernel, such as `LoRA(8)`. "
                f"Received: adapter={adapter!r}"
            )
        super().__init__(seed=adapter.seed, dtype=dtype, name=name)
        self.inner = adapter
        self.dropout = adapter.dropout
        self.detach_norm = bool(detach_norm)
        self.recommended_learning_rate = adapter.recommended_learning_rate

    def for_site(self, site: Site, name: str) -> Self:
        clone = self._around(self.inner.for_site(site, "inner"), name)
        clone.site = site
        return clone

    def _around(self, inner, name):
        return type(self)(
            inner, detach_norm=self.detach_norm, dtype=self.dtype, name=name
        )

    def check(self, site: Site) -> None:
        self.inner.check(site)

    def check_addresses(self, addresses: Collection[str]) -> None:
        self.inner.check_addresses(addresses)

    def resolved(self, layers: Layers, addresses: Collection[str]) -> Self:
        inner = self.inner.resolved(layers, addresses)
        return self if inner is self.inner else self._around(inner, self.name)

    def relocated(self, rename: Rename) -> Self:
        return self._around(self.inner.relocated(rename), self.name)

    def build(self, site: Site) -> None:
        self.inner.build_at(site)
        self.step_counter = self.inner.step_counter
        self.magnitude = self.add_trainable(
            "magnitude", (self.output_dim,), "ones"
        )
        # It is derived from the base kernel, so no adapter file holds it.
        self.base_square = self.add_derived("base_square", (self.output_dim,))

    def _prepare_dropout(self):
        """Does nothing: the inner adapter has the dropout state."""

    def start_from(self, kernel: np.ndarray) -> None:
        self.inner.start_from(kernel)
        square = np.sum(kernel.astype("float64") ** 2, axis=0)
        square = square.astype("float32")
        self.base_square.assign(square)
        self.magnitude.assign(np.sqrt(square))

    def wrap_optimizer(
        self, optimizer: keras.optimizers.Optimizer, name: str
    ) -> keras.optimizers.Optimizer:
        return self.inner.wrap_optimizer(optimizer, name)

    def drop(self, x: Tensor, training: bool | None) -> Tensor:
        return self.inner.drop(x, training)

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        excess = self._excess(self._square(linear, training))
        excess = ops.cast(excess, x.dtype)
        if training and self.dropout:
            # As in the reference code, only the product with the unscaled base
            # kernel sees all inputs.
            dropped = self.drop(x, training)
            direction = linear.base(dropped)
            delta = self.inner.delta(dropped, training)
            return linear(x) + excess * (direction + delta) + delta
        y = self.inner.adapt(x, linear, training)
        if linear.base is not linear:
            return y + excess * self.inner.adapt(x, linear.base, training)
        dtype = keras.backend.standardize_dtype(y.dtype)
        if dtype in ("float16", "bfloat16"):
            # In 16 bits, `1 + excess` would be rounded, and all outputs with
            # it.
            return y + excess * y
        # Without a compiler, this form needs a tensor less in memory and in
        # the gradient.
        return y * (1.0 + excess)

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        delta = self._inner_delta(training)
        direction = base + delta
        square = ops.sum(ops.square(self._norms_see(direction)), axis=0)
        return kernel + delta + self._excess(square) * direction

    def basis_digest(self) -> str:
        return self.inner.basis_digest()

    def derived_digest(self) -> str:
        return self.inner.derived_digest()

    def _excess(self, square):
        """`m / ||W + delta|| - 1`, `(output_dim,)`, float32."""
        norm = ops.sqrt(ops.maximum(square, _SMALLEST_SQUARE))
        return ops.cast(self.magnitude, "float32") / norm - 1.0

    def _square(self, linear, training):
        """`||W + delta||^2`, `(output_dim,)`, float32."""
        factors = None
        same_in_training = not training or self.step_counter is None
        cheap = self.inner.factors_are_cheap
        if self.input_dim > _SHORT and cheap and same_in_training:
            factors = self.inner.factors()
        if factors is None:
            delta = self._norms_see(self._inner_delta(training))
            return ops.sum(ops.square(linear.base_kernel() + delta), axis=0)
        # For each output, ||w + A b||^2 = ||w||^2 + 2 (A' w)' b + b' (A' A) b.
        a, b = map(self._norms_see, factors)
        rows = ops.transpose(a)
        crossed = 2.0 * ops.sum(linear.times_base(rows) * b, axis=0)
        squares = ops.sum(matmul(matmul(rows, a), b) * b, axis=0)
        squares = squares + self.base_square
        return ops.maximum(squares + crossed, _ROUNDED * squares)

    def _inner_delta(self, training):
        if training:
            return self.inner.training_delta_kernel()
        return self.inner.delta_kernel()

    def _norms_see(self, tensor):
        return ops.stop_gradient(tensor) if self.detach_norm else tensor

    def get_config(self) -> Config:
        config = {
            "adapter": configs.serialize(self.inner),
            "detach_norm": self.detach_norm,
        }
        if self.dtype != "float32":
            config["dtype"] = self.dtype
        return config

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        inner = config.pop("adapter")
        return cls(configs.deserialize(inner), **config)
