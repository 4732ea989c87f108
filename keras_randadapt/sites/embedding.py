"""Adapted embeddings."""

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites import straight_through
from keras_randadapt.sites.kernel_view import KernelView
from keras_randadapt.sites.layer import AdaptedLayer


class AdaptedEmbedding(AdaptedLayer):
    """An `Embedding`, whose kernel view is `(vocabulary, features)`."""

    kind = "lookup"
    kernel_name = "embeddings"

    @property
    def embeddings(self):
        return self._merged_or_base(super().embeddings)

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
        self.adapter.check_examples(self, inputs)
        ids = inputs
        if keras.backend.standardize_dtype(ids.dtype) not in (
            "int32",
            "int64",
        ):
            ids = ops.cast(ids, "int32")
        if self.quantization_mode is None:
            y = ops.take(_compat.kernel_of(self), ids, axis=0)
            y = ops.cast(y, self.compute_dtype)
        else:
            with self._lock_if_quantized():
                y = self._site_base.quantized_call(self, ids)
        for adapter in self.adapter.active():
            y = y + adapter.lookup(ids, y.dtype, training)
        return y


class AdaptedReversibleEmbedding(AdaptedEmbedding):
    """A `ReversibleEmbedding`, adapted in both directions if it is tied.

    With `tie_weights=False` the reverse projection has its own matrix, which
    is not adapted.
    """

    def call(self, inputs, reverse=False):
        if reverse:
            return self._adapted_reverse(inputs)
        y = self._adapted_lookup(inputs)
        # Keras's layer sets its mask in `call`, which this method replaces.
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
            self.adapter.check_examples(self, inputs)
            x = ops.cast(inputs, logits.dtype)
            for adapter in self.adapter.active():
                logits = logits + adapter.delta_transpose(
                    adapter.drop(x, training), training
                )
        return straight_through.soft_capped(self, logits)

    def _base_reverse(self, inputs):
        if self.quantization_mode is not None:
            return straight_through.reverse_product(self, inputs)
        if self.tie_weights:
            kernel = ops.transpose(
                ops.convert_to_tensor(_compat.kernel_of(self))
            )
        else:
            kernel = ops.convert_to_tensor(self.reverse_embeddings)
        dtype = self.reverse_dtype or self.compute_dtype
        return ops.matmul(ops.cast(inputs, dtype), ops.cast(kernel, dtype))
