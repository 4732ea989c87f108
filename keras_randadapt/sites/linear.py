"""The layers that `"all-linear"` means, and the kernels without a site."""

import math
import re

import keras

from keras_randadapt import _compat

#: The names of layers that choose experts. Adapting them would change the
#: routing of every token. Gemma3n's router mixes copies of one stream.
_ROUTER = re.compile(
    r"(?<!modality_)router|routing|sparse_feedforward_gate_dense"
)

#: Classes that "all-linear" does not mean, whoever their kernels are for.
_NOT_LINEAR = (
    keras.layers.Embedding,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)

#: The names of weights that are no kernels, and of those that are no factors
#: of a product.
_NO_KERNEL = re.compile("bias|moving_|(kernel|embeddings)_(scale|zero)")
_NO_MATRIX = re.compile(f"{_NO_KERNEL.pattern}|embedding")

_NORMALIZATIONS = (
    keras.layers.LayerNormalization,
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.SpectralNormalization,
    keras.layers.UnitNormalization,
)


def is_linear(layer):
    """Whether a layer is a Dense or an EinsumDense layer."""
    return isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


def is_normalization(layer):
    """Whether a layer is one of Keras's normalizations."""
    return isinstance(layer, _NORMALIZATIONS)


def steers_experts(address, layers):
    """Whether a layer chooses experts or weighs one, by its name and shape.

    A router is known by its name or its parent's. A gate has one output.

    Args:
        address: A structural address.
        layers: See `addresses.layers_by_address`.
    """
    layer = layers[address]
    names = [*(layer.path or "").split("/")[-2:], layers.attribute(address)]
    if any(_ROUTER.search(name) for name in names):
        return True
    return getattr(layer, "units", None) == 1 and any(
        "gate" in name for name in names
    )


def kernel_parameters(layer, tables=True):
    """The number of weights in a layer's own kernels, quantized or not.

    In a layer of an unknown class, a kernel is a weight with two axes or more
    that are longer than 1, such as a stack of experts, and no bias.

    Args:
        layer: A layer.
        tables: Whether embeddings count, which are looked up.
    """
    if not layer.built:
        return 0
    if not tables and _compat.holds_table(layer):
        return 0
    kernel = _compat.kernel_of(layer)
    if kernel is not None:
        return math.prod(kernel.shape)
    no_kernel = _NO_KERNEL if tables else _NO_MATRIX
    return sum(
        math.prod(variable.shape)
        for variable in _compat.owned_variables(layer)
        if sum(size > 1 for size in variable.shape) > 1
        and not no_kernel.search(variable.name)
    )


def left_out_of_all_linear(layers, chosen, kept):
    """The layers with kernels that `"all-linear"` could mean and leaves out.

    They are routers and gates of experts, layers whose class can't be adapted,
    such as stacks of experts, and others that were not chosen.

    Args:
        layers: See `addresses.layers_by_address`.
        chosen: The addresses of the sites.
        kept: The addresses of the layers that stay trainable.

    Returns:
        list of addresses.
    """
    # Kernels of one layer are told apart once some of them are chosen.
    parted = {
        address
        for address, kernels in layers.kernels.items()
        if not set(kernels).isdisjoint(chosen)
    }
    whole = set().union(
        *(k for a, k in layers.kernels.items() if a not in parted)
    )
    return [
        address
        for address, layer in layers.items()
        if address not in chosen
        and address not in parted
        and address not in whole
        and not is_below(address, kept)
        and not isinstance(layer, _NOT_LINEAR)
        and not is_normalization(layer)
        and kernel_parameters(layer, tables=False)
    ]


def is_below(address, parents):
    """Whether an address is one of `parents` or below one."""
    return any(
        address == parent or address.startswith(f"{parent}/")
        for parent in parents
    )
