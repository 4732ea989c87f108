"""Which layers a `targets`, `exclude` or `keep_trainable` argument means."""

import difflib
import re

import keras

from keras_randadapt import _compat
from keras_randadapt import adapter_stack
from keras_randadapt import site_layers

#: The names that query and value projections go by in KerasHub's families;
#: the last four are one kernel for query, key and value together.
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
    "query_key_value",
    "attention_qkv",
    "qkv",
    "in_proj_qkv",
)

#: What their output projections are called beside them.
_ATTENTION_OUTPUT_NAMES = (
    "attention_output",
    "attention_projection",
    "output_dense",
    "output_projector",
    "output_proj",
    "o_dense_layer",
    "o_proj",
    "out_proj",
    "proj",
)

#: The first and the last layer of KerasHub's feed-forward networks. Where the
#: first is gated, the gate has the same input.
_FEED_FORWARD_NAMES = {
    "feedforward_output_dense": "feedforward_intermediate_dense",
    "mlp_output_dense": "mlp_intermediate_dense",
    "dense_4h_to_h": "dense_h_to_4h",
    "output_projector": "input_projector",
    "ffw_linear": "ffw_gating",
    "mlp_dense_2": "mlp_dense_1",
}

#: Others that are called so count beside attention only.
_COMMON_NAMES = {"down_proj": "up_proj", "fc2": "fc1", "dense_2": "dense_1"}

#: Layers that choose experts: adapting them shifts every token's routing.
_ROUTER = re.compile(r"router|sparse_feedforward_gate_dense")


class Layers(dict):
    """Every layer below a model, by structural address.

    Attributes:
        places: dict from address to the same path of names: in a container an
            address counts classes, and what is `dense_1` there may well be
            called `encoder`, and another layer `dense_1`.
    """

    def __init__(self):
        super().__init__()
        self.places = {}

    def attribute(self, address):
        """The attribute that holds a layer, or its name in a container."""
        return self.places[address].rpartition("/")[2].lstrip("_")


def layers_by_address(model):
    """Every layer below `model`, by structural address.

    The address is the path that the layer's weights have inside a
    `.weights.h5` file: made of attribute names and class names, so equal on
    every backend and in every run, where `layer.path` is neither unique nor
    stable.

    Args:
        model: A built Keras model.

    Returns:
        `Layers`, in the order of Keras's weight files. A layer used in several
        places is listed once, at the first.
    """
    found = Layers()
    visited = {id(model)}
    _walk_layer(model, "", "", found, visited)
    return found


def _join(path, name):
    return f"{path}/{name}" if path else name


def _walk_layer(layer, address, place, found, visited):
    pairs = list(_compat.walk_attributes(layer))
    # Where a model lists its layers, those have attributes too.
    names = {
        id(value): _join(place, attribute)
        for attribute, value in pairs
        if isinstance(value, keras.layers.Layer)
    }
    for attribute, value in pairs:
        paths = _join(address, attribute), _join(place, attribute)
        listed = attribute == "layers" and isinstance(layer, keras.Model)
        _visit(value, *paths, found, visited, (), names if listed else {})


def _visit(value, path, place, found, visited, containers, names):
    if isinstance(value, keras.layers.Layer):
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, adapter_stack.AdapterStack):
            return
        found[path] = value
        found.places[path] = place
        # Nothing below these is a layer, and looking at every attribute of
        # every one would unpack quantized kernels.
        if not site_layers.looks_supported(value):
            _walk_layer(value, path, place, found, visited)
    elif isinstance(value, (list, tuple, dict)):
        # Only the containers around this one: properties make lists anew, so
        # the identity of one walked before may be another's by now.
        if not any(value is other for other in containers):
            containers = (*containers, value)
            _visit_container(
                value, path, place, found, visited, containers, names
            )


def _visit_container(container, path, place, found, visited, containers, names):
    # Names inside a container count all that Keras saves, layers or not.
    used = {}
    values = container.values() if isinstance(container, dict) else container
    for value in list(values):
        if _compat.is_saveable(value):
            name = _compat.snake_case(type(value).__name__)
        elif isinstance(value, (list, tuple, dict)):
            name = "container"
        else:
            continue
        used[name] = used.get(name, -1) + 1
        if used[name]:
            name = f"{name}_{used[name]}"
        path_there = f"{path}/{name}"
        if isinstance(value, keras.layers.Layer):
            name = value.name
        place_there = names.get(id(value), f"{place}/{name}")
        _visit(
            value, path_there, place_there, found, visited, containers, names
        )


def attention_outputs(layers):
    """Addresses of the output projections of attention.

    Args:
        layers: dict from address to layer, see `layers_by_address`.

    Returns:
        list of addresses.
    """
    return [
        address
        for group in _groups(layers).values()
        if any(_is_query_or_value(a, layers) for a in group.values())
        for name, address in group.items()
        if name in _ATTENTION_OUTPUT_NAMES
    ]


