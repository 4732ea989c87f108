"""`Product`: the product that the adapters of a site change in turn."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt._types import Tensor


class Product:
    """The product that an adapter adapts: `linear` of `Adapter.adapt`.

    Called with `(..., input_dim)`, it gives `(..., output_dim)`.

    Attributes:
        base: The `Product` without any adapter. It may be this one.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        site: Any,
        base: "Product | None" = None,
    ):
        self._product = product
        self._site = site
        self.base = self if base is None else base

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def kernel(self) -> Tensor | None:
        """The kernel view by which this product multiplies, if there is one.

        Returns:
            Tensor `(input_dim, output_dim)` of the site's compute dtype. The
            product with another such matrix is `ops.matmul(x, matrix)`.
            `None` if the kernel is quantized, or if another adapter has
            changed the base product.
        """
        if self.base is not self:
            return None
        return self._kernel(self._site.compute_dtype)

    def bias_view(self) -> Tensor | None:
        """The site's bias as a float32 vector; see `Site`. `None` if none."""
        # The attribute itself would show the adapted bias.
        bias = vars(self._site).get(self._site.bias_name)
        if bias is None:
            return None
        view = self._site.bias_to_view(_compat.unrounded(bias))
        return ops.cast(view, "float32")

    def times_base(self, rows: Tensor) -> Tensor:
        """A float32 matrix times the base kernel view, quantized or not.

        Args:
            rows: Tensor `(n, input_dim)`.

        Returns:
            float32 tensor `(n, output_dim)`.
        """
        kernel = self._kernel("float32")
        if kernel is None and self._site.quantization_mode == "float8":
            # Keras would round the rows too, to the scale of the inputs.
            kernel = self.base_kernel()
        if kernel is not None:
            return ops.matmul(rows, kernel)
        rows = ops.cast(rows, self._site.compute_dtype)
        return ops.cast(self._site.multiply(rows), "float32")

    def base_kernel(self) -> Tensor:
        """The base kernel view, float32, dequantized if it is quantized."""
        kernel = self._kernel("float32")
        if kernel is not None:
            return kernel
        if _compat.can_dequantize(self._site):
            view = self._site.to_view(_compat.dequantized_kernel(self._site))
            return ops.cast(view, "float32")
        return self.times_base(ops.eye(self._site.kernel_view.input_dim))

    def _kernel(self, dtype):
        if self._site.quantization_mode is not None:
            return None
        kernel = _compat.kernel_of(self._site)
        if dtype == "float32":
            kernel = _compat.unrounded(kernel)
        return self._site.to_view(ops.cast(kernel, dtype))


def kernel_to_change(
    linear: Product, x: Tensor, dropped: bool
) -> Tensor | None:
    """`linear.kernel()`, if the product may be that with a changed kernel.

    In 16 bits a small update would be rounded away in the sum with the kernel,
    and dropped inputs are for the update alone.

    Args:
        linear: A `Product`.
        x: The inputs.
        dropped: bool. Whether the update has inputs of which some are dropped.
    """
    exact = keras.backend.standardize_dtype(x.dtype) in ("float32", "float64")
    return linear.kernel() if exact and not dropped else None


def adapt_all(adapters, x, linear, training):
    """The product after every adapter has adapted it, in their order."""
    for adapter in adapters:
        linear = Product(
            functools.partial(adapter.adapt, linear=linear, training=training),
            linear._site,
            linear.base,
        )
    return linear(x)


def fold(adapters, base, training=False):
    """A kernel view with adapters folded in.

    Args:
        adapters: list of built adapters.
        base: float32 tensor, the base kernel view.
        training: Whether a training step is running.

    Returns:
        float32 tensor of the same shape.
    """
    view = base
    for adapter in adapters:
        view = adapter.merged(view, base, training)
    return view
