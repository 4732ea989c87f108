"""`AdaptedLayer`: the part of a site that is the same for every layer class.

A site's layer stays the same object and gets another class. `supported` makes
it from the layer's own class and a mixin of `dense`, `convolution`, `embedding`
or `normalization`. The mixin adds the adapters' delta between the base product
and the bias, and defines the layer's kernel view.
"""

import contextlib
import threading

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import folding
from keras_randadapt.sites import per_example
from keras_randadapt.sites import straight_through
from keras_randadapt.sites.folding import own_bias

_CLASS_LOCK = threading.RLock()


class AdaptedLayer(folding.Folds, _compat.KeepsTrainingFlag):
    """The base of the mixins for sites; see `supported.site_class`."""

    _site_base = None

    #: See `Adapter.site_kinds`.
    kind = "product"

    #: The attribute that holds the layer's kernel; for the bias see `Folds`.
    kernel_name = "kernel"

    #: The attributes that a site computes by itself instead of calling the
    #: layer. A class that overrides one of them can't be a site.
    computes: tuple[str, ...] = (
        "call",
        "quantized_call",
        "kernel",
        "bias",
        "beta",
        "embeddings",
        "convolution_op",
    )

    @property
    def _dtype_of_shown_bias(self):
        return self.compute_dtype

    @classmethod
    def from_config(cls, config):
        # A config describes the layer without adapters.
        return cls._site_base.from_config(config)

    @property
    def trainable(self):
        return self._site_base.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        self._site_base.trainable.fset(self, value)
        adapters = getattr(self, "adapter", None)
        if not value or adapters is None:
            return
        # Only the active adapters are trained here: the base layer stays
        # frozen, the statistics of a normalization included.
        for variable in self.base_variables():
            variable.trainable = False
        if self.kind == "norm":
            _compat.set_layer_trainable_flag(self, False)
        adapters.train_active()

    def base_variables(self):
        """The layer's variables without those of adapters."""
        return _compat.owned_variables(self)

    def save_own_variables(self, store):
        # Keras stores the `kernel` property, which here is the merged kernel.
        with as_base_class(self):
            self.save_own_variables(store)

    def load_own_variables(self, store):
        # Keras assigns to the `bias` property, which here is the merged bias.
        with as_base_class(self):
            self.load_own_variables(store)

    def quantized_call(self, *args, **kwargs):
        # Keras calls this instead of `call`, but here `call` handles both.
        call = self.call
        if getattr(call, "__func__", None) is self._site_base.call:
            # Keras's calibration leaves the method of the layer's own class
            # behind as an attribute of the layer.
            return type(self).call(self, *args, **kwargs)
        return call(*args, **kwargs)

    def _lock_if_quantized(self):
        # A quantized product sets bias and activation aside. Meanwhile another
        # thread must not call the layer without them.
        if self.quantization_mode is None:
            return contextlib.nullcontext()
        return straight_through.QUANTIZED_CALL_LOCK

    def _is_training(self, training):
        if training is None:
            return _compat.training_phase(self)
        return training

    def _merged_or_base(self, kernel):
        """The value of the public `kernel` or `embeddings` property.

        A quantized kernel holds integers that only the layer can scale, so it
        is the base kernel.
        """
        adapters = [
            adapter
            for adapter in self.adapter.active()
            if adapter.adapts_kernel or adapter.adapts_output
        ]
        if not adapters:
            return kernel
        in_call = _compat.is_in_call()
        if in_call:
            self._check_read(adapters)
        if self.quantization_mode is not None:
            return kernel
        training = in_call and _compat.training_phase(self)
        merged = self.from_view(self._merged_kernel_view(kernel, training))
        return ops.cast(merged, self.compute_dtype)

    def _check_read(self, adapters):
        """Raises `ValueError` if the kernel can't show what adapters do.

        No call of this layer reads the property, so it is a layer around it
        that reads the kernel and computes with it.
        """
        if self.quantization_mode is not None:
            missed = (
                f"the adapter would be missed: a kernel in "
                f"'{self.quantization_mode}' can't show it. Do not quantize "
                "this layer"
            )
        elif self.kind != "lookup" and any(a.dropout for a in adapters):
            missed = (
                "the adapter's `dropout` would be missed. Inject an adapter "
                "without it"
            )
        else:
            return
        raise ValueError(
            f"The layer around '{self.path}' does not call it but reads its "
            f"kernel, so {missed}, or leave the layer out with `exclude`."
        )


def shown_bias(name):
    """A property for the attribute that holds a site's bias.

    A layer around the site may read it instead of calling the site, so it
    shows the adapted bias.
    """

    def read(self):
        # Keras's own call of a normalization reads it too.
        if self.adapter.per_example and self.kind != "norm":
            for adapter in self.adapter.active():
                per_example.check_bias(adapter)
        bias = self.merged_bias()
        if bias is None or bias is own_bias(self):
            return bias
        return ops.cast(bias, self._dtype_of_shown_bias)

    def write(self, value):
        vars(self)[name] = value

    return property(read, write)


def shown_kernel(name):
    """A property for a plain attribute that holds a site's kernel.

    It shows the adapted kernel, as `shown_bias` does for the bias.
    """

    def read(self):
        return self._merged_or_base(vars(self)[name])

    def write(self, value):
        vars(self)[name] = value

    return property(read, write)


def as_float(x, dtype):
    # Keras casts only floats. Products promote integers, but a delta that is
    # computed in integers would be 0.
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        return x
    return ops.cast(x, dtype)


def kernel_space_product(site, inputs, training):
    """The product with the merged kernel, or base and delta products apart."""
    active = site.adapter.active()
    if not active:
        return site._base_product(inputs)
    apart = training and any(
        adapter.dropout or adapter.step_counter is not None
        for adapter in active
    )
    if site.compute_dtype in ("float32", "float64") and not apart:
        view = site._merged_kernel_view(_compat.kernel_of(site))
        kernel = ops.cast(site.from_view(view), site.compute_dtype)
        return site._float_product(inputs, kernel)
    # In 16 bits `base + delta` would round a small delta away.
    y = site._base_product(inputs)
    for adapter in active:
        delta = site.from_view(_delta_view(site, adapter, training))
        y = y + site._float_product(
            adapter.drop(inputs, training), ops.cast(delta, inputs.dtype)
        )
    return y


def _delta_view(site, adapter, training):
    if not adapter.additive:
        kernel = _compat.unrounded(_compat.kernel_of(site))
        base = ops.cast(site.to_view(kernel), "float32")
        return adapter.merged(base, base, training) - base
    if training:
        return adapter.training_delta_kernel()
    return adapter.delta_kernel()


@contextlib.contextmanager
def as_base_class(*layers):
    """Gives layers their own classes back during a block.

    Keras's saving then sees the layers as they are without adapters. Only one
    thread may be in such a block: a second one would find the layers without
    their site's class and later restore that.
    """
    with _CLASS_LOCK:
        changed = [layer for layer in layers if own_class(layer)]
        classes = [type(layer) for layer in changed]
        try:
            for layer in changed:
                layer.__class__ = own_class(layer)
            yield
        finally:
            for layer, cls in zip(changed, classes):
                layer.__class__ = cls


def own_class(layer):
    """The class that a layer had before injection changed it, or `None`."""
    return getattr(type(layer), "_site_base", None)