def feed_forwards(layers):
    """The feed-forward networks of KerasHub's transformers.

    Args:
        layers: dict from address to layer, see `layers_by_address`.

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
        # What it gives is gated, and added to that of other experts.
        if "shared_expert" in address:
            return False
        # Keras itself calls unnamed layers `dense_1` and `dense_2`: the
        # attribute tells.
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
    """Whether attention is beside this group of layers, or one level up."""
    block = parent.rpartition("/")[0]
    return any(
        owner.rpartition("/")[2] != "layers"
        and any(address.startswith(f"{owner}/") for address in attention)
        for owner in (parent, block)
        if owner
    )


def select_sites(
    layers,
    targets,
    exclude,
    kept,
    kinds=site_layers.KERNEL_KINDS,
    default=None,
):
    """The addresses that `targets` means and `exclude` does not.

    Args:
        layers: dict from address to layer, see `layers_by_address`.
        targets: See `inject`.
        exclude: See `inject`.
        kept: Addresses that stay trainable; `"all-linear"` and `None` leave
            them out.
        kinds: What may be a site; see `Adapter.site_kinds`.
        default: Optional function of `layers`: the addresses that `None`
            means, if not those of query and value projections.

    Returns:
        list of addresses, in the order of `layers`.

    Raises:
        ValueError: If a target or an exclusion matches nothing, or if what is
            left is nothing, or no supported layer.
    """
    candidates = {
        address: layer
        for address, layer in layers.items()
        if layer.built and site_layers.supported_class(layer, kinds) is not None
    }
    if targets is None and default is not None:
        wanted = default(layers)
        chosen = [
            address
            for address in candidates
            if address in wanted and not _is_below(address, kept)
        ]
        if not chosen:
            raise ValueError(
                "`targets=None` finds no layer of the kind that this method "
                "adapts by default. Name layers in `targets`. "
                + _available(candidates)
            )
    elif targets is None:
        chosen = _query_value(layers, candidates, kept)
    elif isinstance(targets, str) and targets == "all-linear":
        chosen = _all_linear(candidates, kept)
    elif _is_function(targets):
        chosen = [a for a, layer in candidates.items() if targets(layer)]
        if not chosen:
            raise ValueError(
                "`targets` returned a false value for every one of the "
                f"{len(candidates)} layers that can be adapted. "
                + _available(candidates)
            )
    else:
        chosen = match(layers, targets, "targets")
        for target in _as_list(targets):
            _refuse_unsupported(layers, target, kinds)
        chosen = [
            a for a in chosen if site_layers.supported_class(layers[a], kinds)
        ]
    if exclude is None:
        return chosen
    if _is_function(exclude):
        left = [a for a in chosen if not exclude(layers[a])]
    elif isinstance(exclude, str) and exclude == "all-linear":
        linear = _linear(candidates, kept)
        left = [a for a in chosen if a not in linear]
    else:
        parents = match(layers, exclude, "exclude")
        left = [a for a in chosen if not _is_below(a, parents)]
    if not left:
        raise ValueError(
            f"`exclude` left none of the {len(chosen)} layers that `targets` "
            f"matched. Received: targets={targets!r}, exclude={exclude!r}"
        )
    return left


def select_kept(layers, keep_trainable):
    """Addresses that `keep_trainable` means, without any below another."""
    if keep_trainable is None:
        return []
    if _is_function(keep_trainable):
        found = [a for a, layer in layers.items() if keep_trainable(layer)]
        if not found:
            raise ValueError(
                "`keep_trainable` returned a false value for every layer."
            )
    else:
        found = match(layers, keep_trainable, "keep_trainable")
    return [
        a
        for a in found
        if not any(a.startswith(f"{other}/") for other in found)
    ]


def _is_function(targets):
    # Layers can be called too, but mean no choice of layers.
    return callable(targets) and not isinstance(targets, keras.layers.Layer)


def match(layers, targets, argument):
    """Addresses that names or a pattern match.

    Args:
        layers: dict from address to layer.
        targets: A name, a list of names or a `re.Pattern`.
        argument: The argument's name, for errors.

    Returns:
        list of addresses, in the order of `layers`.

    Raises:
        TypeError: If `targets` is of another type.
        ValueError: If one of `targets` matches nothing.
    """
    targets = _as_list(targets)
    if not isinstance(targets, (list, tuple, set, frozenset)) or not all(
        isinstance(target, (str, re.Pattern)) for target in targets
    ):
        raise TypeError(
            f"`{argument}` must be a name, a list of names, a `re.Pattern`, "
            "a function of a layer or `None`. "
            f"Received: {argument}={targets!r}"
        )
    if not targets:
        raise ValueError(f"`{argument}` is empty. Received: {targets!r}")
    found = set()
    for target in targets:
        hits = _matched(layers, target)
        if not hits:
            raise ValueError(
                f"`{argument}` matches no layer: {_shown(target)}. "
                + _hint(target, argument)
                + _near_misses(target, layers)
            )
        found |= hits
    return [address for address in layers if address in found]


def _hint(target, argument):
    if target != "all-linear":
        return ""
    if argument == "keep_trainable":
        return "That is a choice of `targets` and `exclude`. "
    return "It is to be given alone, not in a list. "


def _as_list(targets):
    return [targets] if isinstance(targets, (str, re.Pattern)) else targets


def _matched(layers, target):
    if target in layers and target != layers.places[target]:
        # An address in full, as `sites` gives it.
        return {target}
    hits = {
        address
        for address, layer in layers.items()
        if _matches(target, layers.places[address], layer)
    }
    if not hits and isinstance(target, str) and "/" in target:
        # Those in a container may have no names but Keras's own, which count
        # all layers of a process: the end of an address is all there is.
        hits = {a for a in layers if f"/{a}".endswith(f"/{target}")}
    return hits


def _matches(target, place, layer):
    path = layer.path or layer.name
    if isinstance(target, re.Pattern):
        return bool(target.search(path) or target.search(place))
    return (
        layer.name == target
        or f"/{path}".endswith(f"/{target}")
        or f"/{place}".endswith(f"/{target}")
    )


def _query_value(layers, candidates, kept):
    chosen = [
        address
        for address in candidates
        if _is_query_or_value(address, layers) and not _is_below(address, kept)
    ]
    if not chosen:
        raise ValueError(
            "This model has no query or value projection by any name that "
            "`targets=None` looks for. Name the layers to adapt in `targets`, "
            'or give "all-linear". ' + _available(candidates)
        )
    return chosen


def _is_query_or_value(address, layers):
    # Some families leave projections unnamed; the attribute tells then.
    names = {layers[address].name, layers.attribute(address)}
    return not names.isdisjoint(QUERY_VALUE_NAMES)


def _linear(candidates, kept):
    return [
        address
        for address, layer in candidates.items()
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
        and not _is_below(address, kept)
        and not _ROUTER.search(layer.path or "")
    ]


def _all_linear(candidates, kept):
    chosen = _linear(candidates, kept)
    if not chosen:
        raise ValueError(
            '`targets="all-linear"` found no Dense or EinsumDense layer '
            "besides those in `keep_trainable`. " + _available(candidates)
        )
    return chosen


def _is_below(address, parents):
    return any(
        address == parent or address.startswith(f"{parent}/")
        for parent in parents
    )


def _refuse_unsupported(layers, target, kinds):
    """An error if a target matched only layers that can't be adapted."""
    chosen = match(layers, target, "targets")
    supported = [
        a for a in chosen if site_layers.supported_class(layers[a], kinds)
    ]
    overridden = [
        a
        for a in chosen
        if site_layers.looks_supported(layers[a]) and a not in supported
    ]
    if overridden:
        layer = layers[overridden[0]]
        names = site_layers.overridden(type(layer))
        raise ValueError(
            f"Layer '{layer.name}' at '{overridden[0]}' is a "
            f"{type(layer).__name__} that overrides `{names[0]}`, so what it "
            "computes is not known. Leave it out of `targets`, or let it "
            f"inherit `{names[0]}`."
        )
    if not supported:
        classes = sorted({type(layers[a]).__name__ for a in chosen})
        inside = [
            layer.name
            for a, layer in layers.items()
            if _is_below(a, chosen)
            and site_layers.supported_class(layer, kinds)
        ]
        raise ValueError(
            f"The target {_shown(target)} matches only layers of classes "
            f"{classes}, which can't be adapted. "
            + (f"Layers inside of them can: {inside[:5]}. " if inside else "")
            + f"Supported: {', '.join(site_layers.class_names(kinds))}."
        )


def _shown(target):
    if isinstance(target, re.Pattern):
        return f"re.compile({target.pattern!r})"
    return repr(target)


def _near_misses(target, layers):
    names = sorted({layer.name for layer in layers.values()})
    paths = sorted({layer.path or layer.name for layer in layers.values()})
    wanted = target.pattern if isinstance(target, re.Pattern) else target
    close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    close += [
        path
        for path in difflib.get_close_matches(wanted, paths, n=3, cutoff=0.5)
        if path not in close
    ]
    if close:
        return f"Near misses: {close}."
    return _available(
        {a: x for a, x in layers.items() if site_layers.supported_class(x)}
    )


def _available(candidates):
    names = sorted({layer.name for layer in candidates.values()})
    if not names:
        return "The model has no layer of a supported class."
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Layers that can be adapted are called: {shown}."
