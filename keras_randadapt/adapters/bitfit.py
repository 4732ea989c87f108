"""BitFit: it trains the biases of a model and nothing else."""

import math
from collections.abc import Callable

import keras
from keras import ops

from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


def _with_bias(layers: Layers) -> list[str]:
    return [
        address
        for address, layer in layers.items()
        if getattr(layer, "bias", None) is not None
        or getattr(layer, "beta", None) is not None
    ]


@keras.saving.register_keras_serializable(package="keras_randadapt")
class BitFit(base.Adapter):
    """Trains biases: those of layers and the offsets of normalizations.

    A site's bias `b` becomes `b + d`, with a trained `d` that starts at zero.
    Kernels do not change. A site has as many weights as its bias.

    With `targets=None` every layer with a bias is a site: Dense, EinsumDense
    and convolutions, LayerNormalization, BatchNormalization and
    GroupNormalization. If `targets` names layers without a bias, they are
    left out with a warning. Models of the Llama family have no biases.

    Train it at a learning rate of 1e-4 to 1e-2 (AdamW).

    Args:
        dtype: The dtype of `d`. See `Adapter`.
        name: Optional string.

    Raises:
        ValueError: At injection, if no layer that `targets` means has a bias.

    Example:

    ```python
    kra.inject(classifier, kra.BitFit(), keep_trainable="logits")
    ```

    References:
        - Ben Zaken, Goldberg and Ravfogel, "BitFit", ACL 2022, section 3.
    """

    recommended_learning_rate = 1e-3
    site_kinds = ("product", "convolution", "norm")
    adapts_kernel = False
    adapts_bias = True
    default_targets = staticmethod(_with_bias)

    def __init__(self, *, dtype: str = "float32", name: str | None = None):
        super().__init__(dtype=dtype, name=name)

    def build(self, site: Site) -> None:
        self.bias_delta = self.add_trainable(
            "bias_delta", (math.prod(site.bias_shape),), "zeros"
        )

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        return linear(x)

    def adapt_per_example(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        y = product(x)
        return y + of_examples(weights["bias_delta"], y.dtype)

    def bias_per_example(self, weights: Weights) -> Tensor:
        return weights["bias_delta"]

    def delta_kernel(self) -> Tensor:
        return ops.zeros((self.input_dim, self.output_dim))

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        return kernel

    def merged_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        return bias + ops.cast(self.bias_delta, "float32")

    def get_config(self) -> Config:
        return {} if self.dtype == "float32" else {"dtype": self.dtype}
