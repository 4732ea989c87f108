"""Adapted `Dense` and `EinsumDense` layers."""

import math

from keras import ops

from keras_randadapt import _compat
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import placed
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.sites import formed
from keras_randadapt.sites import product
from keras_randadapt.sites import quantized_product
from keras_randadapt.sites.kernel_view import EinsumPlan
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import as_float
from keras_randadapt.sites.layer import kernel_space_product
from keras_randadapt.sites.layer import own_bias
from keras_randadapt.sites.layer import shown_bias


class _AdaptedProduct(AdaptedLayer):
    """A `Dense` or `EinsumDense` layer."""

    @property
    def kernel(self):
        # Exporters and Gemma4's feed-forward network read the kernel and
        # multiply by it, so they must see the update.
        return self._merged_or_base(super().kernel)

    bias = shown_bias("bias")

    def call(self, inputs, training=None):
        with self._lock_if_quantized():
            return self._adapted_call(inputs, training)

    def _adapted_call(self, inputs, training):
        inputs = as_float(placed(inputs), self.compute_dtype)
        if self.adapter.relays_out:
            self.adapter.relay(self.flatten_input(inputs))
        training = self._is_training(training)
        self.adapter.check_examples(self, inputs)
        y = self._adapted_product(inputs, training)
        bias = self.merged_bias()
        if bias is not None:
            bias = quantized_product.bias_as_added(self, bias)
            y = ops.add(y, ops.cast(bias, self.compute_dtype))
        if self.activation is not None:
            y = self.activation(y)
        if any(adapter.adapts_output for adapter in self.adapter.active()):
            columns = self.adapter.adapt_output(
                self.flatten_output(y), self.flatten_input(inputs), training
            )
            y = self.unflatten_output(columns, inputs)
        return y

    def _adapted_product(self, inputs, training):
        active = self.adapter.active()
        if not active:
            return self._base_product(inputs)
        kernel = formed.kernel_of(self)
        if kernel is not None:
            return self._float_product(inputs, kernel)
        # The tokens are put into one axis. With two axes, XLA's gradients of
        # thin products take three times as long on a CPU
        # (docs/design/other-costs.md).
        x = self.flatten_input(inputs)

        def linear(z):
            # Most adapters pass `x` on. The base product then takes the
            # layer's own input, which saves a second reshape.
            z = inputs if z is x else self.unflatten_input(z, inputs)
            return self.flatten_output(self._base_product(z))

        base = product.Product(linear, self)
        y = product.adapt_all(active, x, base, training)
        return self.unflatten_output(y, inputs)

    def _base_product(self, x):
        if self.quantization_mode is None:
            return self._float_product(x, _compat.kernel_of(self))
        return quantized_product.base_product(self, x)


class AdaptedDense(_AdaptedProduct):
    """A `Dense` layer, whose kernel is its kernel view."""

    @property
    def kernel_view(self):
        # The shape does not come from the kernel, since int4 kernels are
        # packed.
        return KernelView(int(self.input_spec.axes[-1]), self.units)

    def to_view(self, kernel):
        return kernel

    def from_view(self, view):
        return view

    def flatten_input(self, inputs):
        return reshape(inputs, (-1, self.kernel_view.input_dim))

    def unflatten_input(self, rows, inputs):
        batch = ops.shape(inputs)[:-1]
        return reshape(rows, (*batch, self.kernel_view.input_dim))

    def flatten_output(self, y):
        return reshape(y, (-1, self.units))

    def unflatten_output(self, columns, inputs):
        return reshape(columns, (*ops.shape(inputs)[:-1], self.units))

    def multiply(self, rows):
        """A matrix `(n, input_dim)` times the base kernel view."""
        return self._base_product(rows)

    def _float_product(self, x, kernel):
        return matmul(x, kernel)


class AdaptedEinsumDense(_AdaptedProduct):
    """An `EinsumDense` layer, whose kernel view sorts axes by their label."""

    @property
    def kernel_view(self):
        return einsum_plan_of(self).view_shape

    def to_view(self, kernel):
        return einsum_plan_of(self).to_view(kernel)

    def from_view(self, view):
        return einsum_plan_of(self).from_view(view)

    def flatten_input(self, inputs):
        return einsum_plan_of(self).flatten_input(inputs)

    def unflatten_input(self, rows, inputs):
        return einsum_plan_of(self).unflatten_input(rows, inputs)

    def flatten_output(self, y):
        return einsum_plan_of(self).flatten_output(y)

    def unflatten_output(self, columns, inputs):
        return einsum_plan_of(self).unflatten_output(columns, inputs)

    def multiply(self, rows):
        """A matrix `(n, input_dim)` times the base kernel view."""
        return einsum_plan_of(self).multiply(rows, self._base_product)

    def bias_to_view(self, bias):
        if self._has_bias_of_columns():
            return einsum_plan_of(self).flatten_bias(bias)
        return super().bias_to_view(bias)

    def bias_from_view(self, vector):
        if self._has_bias_of_columns():
            shape = own_bias(self).shape
            return einsum_plan_of(self).unflatten_bias(vector, shape)
        return super().bias_from_view(vector)

    def _has_bias_of_columns(self):
        plan = einsum_plan_of(self)
        return plan.is_matrix_product and (
            math.prod(own_bias(self).shape) == plan.view_shape.output_dim
        )

    def _float_product(self, x, kernel):
        return ops.einsum(self.equation, x, kernel)

    def _adapted_product(self, inputs, training):
        kernel = formed.kernel_of(self)
        if kernel is not None:
            return self._float_product(inputs, kernel)
        if not einsum_plan_of(self).is_matrix_product:
            return kernel_space_product(self, inputs, training)
        return super()._adapted_product(inputs, training)


def einsum_plan_of(layer):
    """The `EinsumPlan` of an `EinsumDense` layer, adapted or not."""
    return EinsumPlan.of(
        layer.equation, _compat.kernel_shape(layer), layer.input_spec.ndim
    )
