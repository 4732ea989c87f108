"""Bottleneck adapters: small networks between a model's layers."""

from collections.abc import Collection
from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt._types import Layers
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import thin_product
from keras_randadapt.sites import kerashub
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site

#: `(reduction, activation, scaling)` with which each placement's paper trains.
_DEFAULTS = {
    "houlsby": (16, "swish", 1.0),
    "pfeiffer": (16, "relu", 1.0),
    "parallel": (2, "relu", 4.0),
}


@keras.saving.register_keras_serializable(package="keras_randadapt")
class Bottleneck(base.Adapter):
    """A small network with one narrow hidden layer, beside frozen layers.

    The output `h` of a site, after bias and activation, becomes `h + scaling *
    (U f(D z + d) + u)`, with `D` of shape `(rank, dim of z)`, `U` of shape
    `(dim of h, rank)` and an activation `f`. The placement determines `z` and
    which layers are sites:

    - `"houlsby"`: `z = h`, behind attention and behind the feed-forward
      network of every transformer block, before dropout, the residual sum and
      the normalization. Each site has `2 rank dim + rank + dim` weights.
    - `"pfeiffer"`: `z = h`, behind the feed-forward networks alone.
    - `"parallel"`: `z` is the input of the feed-forward network, so that the
      two run side by side.

    With `targets=None` these layers are found in KerasHub's transformers,
    except in mixtures of experts. Layers that `targets` names are sites in any
    case; with `"parallel"`, if such a layer does not end a known feed-forward
    network, `z` is the layer's own input.

    `U` and `u` start at zero, so the update starts at zero. It is not linear
    and can't be merged; `export` and whole-model files hold it. If another
    layer computes a site's activation, the update comes before the activation.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        rank: Optional int. The size of the hidden layer.
        placement: `"houlsby"`, `"pfeiffer"` or `"parallel"`.
        reduction: Optional int. The size of the hidden layer is the size of
            the site's output divided by it. The default is 16, or 2 for
            `"parallel"`.
        activation: Optional name of a Keras activation. The default is
            `"swish"` for `"houlsby"` and `"relu"` otherwise.
        scaling: Optional float. A constant factor. The default is 4 for
            `"parallel"` and 1 otherwise.
        down_initializer: The first values of `D`. The default is `{"name":
            "normal", "stddev": 0.02}`, or `"kaiming_uniform"` for
            `"parallel"`. See `LoRA`.
        up_initializer: The first values of `U`. With values other than zeros,
            such as `{"name": "normal", "stddev": 0.02}`, the adapted model
            does not start as the base model.
        seed: int. It determines the first values.
        dropout: float. The fraction of `z` that the adapter does not see in
            training. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` or `reduction` is no integer.
        ValueError: If an argument is out of range, or if both `rank` and
            `reduction` are given. At injection, if a site is no matrix
            product, if `targets=None` finds no feed-forward network, or if a
            parallel one is used several times in a functional model's graph.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.Bottleneck(48, placement="pfeiffer"),
        keep_trainable="logits",
    )
    ```

    References:
        - Houlsby et al., "Parameter-Efficient Transfer Learning for NLP",
          ICML 2019, section 2.1.
        - Pfeiffer et al., "AdapterFusion", EACL 2021, appendix A.2.
        - He et al., "Towards a Unified View of Parameter-Efficient Transfer
          Learning", ICLR 2022, table 1 (parallel adapter).
    """

    recommended_learning_rate = 1e-3
    additive = False
    mergeable = False
    site_kinds = ("product",)
    adapts_kernel = False
    adapts_output = True

    def __init__(
        self,
        rank: int | None = None,
        *,
        placement: str = "houlsby",
        reduction: int | None = None,
        activation: str | None = None,
        scaling: float | None = None,
        down_initializer: Initializer | None = None,
        up_initializer: Initializer = "zeros",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.placement = arguments.check_choice(
            placement, tuple(_DEFAULTS), "placement"
        )
        default: dict[str, Any] = dict(
            zip(("reduction", "activation", "scaling"), _DEFAULTS[placement])
        )
        if rank is not None and reduction is not None:
            raise ValueError(
                "`rank` and `reduction` say the same thing (rank = size of the "
                "output / reduction): give one of them. "
                f"Received: rank={rank}, reduction={reduction}"
            )
        self.rank = None if rank is None else arguments.check_rank(rank)
        if rank is None and reduction is None:
            reduction = default["reduction"]
        self.reduction = (
            None
            if reduction is None
            else arguments.check_rank(reduction, "reduction")
        )
        self.activation = _check_activation(
            default["activation"] if activation is None else activation
        )
        self.scaling = arguments.check_scaling(
            default["scaling"] if scaling is None else scaling
        )
        if down_initializer is None:
            down_initializer = (
                "kaiming_uniform"
                if placement == "parallel"
                else {"name": "normal", "stddev": 0.02}
            )
        self.down_initializer = arguments.check_initializer(
            down_initializer, "down_initializer"
        )
        self.up_initializer = arguments.check_initializer(
            up_initializer, "up_initializer"
        )

    def default_targets(self, layers: Layers) -> Collection[str]:
        networks = kerashub.feed_forwards(layers)
        if self.placement != "houlsby" or not networks:
            return networks
        return {*networks, *kerashub.attention_outputs(layers)}

    def sources(
        self, layers: Layers, addresses: Collection[str]
    ) -> dict[str, str]:
        if self.placement != "parallel":
            return {}
        networks = kerashub.feed_forwards(layers)
        return {a: networks[a] for a in addresses if a in networks}

    def build(self, site: Site) -> None:
        parallel = self.placement == "parallel"
        dim = site.source_dim if parallel else self.output_dim
        hidden_dim = self.rank or max(1, self.output_dim // self.reduction)
        self.down = self.add_trainable(
            "down", (dim, hidden_dim), self.down_initializer
        )
        self.down_bias = self.add_trainable("down_bias", (hidden_dim,), "zeros")
        self.up = self.add_trainable(
            "up", (hidden_dim, self.output_dim), self.up_initializer
        )
        self.up_bias = self.add_trainable(
            "up_bias", (self.output_dim,), "zeros"
        )

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        return linear(x)

    def adapt_output(
        self, y: Tensor, x: Tensor, training: bool | None = None
    ) -> Tensor:
        z = ops.cast(x, y.dtype) if self.placement == "parallel" else y
        hidden = _affine(
            self.drop(z, training), self.down, self.down_bias, training
        )
        activation = keras.activations.get(self.activation)
        update = _affine(activation(hidden), self.up, self.up_bias)
        return y + self.scaling * update

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        raise ValueError(
            f"'{self.path}' is a `Bottleneck`: it computes something behind "
            "the layer that its kernel does not show. Code that reads the "
            "kernel, in the model or in an analysis, would miss it."
        )

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "placement": self.placement,
            "reduction": self.reduction,
            "activation": self.activation,
            "scaling": self.scaling,
            "down_initializer": arguments.serialize_initializer(
                self.down_initializer
            ),
            "up_initializer": arguments.serialize_initializer(
                self.up_initializer
            ),
            **super().get_config(),
        }


def _check_activation(activation):
    message = (
        "`activation` must be a Keras activation without weights or arguments, "
        f"or its name, such as 'relu'. Received: activation={activation!r}"
    )
    try:
        name = keras.activations.serialize(keras.activations.get(activation))
        # The name must be enough to find the activation again: a function
        # that is not Keras's has no such name.
        keras.activations.get(name)
    except (ValueError, TypeError) as error:
        raise ValueError(message) from error
    if not isinstance(name, str):
        raise ValueError(message)
    return name


def _affine(x, matrix, bias, training=None):
    y = thin_product(x, ops.cast(matrix, x.dtype), training)
    return y + ops.cast(bias, x.dtype)
