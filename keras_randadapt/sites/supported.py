"""The layer classes that can be sites, and functions of such layers.

The functions take layers with and without adapters. `selection` chooses the
sites of a model, and `layer`, `dense`, `convolution`, `embedding` and
`normalization` have their computation.
"""

import functools

import keras

from keras_randadapt import _compat
from keras_randadapt.sites import convolution
from keras_randadapt.sites import dense
from keras_randadapt.sites import embedding
from keras_randadapt.sites import experts
from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import normalization
from keras_randadapt.sites import recurrent
from keras_randadapt.sites import separable
from keras_randadapt.sites import table
from keras_randadapt.sites.kernel_site import KernelSite
from keras_randadapt.sites.kernel_site import layer_of
from keras_randadapt.sites.site import Site

#: Quantization modes whose layers can be sites.
QUANTIZATION_MODES = (None, "int8", "int4", "float8", "gptq", "awq")

_SITE_CLASSES = {
    keras.layers.Dense: dense.AdaptedDense,
    keras.layers.EinsumDense: dense.AdaptedEinsumDense,
    keras.layers.Conv1D: convolution.AdaptedConv,
    keras.layers.Conv2D: convolution.AdaptedConv,
    keras.layers.Conv3D: convolution.AdaptedConv,
    keras.layers.DepthwiseConv1D: convolution.AdaptedDepthwiseConv,
    keras.layers.DepthwiseConv2D: convolution.AdaptedDepthwiseConv,
    keras.layers.Conv1DTranspose: convolution.AdaptedConvTranspose,
    keras.layers.Conv2DTranspose: convolution.AdaptedConvTranspose,
    keras.layers.Conv3DTranspose: convolution.AdaptedConvTranspose,
    keras.layers.Embedding: embedding.AdaptedEmbedding,
    keras.layers.ReversibleEmbedding: embedding.AdaptedReversibleEmbedding,
    keras.layers.LayerNormalization: normalization.AdaptedNorm,
    keras.layers.BatchNormalization: normalization.AdaptedNorm,
    keras.layers.GroupNormalization: normalization.AdaptedNorm,
}

#: Functions of a built layer to the `KernelSite`s of its kernels. The list is
#: empty for layers that are not of the function's kind.
_SEVERAL_KERNELS = (
    experts.sites_of,
    separable.sites_of,
    recurrent.sites_of,
)

#: The kinds with a kernel, which most methods take; see `Adapter.site_kinds`.
KERNEL_KINDS = ("product", "convolution", "lookup")


def supported_class(layer, kinds=KERNEL_KINDS):
    """The supported class of these kinds whose computation a layer has.

    A user's subclass of a supported class counts if it does not override the
    computation. If it does, this library does not know its computation, and
    the result is `None`, as for all other layers. The supported class of a
    `KernelSite` is that of its layer.
    """
    if isinstance(layer, KernelSite):
        own = layer_lib.own_class(layer.layer) or type(layer.layer)
        return own if layer.kind in kinds else None
    own = layer_lib.own_class(layer) or type(layer)
    cls = _base_of(own)
    if cls is None or overridden(own, cls) or _mixin(cls).kind not in kinds:
        return None
    return cls


def kernel_sites(layer):
    """The sites of a layer with several kernels; none for all other layers.

    Args:
        layer: A layer, with or without adapters.

    Returns:
        list of `KernelSite`s.
    """
    if not layer.built:
        return []
    return next(filter(None, (f(layer) for f in _SEVERAL_KERNELS)), [])


def class_names(kinds):
    """The names of the Keras classes of these kinds, and of KerasHub's."""
    names = [c.__name__ for c, s in _SITE_CLASSES.items() if s.kind in kinds]
    return names + [*_compat.TABLES] * (table.AdaptedTable.kind in kinds)


def kind_of(layer):
    """The kind of a layer of a supported class."""
    return _mixin(type(layer)).kind


def is_matrix_product(layer):
    """Whether a layer is one matrix product that maps tokens to tokens.

    This is true of every Dense layer and of nearly all EinsumDense layers.
    """
    if isinstance(layer, keras.layers.EinsumDense):
        return dense.einsum_plan_of(layer).is_matrix_product
    return isinstance(layer, keras.layers.Dense)


def overridden(own, cls=None):
    """The names that `own` overrides of what a site computes by itself."""
    if cls is None:
        cls = _base_of(own)
    return [
        name
        for name in _mixin(cls).computes
        if getattr(own, name, None) is not getattr(cls, name, None)
    ]


def looks_supported(layer, any_kind=False):
    """Whether a layer is of a supported class, even if it overrides `call`.

    Args:
        layer: A layer.
        any_kind: Whether classes without a kernel count too.
    """
    return _base_of(type(layer)) is not None and (
        any_kind or kind_of(layer) in KERNEL_KINDS
    )


def may_have_sublayers(layer):
    """Whether there may be layers below a layer, apart from its adapters."""
    if not looks_supported(layer):
        return True
    return issubclass(_mixin(type(layer)), table.AdaptedTable)


def kernel_variable(layer):
    """The kernel that a merge changes, or `None` for normalizations.

    Args:
        layer: A layer of a supported class or a `KernelSite`.
    """
    return _compat.kernel_of(layer)


