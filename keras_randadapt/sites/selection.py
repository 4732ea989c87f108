"""The layers that `targets`, `exclude` and `keep_trainable` mean."""

import dataclasses
import re
from collections.abc import Callable
from collections.abc import Sequence

import keras

from keras_randadapt.sites import kerashub
from keras_randadapt.sites import linear
from keras_randadapt.sites import supported
from keras_randadapt.sites import target_hints
from keras_randadapt.sites.kernel_site import layer_of
from keras_randadapt.sites.linear import is_below

#: The type of `targets`, `exclude` and `keep_trainable`.
Targets = (
    str
    | re.Pattern
    | Sequence[str | re.Pattern]
    | Callable[[keras.layers.Layer], bool]
    | None
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `targets` and `exclude` mean in a model.

    Attributes:
        chosen: list of the addresses of layers to adapt.
        left_out: list of the addresses of layers with kernels that `targets`
            means too and that can't be adapted.
    """

    chosen: list[str]
    left_out: list[str]


def select_sites(
    layers,
    targets,
    exclude,
    kept,
    kinds=supported.KERNEL_KINDS,
    default=None,
    takes=lambda layer: True,
    experts=False,
):
    """The layers that `targets` means and `exclude` does not.

    Args:
        layers: dict from address to layer, see `addresses.layers_by_address`.
        targets: See `inject`.
        exclude: See `inject`.
        kept: Addresses that stay trainable. `"all-linear"` and `None` leave
            them out.
        kinds: The kinds of layers that the method adapts; see
            `Adapter.site_kinds`. A name may mean a layer of another kind with
            a kernel, which the method is then to refuse.
        default: Optional function from `layers` to the addresses that `None`
            means. Without it, `None` means the query and value projections.
        takes: Function from a layer of these kinds to whether the method
            adapts it.
        experts: Whether `"all-linear"` means the kernels of experts too.

    Returns:
        A `Selection`, in the order of `layers`.

    Raises:
        ValueError: If a target or an exclusion matches nothing, if a name
            means a layer that can't be adapted, or if no layer is left.
    """
    candidates = _adaptable(layers, {*kinds, *supported.KERNEL_KINDS})
    left_out = []
    if targets is None and default is not None:
        wanted = default(layers)
        chosen = [
            address
            for address in candidates
            if address in wanted and not is_below(address, kept)
        ]
        if not chosen:
            raise ValueError(
                "`targets=None` finds no layer of the kind that this method "
                "adapts by default. Name layers in `targets`. "
                + target_hints.available(candidates)
            )
    elif targets is None:
        chosen = _query_value(layers, candidates, kept)
    elif isinstance(targets, str) and targets == "all-linear":
        chosen = _all_linear(layers, candidates, kept, experts, takes)
        left_out = linear.left_out_of_all_linear(layers, chosen, kept)
    elif _is_function(targets):
        can = _adaptable(layers, kinds, takes)
        chosen, left_out = _meant_by_function(layers, targets, can)
    else:
        found = match(layers, targets, "targets")
        remain = _not_excluded(layers, exclude, kept, candidates)
        adaptable = {
            # A layer that is not built is refused later, by its name.
            True: _of_kinds(layers, {*kinds, *supported.KERNEL_KINDS}),
            False: _adaptable(layers, kinds, takes),
        }
        chosen, left_out = _named(layers, targets, remain, adaptable, kinds)
        chosen = [address for address in found if address in chosen]
        left_out = [address for address in found if address in left_out]
    if exclude is None:
        return Selection(chosen, left_out)
    remain = _not_excluded(layers, exclude, kept, candidates)
    left = [address for address in chosen if remain(address)]
    if not left:
        raise ValueError(
            f"`exclude` left none of the {len(chosen)} layers that `targets` "
            f"matched. Received: targets={targets!r}, exclude={exclude!r}"
        )
    return Selection(left, [a for a in left_out if remain(a)])


def _adaptable(layers, kinds, takes=lambda layer: True):
    return {
        address: layer
        for address, layer in _of_kinds(layers, kinds).items()
        if layer.built and takes(layer)
    }


def _of_kinds(layers, kinds):
    return {
        address: layer
        for address, layer in layers.items()
        if supported.supported_class(layer, kinds) is not None
    }


def _not_excluded(layers, exclude, kept, candidates):
    """A function of an address: whether `exclude` leaves it in."""
    if exclude is None:
        return lambda address: True
    if _is_function(exclude):
        return lambda address: not exclude(layer_of(layers[address]))
    if isinstance(exclude, str) and exclude == "all-linear":
        excluded = _linear(layers, candidates, kept)
        return lambda address: address not in excluded
    parents = match(layers, exclude, "exclude")
    return lambda address: not is_below(address, parents)


def _meant_by_function(layers, function, adaptable):
    """The adaptable layers for which a function is true, and the others."""
    chosen = [a for a, layer in adaptable.items() if function(layer_of(layer))]
    if not chosen:
        raise ValueError(
            "`targets` returned a false value for every one of the "
            f"{len(adaptable)} layers that can be adapted. "
            + target_hints.available(adaptable)
        )
    left_out = [
        address
        for address, layer in layers.items()
        if address not in adaptable
        and address not in layers.kernels
        and (linear.is_normalization(layer) or linear.kernel_parameters(layer))
        and _is_meant(function, layer)
    ]
    return chosen, left_out


def _is_meant(function, layer):
    try:
        return bool(function(layer_of(layer)))
    except AttributeError:
        # A function may ask for an attribute, such as `units`, that only
        # layers of the classes that can be adapted have.
        return False


def _named(layers, targets, remain, adaptable, kinds):
    """The layers to adapt that names and patterns mean, and the others.

    Args:
        layers: See `select_sites`.
        targets: A name, a pattern or a list of them.
        remain: A function of an address: whether `exclude` leaves it in.
        adaptable: dict from whether a target is a name to the layers that it
            can mean, by address.
        kinds: See `select_sites`.

    Returns:
        Two sets of addresses.
    """
    chosen, left_out = set(), set()
    for target in _as_list(targets):
        is_name = isinstance(target, str)
        can = adaptable[is_name]
        meant = match(layers, target, "targets")
        left = [address for address in meant if remain(address)]
        _refuse_unsupported(layers, target, left or meant, can, kinds)
        others = [
            address
            for address in left
            if address not in can
            and linear.kernel_parameters(layers[address])
            and not linear.is_normalization(layers[address])
        ]
        if is_name and others:
            classes = sorted({type(layers[a]).__name__ for a in others})
            raise ValueError(
                f"The target {target_hints.shown(target)} also means layers of "
                f"classes {classes}, which can't be adapted: "
                f"{layers.named(others[:5])}. Leave them out with `exclude`, "
                "or name the others by the ends of their paths."
            )
        chosen.update(address for address in meant if address in can)
        left_out.update(others)
    return chosen, left_out


def select_kept(layers, keep_trainable):
    """The addresses that `keep_trainable` means, none below another."""
    if keep_trainable is None:
        return []
    if _is_function(keep_trainable):
        whole = [a for a in layers if not layers.is_kernel(a)]
        found = [a for a in whole if keep_trainable(layers[a])]
        if not found:
            raise ValueError(
                "`keep_trainable` returned a false value for every layer."
            )
    else:
        found = match(layers, keep_trainable, "keep_trainable")
        kernels = [a for a in found if layers.is_kernel(a)]
        if kernels:
            raise ValueError(
                "`keep_trainable` takes layers, and "
                f"{layers.named(kernels[:5])} are kernels of layers with "
                "several. Name the layers, whose weights are then trained. "
                f"Received: keep_trainable={keep_trainable!r}"
            )
    return [
        a
        for a in found
        if not any(a.startswith(f"{other}/") for other in found)
    ]


def _is_function(targets):
    # A layer is callable too, but it is not a function that chooses layers.
    return callable(targets) and not isinstance(targets, keras.layers.Layer)


def match(layers, targets, argument):
    """The addresses that names or a pattern match.

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
                f"`{argument}` matches no layer: {target_hints.shown(target)}. "
                + _hint(target, argument)
                + target_hints.near_misses(target, layers)
            )
        found |= hits
    if argument != "keep_trainable":
        # A layer with several kernels means all of them.
        for address in found & set(layers.kernels):
            found.remove(address)
            found.update(layers.kernels[address])
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
        # The target is a full address, such as a key of `kra.sites(model)`.
        return {target}
    hits = {
        address
        for address, layer in layers.items()
        if _matches(target, layers.places[address], layer)
    }
    if not hits and isinstance(target, str) and "/" in target:
        # A layer in a list may have only an automatic name, which numbers all
        # layers of a process. The end of its address is then the only stable
        # name.
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
    wanted = kerashub.query_and_value_projections(layers)
    chosen = [
        address
        for address in candidates
        if address in wanted and not is_below(address, kept)
    ]
    if not chosen:
        raise ValueError(
            "This model has no query or value projection by any name that "
            "`targets=None` looks for. "
            + target_hints.what_to_name(candidates)
            + target_hints.available(candidates)
        )
    return chosen


