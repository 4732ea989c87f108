"""The names of layers in KerasHub's families, and the blocks they form."""

import keras

from keras_randadapt._types import Layers
from keras_randadapt.sites.linear import is_below

#: The names of query and value projections. Each of the last five is one
#: kernel for query, key and value together. The receptance is the query of
#: RWKV's time mixing.
QUERY_VALUE_NAMES = (
    "query",
    "value",
    "query_dense",
    "value_dense",
    "query_proj",
    "value_proj",
    "q_proj",
    "v_proj",
    "query_projector",
    "value_projector",
    "q_dense_layer",
    "v_dense_layer",
    "receptance",
    "query_key_value",
    "attention_qkv",
    "attention_qkv2",
    "qkv",
    "in_proj_qkv",
)

#: The names of key and value projections, including fused ones.
KEY_VALUE_NAMES = (
    "key",
    "value",
    "key_dense",
    "value_dense",
    "key_proj",
    "value_proj",
    "k_proj",
    "v_proj",
    "key_projector",
    "value_projector",
    "k_dense_layer",
    "v_dense_layer",
    "query_key_value",
    "attention_qkv",
    "attention_qkv2",
    "qkv",
    "in_proj_qkv",
)

#: Names that count only where all three are attributes of one layer.
_SHORT_NAMES = ("q", "k", "v")

#: The attributes of layers of these classes whose kernel is for query, key,
#: value and the feed-forward network together.
_FUSED_WITH_FEED_FORWARD = {"SingleStreamBlock": "linear1"}

#: Classes that have the names of attention and are feed-forward networks.
_NO_ATTENTION = ("RWKV7ChannelMix",)

#: The transformers of diffusion models. The encoders of text beside one serve
#: it as they are, so they are not what a default adapts.
_DENOISERS = ("MMDiT",)

#: The names of the output projections of attention.
_ATTENTION_OUTPUT_NAMES = (
    "attention_output",
    "attention_projection",
    "output_dense",
    "output_projector",
    "output_proj",
    "o_dense_layer",
    "o_proj",
    "out_proj",
    "output_layer",
    "proj",
)

#: From the last layer of KerasHub's feed-forward networks to the first. If the
#: first is gated, the gate has the same input.
_FEED_FORWARD_NAMES = {
    "feedforward_output_dense": "feedforward_intermediate_dense",
    "mlp_output_dense": "mlp_intermediate_dense",
    "dense_4h_to_h": "dense_h_to_4h",
    "output_projector": "input_projector",
    "ffw_linear": "ffw_gating",
    "mlp_dense_2": "mlp_dense_1",
    "dense_v": "dense_k",
}

#: The same for common names. They count only beside attention, since other
#: layers have these names too.
_COMMON_NAMES = {"down_proj": "up_proj", "fc2": "fc1", "dense_2": "dense_1"}


def attention_outputs(layers):
    """Addresses of the output projections of attention.

    Args:
        layers: dict from address to layer, see `addresses.layers_by_address`.

    Returns:
        list of addresses.
    """
    attention = query_and_value_projections(layers)
    return [
        address
        for group in _groups(layers).values()
        if not attention.isdisjoint(group.values())
        for name, address in group.items()
        if name in _ATTENTION_OUTPUT_NAMES
    ]


def feed_forwards(layers):
    """The feed-forward networks of KerasHub's transformers.

    Args:
        layers: dict from address to layer, see `addresses.layers_by_address`.

    Returns:
        dict from the address of a network's last layer to that of its first.
    """
    attention = attention_outputs(layers)
    found = {}
    for parent, group in _groups(layers).items():
        pairs = dict(_FEED_FORWARD_NAMES)
        if _is_in_block(parent, attention):
            pairs |= _COMMON_NAMES
        for last, first in pairs.items():
            pair = group.get(last), group.get(first)
            if None not in pair and _is_network(pair, layers):
                found[pair[0]] = pair[1]
    return found


def _is_network(pair, layers):
    for address in pair:
        linear = (keras.layers.Dense, keras.layers.EinsumDense)
        if not isinstance(layers[address], linear):
            return False
        # A shared expert's output is gated and added to that of other experts.
        if "shared_expert" in address:
            return False
        # Keras names unnamed layers `dense_1` and `dense_2` itself, so the
        # attribute must have the name too.
        name = layers[address].name
        attribute = address.rpartition("/")[2].lstrip("_")
        if name in ("dense_1", "dense_2") and attribute != name:
            return False
    return True


def _groups(layers):
    """Layers by their parent's address: dicts from name to address."""
    groups = {}
    for address, layer in layers.items():
        parent = address.rpartition("/")[0]
        groups.setdefault(parent, {}).setdefault(layer.name, address)
    return groups


def _is_in_block(parent, attention):
    """Whether there is attention beside a group of layers or one level up."""
    block = parent.rpartition("/")[0]
    return any(
        owner.rpartition("/")[2] != "layers"
        and any(address.startswith(f"{owner}/") for address in attention)
        for owner in (parent, block)
        if owner
    )


def keys_values_and_feed_forwards(layers: Layers) -> set[str]:
    """Addresses of key and value projections and feed-forward outputs.

    Args:
        layers: dict from address to layer, see `addresses.layers_by_address`.

    Returns:
        set of addresses.
    """
    found = _projections(layers, KEY_VALUE_NAMES, _SHORT_NAMES[1:])
    return found | _denoising(feed_forwards(layers), layers)


def query_and_value_projections(layers: Layers) -> set[str]:
    """Addresses of the query and value projections of KerasHub's families.

    Args:
        layers: dict from address to layer, see `addresses.layers_by_address`.

    Returns:
        set of addresses.
    """
    return _projections(layers, QUERY_VALUE_NAMES, _SHORT_NAMES[::2])


def _projections(layers, choices, short):
    # The address of a layer of a model does not tell the model's attribute.
    places = {layers.places[address]: layers[address] for address in layers}
    found = set()
    for address, layer in layers.items():
        parent = layers.places[address].rpartition("/")[0]
        owner = type(places.get(parent)).__name__
        attribute = layers.attribute(address)
        # Some families leave projections unnamed, but their attributes have
        # names.
        named = layer.name in choices or attribute in choices
        together = attribute in short and all(
            f"{parent}/{name}" in places for name in _SHORT_NAMES
        )
        fused = _FUSED_WITH_FEED_FORWARD.get(owner) == attribute
        if (named or together or fused) and owner not in _NO_ATTENTION:
            found.add(address)
    return _denoising(found, layers)


def _denoising(addresses, layers):
    """The addresses that are below the transformer of a diffusion model.

    They are all addresses if the model has no such transformer inside.
    """
    inside = [
        address
        for address, layer in layers.items()
        if type(layer).__name__ in _DENOISERS
    ]
    if not inside:
        return set(addresses)
    return {a for a in addresses if is_below(a, inside)}