def bias_variable(layer):
    """The bias that a merge changes, or `None`."""
    return vars(layer).get(_mixin(type(layer)).bias_name)


def view_of(layer):
    """The `KernelView` of a layer of a supported class."""
    return _mixin(type(layer)).kernel_view.fget(layer)


def site_of(address, layer, source=None, number=0):
    """The `Site` of a built layer of a supported class.

    Args:
        address: The layer's structural address.
        layer: The layer, with or without adapters.
        source: The layer whose input `Adapter.adapt_output` gets; `layer`
            by default.
        number: int. The place of the site among those of the injection.
    """
    view = view_of(layer)
    bias = bias_variable(layer)
    mixin = _mixin(type(layer))
    channels = mixin.channels_of_view
    if isinstance(channels, property):
        channels = channels.fget(layer)
    return Site(
        input_dim=view.input_dim,
        output_dim=view.output_dim,
        address=address,
        kernel_name=(
            layer.kernel_name
            if isinstance(layer, KernelSite)
            else mixin.kernel_name
        ),
        stack=getattr(layer, "stack", None),
        bias_shape=None if bias is None else tuple(bias.shape),
        source_dim=view_of(layer if source is None else source).input_dim,
        number=number,
        input_channels=channels[0],
        output_channels=channels[1],
    )


def view_shape(layer):
    """The shape of a kernel view as an array, the stacked axis included."""
    stack = getattr(layer, "stack", None)
    return (*(() if stack is None else (stack,)), *view_of(layer))


def shape_of(layer):
    """The shape of a layer's kernel view as files spell it; see `Site`."""
    view = view_of(layer)
    stack = getattr(layer, "stack", None)
    return Site(
        input_dim=view.input_dim, output_dim=view.output_dim, stack=stack
    ).shape


def as_view(layer, kernel):
    """The kernel view of a kernel of `layer`."""
    return _mixin(type(layer)).to_view(layer, kernel)


def from_view(layer, view):
    """The kernel of `layer` with this kernel view."""
    return _mixin(type(layer)).from_view(layer, view)


def check_site(address, layer):
    """Raises `ValueError` if a layer of a supported class can't be a site."""
    if not layer.built:
        raise ValueError(
            f"Layer '{layer.name}' at '{address}' has no weights yet: the "
            "model never called it. Leave it out with `exclude`."
        )
    if has_keras_lora(layer):
        raise ValueError(
            f"Layer '{layer.name}' at '{address}' has Keras's own LoRA "
            "enabled. Build the model anew without `enable_lora`, or leave "
            "the layer out with `exclude`."
        )
    if layer.quantization_mode not in QUANTIZATION_MODES:
        raise ValueError(
            f"Layer '{layer.name}' at '{address}' is quantized to "
            f"'{layer.quantization_mode}'. Adapters attach to float kernels "
            f"and to those in {QUANTIZATION_MODES[1:]}."
        )
    if isinstance(layer, KernelSite) and layer.quantization_mode is not None:
        raise ValueError(
            f"Layer '{layer.layer.name}' at '{address}' is quantized to "
            f"'{layer.quantization_mode}'. Adapters attach to float kernels "
            "of a layer with several kernels. Quantize the model without this "
            "layer, by `filters` of `quantize`, or leave it out with "
            "`exclude`."
        )
    whole = layer_of(layer)
    if "adapter" in vars(whole) and not isinstance(
        whole, layer_lib.AdaptedLayer
    ):
        raise ValueError(
            f"Layer '{layer.name}' at '{address}' has an attribute `adapter` "
            "of its own, but adapters are stored under this name. Rename it."
        )
    if isinstance(layer, keras.layers.EinsumDense):
        plan = dense.einsum_plan_of(layer)
        if layer.quantization_mode is not None and not plan.is_matrix_product:
            raise ValueError(
                f"Layer '{layer.name}' at '{address}' is quantized to "
                f"'{layer.quantization_mode}', and its equation "
                f"'{layer.equation}' is no plain matrix product: adapting it "
                "takes a float kernel."
            )


def has_keras_lora(layer):
    """Whether Keras's own LoRA is enabled on a layer."""
    return bool(
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "dora_enabled", False)
    )


def site_class(base, mixin=None):
    """The class of a site whose layer has the class `base`.

    It keeps the base's name, because weight files contain class names, and its
    module, because configs contain it.

    Args:
        base: The layer's own class.
        mixin: Optional `KernelSite.layer_mixin`, for a layer with several
            kernels.
    """
    return _site_class(base, mixin or _mixin(base))


def _base_of(cls):
    """The class among the bases of `cls` that has a mixin, or `None`."""
    for one in cls.__mro__:
        if one in _SITE_CLASSES or _compat.table_name(one) is not None:
            return one
    return None


def _mixin(cls):
    if issubclass(cls, KernelSite):
        return cls
    base = _base_of(cls)
    if base in _SITE_CLASSES:
        return _SITE_CLASSES[base]
    return table.adapted_table(_compat.table_name(base))


@functools.lru_cache(maxsize=None)
def _site_class(base, mixin):
    return type(
        base.__name__,
        (mixin, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_site_base": base,
        },
    )