def _linear(layers, candidates, kept):
    return [
        address
        for address, layer in candidates.items()
        if linear.is_linear(layer)
        and not is_below(address, kept)
        and not linear.steers_experts(address, layers)
    ]


def _all_linear(layers, candidates, kept, experts, takes):
    chosen = _linear(layers, candidates, kept)
    if experts:
        found = [
            a
            for a, layer in candidates.items()
            if getattr(layer, "stack", None) is not None
            and takes(layer)
            and not is_below(a, kept)
        ]
        if not found:
            raise ValueError(
                "`experts=True` finds no layer with the kernels of several "
                "experts that this method adapts. Leave `experts` out."
            )
        chosen = [a for a in candidates if a in {*chosen, *found}]
    if not chosen:
        raise ValueError(
            '`targets="all-linear"` found no Dense or EinsumDense layer '
            "besides those in `keep_trainable`. "
            + target_hints.available(candidates)
        )
    return chosen


def _refuse_unsupported(layers, target, chosen, adaptable, kinds):
    """Raises an error if a target matches only layers that can't be sites."""
    possible = any(address in adaptable for address in chosen)
    overridden = [
        a
        for a in chosen
        if supported.looks_supported(layers[a])
        and supported.supported_class(layers[a]) is None
    ]
    if overridden and (isinstance(target, str) or not possible):
        layer = layers[overridden[0]]
        names = supported.overridden(type(layer))
        raise ValueError(
            f"Layer '{layer.name}' at '{overridden[0]}' is a "
            f"{type(layer).__name__} that overrides `{names[0]}`, so what it "
            "computes is not known. Leave it out of `targets`, or let it "
            f"inherit `{names[0]}`."
        )
    if not possible:
        classes = sorted({type(layers[a]).__name__ for a in chosen})
        inside = [
            layer.name
            for a, layer in layers.items()
            if is_below(a, chosen) and supported.supported_class(layer, kinds)
        ]
        raise ValueError(
            f"The target {target_hints.shown(target)} matches only layers of "
            f"classes {classes}, which can't be adapted. "
            + (f"Layers inside of them can: {inside[:5]}. " if inside else "")
            + f"Supported: {', '.join(supported.class_names(kinds))}."
        )
