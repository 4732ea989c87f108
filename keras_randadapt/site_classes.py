"""Sites: what the layers that adapters attach to compute.

A site's layer keeps its identity and gets a subclass of its own class, made
in `site_layers`, with one of the classes here before it. It puts the adapters'
delta between the base product and the bias. How the kernel of each layer class
is seen as a matrix, the kernel view, is here too.
"""

import contextlib
import functools
import math
import threading

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import adapter_stack
from keras_randadapt.einsum_plan import EinsumPlan
from keras_randadapt.einsum_plan import KernelView
from keras_randadapt.ops.plain import matmul
from keras_randadapt.ops.plain import placed
from keras_randadapt.ops.plain import reshape

# Setting bias and activation aside changes the layer for the length of a
# call; two threads must not see each other's changes.
_QUANTIZED_CALL_LOCK = threading.RLock()

_CLASS_LOCK = threading.RLock()


class Site(_compat.KeepsTrainingFlag):
    """Mixed into a site's own class; see `site_layers.site_class`."""

    _site_base = None

    #: See `Adapter.site_kinds`.
    kind = "product"

    #: The attribute of the layer that is its bias.
    bias_name = "bias"

    @classmethod
    def from_config(cls, config):
        # A config describes the layer without adapters.
        return cls._site_base.from_config(config)

    def save_own_variables(self, store):
        # Keras stores the `kernel` property, which here is the merged kernel.
        with as_base_class(self):
            self.save_own_variables(store)

    def quantized_call(self, *args, **kwargs):
        # Keras calls this instead of `call`; ours branches further down.
        return self.call(*args, **kwargs)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' carries an adapter of keras_randadapt, "
            "which Keras's own LoRA can't see. Call "
            "`keras_randadapt.eject(model)` first, or add a second adapter "
            "with `keras_randadapt.inject(model, LoRA(...), name=...)`."
        )

    def _lock_if_quantized(self):
        # Of a quantized product, bias and activation are set aside: another
        # thread must not take the layer for one that has none.
        if self.quantization_mode is None:
            return contextlib.nullcontext()
        return _QUANTIZED_CALL_LOCK

    def _is_training(self, training):
        if training is None:
            return _compat.training_phase(self)
        return training

    def _merged_kernel_view(self, kernel):
        """The kernel view with every active adapter folded in, float32."""
        base = ops.cast(self.to_view(kernel), "float32")
        return adapter_stack.fold(self.adapter.active(), base)

    def bias_to_view(self, bias):
        """A bias as a vector, of the kernel view's columns if it can be."""
        return ops.reshape(bias, (-1,))

    def bias_from_view(self, vector):
        return ops.reshape(vector, getattr(self, self.bias_name).shape)

    def merged_bias(self):
        """The bias with every active adapter folded in, of its own shape.

        float32, which the caller rounds to what it computes in; the variable
        itself where none adapts it, `None` where there is none.
        """
        bias = getattr(self, self.bias_name, None)
        adapters = [a for a in self.adapter.active() if a.adapts_bias]
        if bias is None or not adapters:
            return bias
        base = ops.cast(self.bias_to_view(bias), "float32")
        vector = base
        for adapter in adapters:
            vector = adapter.merged_bias(vector, base)
        return self.bias_from_view(vector)

    def _merged_or_base(self, kernel):
        """What the public `kernel` or `embeddings` property shows."""
        if not self.adapter.active():
            return kernel
        merged = self.from_view(self._merged_kernel_view(kernel))
        return ops.cast(merged, self.compute_dtype)


class _ProductSite(Site):
    """Dense and EinsumDense."""

    @property
    def kernel(self):
        # Exporters and Gemma4's feed-forward read the kernel and multiply
        # themselves: they must see the update. A quantized kernel is integers
        # that only the layer can scale, so it stays what it is.
        kernel = super().kernel
        if self.quantization_mode is not None:
            return kernel
        return self._merged_or_base(kernel)

    def call(self, inputs, training=None):
        with self._lock_if_quantized():
            return self._adapted_call(inputs, training)

    def _adapted_call(self, inputs, training):
        inputs = _as_float(placed(inputs), self.compute_dtype)
        if self.adapter.relays_out:
            self.adapter.relay(self.flatten_input(inputs))
        training = self._is_training(training)
        y = self._adapted_product(inputs, training)
        if self.bias is not None:
            bias = ops.cast(self.merged_bias(), self.compute_dtype)
            y = ops.add(y, bias)
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
        # Tokens in one axis: with two, XLA's gradients of thin products take
        # three times as long on a CPU (benchmarks/README.md).
        x = self.flatten_input(inputs)

        def linear(z):
            # The usual adapter passes its input on: the base product then
            # takes the layer's own input and nothing is laid out twice.
            z = inputs if z is x else self.unflatten_input(z, inputs)
            return self.flatten_output(self._base_product(z))

        product = adapter_stack.Product(linear, self)
        y = adapter_stack.adapt_all(active, x, product, training)
        return self.unflatten_output(y, inputs)

    def _base_product(self, x):
        if self.quantization_mode is None:
            return self._float_product(x, self._kernel)
        call = functools.partial(self._site_base.quantized_call, self, x)
        if self.bias is None and self.activation is None:
            return call()
        with self._lock_if_quantized():
            with _compat.instance_attributes(self, bias=None, activation=None):
                return call()


