"""`Adapter`: the contract of a method, and the code that all methods share."""

import math
from collections.abc import Callable
from collections.abc import Collection
from typing import Any
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import argument_hints
from keras_randadapt.adapters.variables import AdapterVariables
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


class Adapter(AdapterVariables):
    """The trainable update of one kernel view.

    An adapter that a user creates is a *template*: `inject` clones it for each
    `Site` and builds the clones. A method overrides `build`, `delta`,
    `delta_kernel` and `get_config`; a method that is not additive overrides
    `adapt` or `merged` too. Everything else is written once, here and in
    `keras_randadapt.model`: casting, dropout, merging, files, several adapters
    on a site, and reports.

    Args:
        seed: int in `[0, 2**64)`. It determines the frozen bases, which no
            file stores, and the first values of the trainable weights.
        dropout: float in `[0, 1)`. The fraction of a site's inputs that the
            delta does not see in training. Embeddings ignore it, because
            their inputs are ids.
        dtype: The dtype of the trainable weights, whatever the model's policy.
            Products run in the site's compute dtype.
        name: Optional string.
    """

    #: The learning rate that the method's source trains with (AdamW).
    recommended_learning_rate: float | None = None

    #: Whether the update is a delta that does not depend on the base kernel.
    #: If not, `merged` depends on the base kernel and `delta` is undefined.
    additive = True

    #: Whether a file of the method is refused on other base weights.
    depends_on_base: bool = False

    #: Whether `merge` can fold the method into the site's own weights.
    mergeable = True

    #: The kinds of layers that may be sites: `"product"` (Dense and
    #: EinsumDense), `"convolution"`, `"lookup"` (embeddings) and `"norm"`
    #: (normalizations with an offset).
    site_kinds: tuple[str, ...] = ("product", "convolution", "lookup")

    #: Whether the method changes the kernel, the bias, and the site's output
    #: after bias and activation (see `adapt_output`).
    adapts_kernel = True
    adapts_bias = False
    adapts_output = False

    #: Whether `factors` costs less than the update; `DoRA` uses them if so.
    factors_are_cheap = True

    #: Optional function from a dict of structural addresses to layers to the
    #: addresses that `targets=None` means. Without it, `targets=None` means
    #: the query and value projections.
    default_targets: Callable[[Layers], Collection[str]] | None = None

    def __init__(
        self,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        dtype: str = "float32",
        name: str | None = None,
        **unknown: Any,
    ):
        if unknown:
            raise TypeError(
                argument_hints.unknown_arguments(type(self), Adapter, unknown)
            )
        super().__init__(dtype=dtype, name=name)
        self.seed = random.check_seed(seed)
        if not keras.backend.is_float_dtype(self.variable_dtype):
            raise ValueError(
                "`dtype` must be a floating-point dtype. "
                f"Received: dtype={dtype!r}"
            )
        self.dropout = arguments.check_scaling(dropout, "dropout")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                "`dropout` must be at least 0 and below 1. "
                f"Received: dropout={dropout}"
            )
        self.dropout_seed_generator = None

    # A method overrides the following.

    def build(self, site: Site) -> None:
        """Creates the trainable weights.

        Args:
            site: The `Site` that the adapter is for. It is `self.site` too.
        """
        raise NotImplementedError

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        """The update's product with inputs.

        Args:
            x: Tensor of shape `(..., input_dim)`. Its dtype is the dtype of
                the computation.
            training: Whether a training step is running.

        Returns:
            Tensor of shape `(..., output_dim)`, of `x`'s dtype.
        """
        raise NotImplementedError

    def delta_kernel(self) -> Tensor:
        """The update itself: `(input_dim, output_dim)`, float32."""
        raise NotImplementedError

    # A method may override the following.

    def check(self, site: Site) -> None:
        """Raises `ValueError` if the method can't take a site.

        Args:
            site: A `Site`.
        """

    def resolved(
        self,
        layers: Layers,
        addresses: Collection[str],
    ) -> Self:
        """The template whose arguments are resolved against a model.

        For example, an argument that means "the feed-forward networks" is
        replaced by their addresses.

        Args:
            layers: dict from structural address to layer.
            addresses: The sites' addresses.

        Returns:
            A template whose config a file can hold. By default it is `self`.

        Raises:
            ValueError: If an argument means nothing in this model.
        """
        return self

    def check_addresses(self, addresses: Collection[str]) -> None:
        """Raises `ValueError` if the template can't serve these sites.

        Args:
            addresses: Structural addresses of all sites of an injection.
        """

    def relocated(self, rename: Callable[[str], str]) -> Self:
        """The template for a model in which layers have other addresses.

        Args:
            rename: Function from an address to that of the same layer.
        """
        return self

    def training_delta_kernel(self) -> Tensor:
        """The update that a training step uses, if it is another one.

        Returns:
            See `delta_kernel`.
        """
        return self.delta_kernel()

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        """The product with the update's transpose, for tied output heads.

        Args:
            x: Tensor of shape `(..., output_dim)`.
            training: Whether a training step is running.

        Returns:
            Tensor of shape `(..., input_dim)`, of `x`'s dtype.
        """
        kernel = ops.cast(self.delta_kernel(), x.dtype)
        return ops.matmul(x, ops.transpose(kernel))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        """Rows of the update, for embeddings.

        Args:
            ids: Integer tensor of any shape, values in `[0, input_dim)`.
            dtype: The dtype of the computation.
            training: Whether a training step is running.

        Returns:
            Tensor of shape `ids.shape + (output_dim,)`, of dtype `dtype`.
        """
        return ops.cast(ops.take(self.delta_kernel(), ids, axis=0), dtype)

    def adapt(
        self,
        x: Tensor,
        linear: Product,
        training: bool | None = None,
    ) -> Tensor:
        """The site's output before bias and activation.

        Args:
            x: Tensor of shape `(..., input_dim)`.
            linear: A `Product`. Called with a tensor like `x`, it gives the
                product that this adapter adapts, `(..., output_dim)`.
                `linear.kernel()` is its kernel view, or `None` where there is
                none. `linear.base` is the product without any adapter.
            training: Whether a training step is running.

        Returns:
            Tensor of shape `(..., output_dim)`.
        """
        return linear(x) + self.delta(self.drop(x, training), training)

    def adapt_output(
        self, y: Tensor, x: Tensor, training: bool | None = None
    ) -> Tensor:
        """The adapted output of the site, if the method adapts outputs.

        Args:
            y: Tensor of shape `(..., output_dim)`: the site's output, bias and
                activation included, which other adapters may have changed.
            x: Tensor of shape `(..., source_dim)`: the input of the site, or
                of the layer that `sources` names.
            training: Whether a training step is running.

        Returns:
            Tensor like `y`.
        """
        raise NotImplementedError

    def sources(
        self,
        layers: Layers,
        addresses: Collection[str],
    ) -> dict[str, str]:
        """The layers whose inputs `adapt_output` gets instead of the sites'.

        Args:
            layers: dict from structural address to layer.
            addresses: The sites' addresses.

        Returns:
            dict from a site's address to that of a Dense or EinsumDense layer
            that is always called before it, on the same tokens.
        """
        return {}

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        """The adapted kernel: `(input_dim, output_dim)`, float32.

        Args:
            kernel: The kernel view, float32, which other adapters may have
                changed.
            base: The base kernel view, float32. A method that is not
                `additive` computes its update from `base` and adds it to
                `kernel`.
            training: Whether a training step is running.
        """
        if training:
            return kernel + self.training_delta_kernel()
        return kernel + self.delta_kernel()

    def merged_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        """The adapted bias, if the method adapts biases.

        Args:
            bias: float32 vector, the bias, which other adapters may have
                changed. Where each output has its own bias, it has
                `output_dim` numbers in the kernel view's order.
            base: float32 vector, the base bias.

        Returns:
            A vector of the shape of `bias`.
        """
        return bias

    def start_from(self, kernel: np.ndarray) -> None:
        """Sets the variables that depend on the base kernel.

        It is called when the adapter is attached.

        Args:
            kernel: float32 NumPy array, the base kernel view.
        """

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Two thin matrices whose product is the update, if there are any.

        Returns:
            `None`, or float32 tensors `(input_dim, rank)` and
            `(rank, output_dim)`. `to_lora` and `combine` take the rank from
            them, and `analysis` uses them to avoid forming the update.
        """
        return None

    def compacted(self) -> tuple[np.ndarray, np.ndarray, float]:
        """The update without the ranks that are off, for `compact`.

        Returns:
            `(a, b, scaling)`: NumPy arrays `(input_dim, rank)` and `(rank,
            output_dim)`, and a float. The update is `scaling * a b`. The rank
            may be 0.

        Raises:
            TypeError: If the method has nothing to leave out.
        """
        raise TypeError(
            f"`{type(self).__name__}` has no ranks to leave out: `compact` is "
            "for methods that switch ranks off, such as `AdaLoRA` and `SoRA`."
        )

    def truncated(self, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The update cut to its first ranks, for `truncate`.

        Args:
            rank: int, at least 1.

        Returns:
            See `compacted`.

        Raises:
            TypeError: If the method does not order its ranks.
        """
        raise TypeError(
            f"`{type(self).__name__}` does not order its ranks: `truncate` is "
            "for methods that train all smaller ranks too, such as `DyLoRA`."
        )

    # The following is the same for all methods.

    def for_site(self, site: Site, name: str) -> Self:
        """A clone of this template for a site, not yet built.

        Args:
            site: A `Site`.
            name: string, the clone's name.
        """
        clone = type(self).from_config(self.get_config())
        clone.name = name
        clone.site = site
        return clone

    def build_at(self, site: Site) -> None:
        """Builds the adapter for a site, with its own dropout state.

        Args:
            site: A `Site`.
        """
        self.site = site
        if self.dropout:
            with _compat.open_name_scope(self):
                self._prepare_dropout()
        self.build(site)

    @property
    def input_dim(self) -> int:
        """The number of rows of the site's kernel view."""
        return self.site.input_dim

    @property
    def output_dim(self) -> int:
        """The number of columns of the site's kernel view."""
        return self.site.output_dim

    def wrap_optimizer(
        self, optimizer: keras.optimizers.Optimizer, name: str
    ) -> keras.optimizers.Optimizer:
        """Wraps the optimizer that is to train this adapter.

        It is called on the template of each active adapter when the model is
        compiled and when its adapters change, so users call only `compile`
        and `fit`.

        Args:
            optimizer: A Keras optimizer. It may be wrapped by another active
                adapter already.
            name: string, the adapter's name in the model: its variables'
                paths contain `"/adapter/<name>/"`.

        Returns:
            An `OptimizerWrapper` around the optimizer, or the optimizer
            itself.
        """
        return optimizer

    def check_bias_of_outputs(self, site: Site) -> None:
        """Raises `ValueError` if a bias is not one number for each output.

        Args:
            site: A `Site`, with or without a bias.
        """
        if site.bias_shape is None:
            return
        size = math.prod(site.bias_shape)
        if size != site.output_dim:
            raise ValueError(
                f"`{type(self).__name__}` changes each output's bias by its "
                f"own amount, and '{site.address}' has a bias of {size} "
                f"numbers for {site.output_dim} outputs. Leave it out with "
                "`exclude`."
            )

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self.delta(self.drop(x, training), training)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.output_dim)

    def get_config(self) -> Config:
        # The config has no name and no trainable flag, so that two templates
        # of one method with equal arguments have equal configs, also in files.
        config = {"seed": self.seed, "dropout": self.dropout}
        if self.dtype != "float32":
            config["dtype"] = self.dtype
        return config

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in self.get_config().items()
        )
        return f"<{type(self).__name__} {arguments}>"
