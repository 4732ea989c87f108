"""LoRA: low-rank adaptation."""

import keras
from keras import ops

from keras_randadapt.adapters import base


@keras.saving.register_keras_serializable(package="keras_randadapt")
class LoRA(base.Adapter):
    """Low-rank adaptation: `delta = scaling * A B`.

    `A`, `(input_dim, rank)`, and `B`, `(rank, output_dim)`, are trained;
    `rank * (input_dim + output_dim)` weights a site. `B` starts at zero, so
    the delta does.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The rank of the delta.
        alpha: Optional float. `scaling` is `alpha / rank`, and `alpha` is
            `rank` by default, as in Keras's own `enable_lora`.
        scaling: Optional float, instead of `alpha`.
        a_initializer: The first values of `A`: `"kaiming_uniform"` (the
            default, `U(-1/sqrt(input_dim), 1/sqrt(input_dim))`), `"normal"`,
            `{"name": "normal", "stddev": 0.02}`, or a Keras initializer.
        b_initializer: The first values of `B`. Anything but zeros makes the
            adapted model differ from the base model from the start.
        regularizer: Optional Keras regularizer of both factors, such as
            `keras_randadapt.regularizers.Orthogonality(0.1)`. It is part of
            the model's losses, so plain `fit` applies it.
        site_ranks: Optional dict from structural addresses, the keys of
            `keras_randadapt.sites(model)`, to ranks of their own.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range, or if both `alpha` and
            `scaling` are given. At injection, if `rank` exceeds the smaller
            dimension of a kernel view: such a LoRA has more weights than the
            kernel it adapts.

    Example:

    ```python
    kra.inject(model, kra.LoRA(8), targets=["query", "value"])
    ```

    References:
        - [Hu et al., 2021](https://arxiv.org/abs/2106.09685), equation 3.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        a_initializer="kaiming_uniform",
        b_initializer="zeros",
        regularizer=None,
        site_ranks: dict[str, int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rank = base.check_rank(rank)
        self.site_ranks = {
            address: base.check_rank(one, f"site_ranks[{address!r}]")
            for address, one in (site_ranks or {}).items()
        }
        self.scaling = base.check_alpha(alpha, scaling, self.rank)
        self.a_initializer = base.check_initializer(
            a_initializer, "a_initializer"
        )
        self.b_initializer = base.check_initializer(
            b_initializer, "b_initializer"
        )
        self.regularizer = base.check_regularizer(regularizer)

    def for_site(self, address, name):
        clone = super().for_site(address, name)
        for key, rank in self.site_ranks.items():
            # A file of a task loads into its backbone, and the reverse: one
            # address then has a prefix more.
            if f"/{address}".endswith(f"/{key}") or f"/{key}".endswith(
                f"/{address}"
            ):
                clone.rank = rank
        return clone

    def check(self, kernel_view):
        base.check_rank_fits(self.rank, kernel_view)

    def build(self, kernel_view):
        self.check(kernel_view)
        self.input_dim, self.output_dim = kernel_view
        self.lora_a = self.add_trainable(
            "lora_a",
            (self.input_dim, self.rank),
            self._initializer_of_a(),
            self.regularizer,
        )
        self.lora_b = self.add_trainable(
            "lora_b",
            (self.rank, self.output_dim),
            self.b_initializer,
            self.regularizer,
        )
        self.prepare_dropout()

    def _initializer_of_a(self):
        return self.a_initializer

    def delta(self, x, training=None):
        a, b = self._pair(x.dtype, training)
        return ops.matmul(ops.matmul(x, a), b)

    def delta_transpose(self, x, training=None):
        a, b = self._pair(x.dtype, training)
        return ops.matmul(ops.matmul(x, ops.transpose(b)), ops.transpose(a))

    def lookup(self, ids, dtype, training=None):
        a, b = self._scaled(training)
        a = ops.cast(ops.take(a, ids, axis=0), dtype)
        return ops.matmul(a, ops.cast(b, dtype))

    def delta_kernel(self):
        return ops.matmul(*self.factors())

    def factors(self):
        return self._pair("float32")

    def _pair(self, dtype, training=None):
        return tuple(ops.cast(one, dtype) for one in self._scaled(training))

    def _scaled(self, training):
        """`A`, as it is, and `B` with the scale, float32."""
        # Scaling B instead of the output: one pass over the smaller tensor.
        b = ops.cast(self.lora_b, "float32")
        return self.lora_a, b if self.scaling == 1 else b * self.scaling

    def get_config(self):
        config = {
            "rank": self.rank,
            "scaling": self.scaling,
            "a_initializer": base.serialize_initializer(self.a_initializer),
            "b_initializer": base.serialize_initializer(self.b_initializer),
            **super().get_config(),
        }
        if self.site_ranks:
            config["site_ranks"] = dict(self.site_ranks)
        if self.regularizer is not None:
            config["regularizer"] = keras.regularizers.serialize(
                self.regularizer
            )
        return config