class DenseSite(_ProductSite):
    """A `Dense` layer; its kernel is its own kernel view."""

    @property
    def kernel_view(self):
        # Not from the kernel: int4 kernels are packed.
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


class EinsumDenseSite(_ProductSite):
    """An `EinsumDense` layer; its kernel's axes are factored by label."""

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
            shape = self.bias.shape
            return einsum_plan_of(self).unflatten_bias(vector, shape)
        return super().bias_from_view(vector)

    def _has_bias_of_columns(self):
        plan = einsum_plan_of(self)
        return plan.is_matrix_product and (
            math.prod(self.bias.shape) == plan.view_shape.output_dim
        )

    def _float_product(self, x, kernel):
        return ops.einsum(self.equation, x, kernel)

    def _adapted_product(self, inputs, training):
        if not einsum_plan_of(self).is_matrix_product:
            return _kernel_space_product(self, inputs, training)
        return super()._adapted_product(inputs, training)


class ConvSite(Site):
    """A convolution, grouped and dilated ones included.

    The kernel view of a kernel `(*window, channels / groups, filters)` is
    `(prod(window) * channels / groups, filters)`. The delta is formed and
    convolved: a kernel is small beside the activations it slides over, and
    this way strides, padding, dilation and groups stay Keras's.
    """

    kind = "convolution"

    @property
    def kernel(self):
        return self._merged_or_base(super().kernel)

    @property
    def kernel_view(self):
        *window, filters = self._kernel.shape
        return KernelView(int(np.prod(window)), int(filters))

    def to_view(self, kernel):
        return ops.reshape(kernel, ConvSite.kernel_view.fget(self))

    def from_view(self, view):
        return ops.reshape(view, self._kernel.shape)

    def call(self, inputs):
        inputs = _as_float(inputs, self.compute_dtype)
        y = _kernel_space_product(self, inputs, self._is_training(None))
        if self.bias is not None:
            # Broadcast over batch and space, wherever the channels are.
            shape = [1] * (self.rank + 2)
            channels = -1 if self.data_format == "channels_last" else 1
            shape[channels] = self.filters
            bias = ops.cast(self.merged_bias(), self.compute_dtype)
            y = ops.add(y, reshape(bias, shape))
        if self.activation is not None:
            y = self.activation(y)
        return y

    def _base_product(self, x):
        return self._float_product(x, self._kernel)

    def _float_product(self, x, kernel):
        padding = self.padding
        if padding == "causal":
            x = ops.pad(x, self._compute_causal_padding())
            padding = "valid"
        return ops.conv(
            x,
            ops.convert_to_tensor(kernel),
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


class NormSite(Site):
    """A normalization, whose offset `beta` is its bias; it has no kernel."""

    kind = "norm"
    bias_name = "beta"

    @property
    def kernel_view(self):
        return KernelView(1, math.prod(self.beta.shape))

    def call(self, inputs, *args, **kwargs):
        y = self._site_base.call(self, inputs, *args, **kwargs)
        if not any(adapter.adapts_bias for adapter in self.adapter.active()):
            return y
        axes = (
            self.axis if isinstance(self.axis, (list, tuple)) else [self.axis]
        )
        shape = [1] * len(inputs.shape)
        for axis, size in zip(axes, self.beta.shape, strict=True):
            shape[axis] = size
        change = self.merged_bias() - ops.cast(self.beta, "float32")
        return y + ops.cast(reshape(change, shape), y.dtype)


class EmbeddingSite(Site):
    """An `Embedding`: the kernel view is `(vocabulary, features)`."""

    kind = "lookup"

    @property
    def embeddings(self):
        embeddings = super().embeddings
        if self.quantization_mode is not None:
            return embeddings
        return self._merged_or_base(embeddings)

    @property
    def kernel_view(self):
        return KernelView(self.input_dim, self.output_dim)

    def to_view(self, kernel):
        return kernel

    def from_view(self, view):
        return view

    def call(self, inputs):
        return self._adapted_lookup(inputs)

    def _adapted_lookup(self, inputs):
        training = self._is_training(None)
        ids = inputs
        if keras.backend.standardize_dtype(ids.dtype) not in (
            "int32",
            "int64",
        ):
            ids = ops.cast(ids, "int32")
        if self.quantization_mode is None:
            y = ops.take(self._embeddings, ids, axis=0)
            y = ops.cast(y, self.compute_dtype)
        else:
            y = self._site_base.quantized_call(self, ids)
        for adapter in self.adapter.active():
            y = y + adapter.lookup(ids, y.dtype, training)
        return y


class ReversibleEmbeddingSite(EmbeddingSite):
    """A `ReversibleEmbedding`, adapted in both directions where tied.

    With `tie_weights=False` the reverse projection has a matrix of its own,
    which is not adapted.
    """

    def call(self, inputs, reverse=False):
        if reverse:
            return self._adapted_reverse(inputs)
        y = self._adapted_lookup(inputs)
        # Keras's layer sets its mask in `call` and computes none elsewhere.
        mask = keras.layers.Embedding.compute_mask(self, inputs)
        if mask is not None:
            _compat.set_keras_mask(y, mask)
        return y

    def _adapted_reverse(self, inputs):
        with self._lock_if_quantized():
            return self._adapted_logits(inputs)

    def _adapted_logits(self, inputs):
        training = self._is_training(None)
        logits = self._base_reverse(inputs)
        if self.tie_weights:
            x = ops.cast(inputs, logits.dtype)
            for adapter in self.adapter.active():
                logits = logits + adapter.delta_transpose(
                    adapter.drop(x, training), training
                )
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits

    def _base_reverse(self, inputs):
        if self.quantization_mode is not None:
            with _compat.instance_attributes(self, logit_soft_cap=None):
                return self._site_base.quantized_call(
                    self, inputs, reverse=True
                )
        if self.tie_weights:
            kernel = ops.transpose(ops.convert_to_tensor(self._embeddings))
        else:
            kernel = ops.convert_to_tensor(self.reverse_embeddings)
        dtype = self.reverse_dtype or self.compute_dtype
        return ops.matmul(ops.cast(inputs, dtype), ops.cast(kernel, dtype))


def _as_float(x, dtype):
    # Keras casts floats only; the products promote integers, but a delta
    # computed in integers would be nothing.
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        return x
    return ops.cast(x, dtype)


def _kernel_space_product(site, inputs, training):
    """The product with the merged kernel, or with base and delta apart."""
    active = site.adapter.active()
    if not active:
        return site._base_product(inputs)
    apart = training and any(
        adapter.dropout or adapter.step_counter is not None
        for adapter in active
    )
    if site.compute_dtype in ("float32", "float64") and not apart:
        view = site._merged_kernel_view(site._kernel)
        kernel = ops.cast(site.from_view(view), site.compute_dtype)
        return site._float_product(inputs, kernel)
    # In 16 bits a small delta would be rounded away in base + delta.
    y = site._base_product(inputs)
    for adapter in active:
        delta = site.from_view(_delta_view(site, adapter, training))
        y = y + site._float_product(
            adapter.drop(inputs, training), ops.cast(delta, inputs.dtype)
        )
    return y


def _delta_view(site, adapter, training):
    if not adapter.additive:
        base = ops.cast(site.to_view(site._kernel), "float32")
        return adapter.merged(base, base, training) - base
    if training:
        return adapter.training_delta_kernel()
    return adapter.delta_kernel()


def einsum_plan_of(layer):
    shape = list(layer._kernel.shape)
    if layer.quantization_mode == "int4":
        # Packed: flattened since Keras 3.15, along one axis before.
        if hasattr(layer, "original_kernel_shape"):
            shape = layer.original_kernel_shape
        else:
            axis = layer._int4_pack_axis
            shape[axis] = layer._orig_length_along_pack_axis
    return EinsumPlan.of(
        layer.equation, tuple(int(n) for n in shape), layer.input_spec.ndim
    )


@contextlib.contextmanager
def as_base_class(*layers):
    """For a block, gives layers their own classes back.

    Keras's saving then sees the layers it would see without adapters. One
    thread at a time: of two, the second would find the layers without their
    site's class and leave them so.
    """
    with _CLASS_LOCK:
        sites = [layer for layer in layers if isinstance(layer, Site)]
        classes = [type(layer) for layer in sites]
        try:
            for layer in sites:
                layer.__class__ = layer._site_base
            yield
        finally:
            for layer, cls in zip(sites, classes):
                layer.__class__ = cls
