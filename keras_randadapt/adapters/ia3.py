"""IA3: a scale for each activation."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from typing import Self

import keras
from keras import ops

from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Rename
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.sites import kerashub
from keras_randadapt.sites import selection
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class IA3(base.Adapter):
    """Infused adapter by inhibiting and amplifying inner activations.

    A trained vector `l`, which starts at ones, rescales the output of a layer,
    `y = l * (W x + b)`. In the last layer of a feed-forward network it
    rescales the input instead, `y = W (l * x) + b`. A site has `output_dim`
    weights, or `input_dim` in the second form. A merge scales the columns of
    the kernel view and the bias, or the rows of the kernel view.

    With `targets=None` the key and value projections of KerasHub's
    transformers and the last layers of their feed-forward networks are the
    sites. In a convolution, `l` has a value for each filter; in the second
    form, it has a value for each channel of a group.

    The update depends on the base kernel: beside other active adapters, it
    adds `adapted kernel - W`.

    Train it at a learning rate of 3e-3 (AdamW).

    Args:
        feedforward: The sites that have the second form, which scales the
            input: a name or a list of names, as for `targets` of `inject`.
            `None` means the last layers of KerasHub's feed-forward networks,
            and an empty list means none.
        dtype: The dtype of `l`. See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `feedforward` is of another type.
        ValueError: At injection, if a name in `feedforward` matches no site,
            if a site is an embedding or a normalization, or if the size of a
            bias is not the layer's number of outputs.

    Example:

    ```python
    kra.inject(classifier, kra.IA3(), keep_trainable="logits")
    ```

    References:
        - Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and
          Cheaper than In-Context Learning", NeurIPS 2022, section 3.3.
    """

    recommended_learning_rate = 3e-3
    additive = False
    site_kinds = ("product", "convolution")
    adapts_bias = True

    default_targets = staticmethod(kerashub.keys_values_and_feed_forwards)

    def __init__(
        self,
        *,
        feedforward: str | Sequence[str] | None = None,
        dtype: str = "float32",
        name: str | None = None,
    ):
        super().__init__(dtype=dtype, name=name)
        if isinstance(feedforward, str):
            feedforward = [feedforward]
        names = () if feedforward is None else feedforward
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(one, str) for one in names
        ):
            raise TypeError(
                "`feedforward` must be a name, a list of names or `None`. "
                f"Received: feedforward={feedforward!r}"
            )
        self.feedforward = None if feedforward is None else list(names)

    def resolved(self, layers: Layers, addresses: Collection[str]) -> Self:
        if self.feedforward is None:
            meant = kerashub.feed_forwards(layers)
        elif not self.feedforward:
            return self
        else:
            meant = selection.match(layers, self.feedforward, "feedforward")
        chosen = [address for address in addresses if address in meant]
        if self.feedforward and not chosen:
            raise ValueError(
                "`feedforward` names no layer that `targets` means. "
                f"Received: feedforward={self.feedforward}"
            )
        return self._with(chosen)

    def relocated(self, rename: Rename) -> Self:
        return self._with(list(map(rename, self.feedforward or [])))

    def _with(self, feedforward):
        return type(self)(
            feedforward=feedforward, dtype=self.dtype, name=self.name
        )

    def build(self, site: Site) -> None:
        self._scales_input = site.address in (self.feedforward or ())
        # The second form does not change the bias.
        self.adapts_bias = not self._scales_input
        if self.adapts_bias and site.output_channels == site.output_dim:
            self.check_bias_of_outputs(site)
        dim = (
            site.input_channels if self._scales_input else site.output_channels
        )
        self.ia3_l = self.add_trainable("ia3_l", (dim,), "ones")

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        change = ops.cast(self._change(), x.dtype)
        if self._scales_input:
            return linear(x) + linear.base(x * change)
        y = linear(x)
        base_y = y if linear.base is linear else linear.base(x)
        return y + base_y * ops.cast(change, y.dtype)

    def adapt_per_example(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        change = weights["ia3_l"] - 1.0
        if self._scales_input:
            return product(x) + product(x * of_examples(change, x.dtype))
        y = product(x)
        update = y * of_examples(change, y.dtype)
        if bias is not None:
            update = update + of_examples(change * bias, y.dtype)
        return y + update

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        change = self._change()
        # A convolution's kernel view has a row for each position of the
        # window and channel, and that of a transposed one such columns.
        # Channels vary fastest.
        if not self._scales_input:
            positions = self.output_dim // change.shape[0]
            return kernel + base * ops.tile(change, [positions])
        positions = self.input_dim // change.shape[0]
        rows = ops.tile(change, [positions])
        return kernel + base * ops.expand_dims(rows, -1)

    def merged_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        return bias + base * self._change()

    def _change(self):
        """`l - 1`, float32, since in 16 bits `l` near 1 would be rounded."""
        return ops.cast(self.ia3_l, "float32") - 1.0

    def get_config(self) -> Config:
        config = {"feedforward": self.feedforward}
        if self.dtype != "float32":
            config["dtype"] = self.dtype
        return config
