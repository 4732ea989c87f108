"""The weights of a model's adapters, and which active ones are trained."""

import math
import numbers
from collections.abc import Mapping
from collections.abc import Sequence

from keras_randadapt import _compat
from keras_randadapt.model import checks
from keras_randadapt.sites import stack
from keras_randadapt.sites import weighted

#: Names of adapters, or their weights by name.
Names = str | Sequence[str] | Mapping[str, float]


def parsed(state, names):
    """Validates the names or the weights that a user gives.

    Args:
        state: An `AdaptedState`.
        names: A name, a list of names, or a dict from name to weight.

    Returns:
        `(names, weights)`: a tuple of names and a dict from each to a float.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If a name is unknown, if a weight is not finite, or if a
            method that is not additive has a weight other than 1.
    """
    if not isinstance(names, Mapping):
        names = checks.check_names(state, names)
        return names, dict.fromkeys(names, 1.0)
    given = dict(names)
    names = checks.check_names(state, list(given))
    weights = {}
    for name in names:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"The weight of the adapter '{name}' must be a number. "
                f"Received: names={given!r}"
            )
        if not math.isfinite(value):
            raise ValueError(
                f"The weight of the adapter '{name}' must be finite. "
                f"Received: names={given!r}"
            )
        template = state.records[name].template
        if value != 1 and not template.additive:
            raise ValueError(
                f"The adapter '{name}' is a `{type(template).__name__}`, whose "
                "change is no sum of the base and an update, so it can only "
                f"have the weight 1. Received: names={given!r}"
            )
        weights[name] = float(value)
    return names, weights


def parsed_train(names, train):
    """Validates which of the active adapters are to be trained.

    Args:
        names: tuple of the names of the active adapters.
        train: A name, a list of names, or `None` for all.

    Returns:
        tuple of names, in the order of `names`.
    """
    if train is None:
        return tuple(names)
    train = (train,) if isinstance(train, str) else tuple(train)
    unknown = [name for name in train if name not in names]
    if unknown:
        raise ValueError(
            f"`train` must name active adapters. Received: train={train!r}, "
            f"and active are {list(names)}"
        )
    return tuple(name for name in names if name in train)


def of(state, names):
    """dict from name to the present weight of an adapter."""
    weights = (state.records[name].weight for name in names)
    return {
        name: 1.0 if weight is None else weight.value
        for name, weight in zip(names, weights)
    }


def missing(state, weights):
    """The names that need a variable for their weight and have none."""
    return [
        name
        for name, value in weights.items()
        if value != 1 and state.records[name].weight is None
    ]


def give(change, weights, always=False):
    """Gives adapters their weights.

    Args:
        change: A `transaction.Change`. If `missing` names adapters, it must be
            one that ends with `attach.refresh`.
        weights: dict from name to float.
        always: Whether weights of 1 get a variable too.
    """
    state = change.model._randadapt
    for name in missing(state, weights):
        _add(change, state, name)
    for name in weights if always else ():
        if state.records[name].weight is None:
            _add(change, state, name)
    for name, value in weights.items():
        weight = state.records[name].weight
        if weight is not None:
            change.assign(weight.layer.weight, value)
            change.set(weight, "value", float(value))


def restore(state, weights):
    """Gives adapters former weights; it may be repeated.

    Args:
        state: An `AdaptedState`.
        weights: dict from name to float.
    """
    for name, value in weights.items():
        weight = state.records[name].weight
        if weight is not None:
            weight.layer.weight.assign(value)
            weight.value = value


def settle(change, name):
    """Moves an adapter's weight if its site is none any more."""
    state = change.model._randadapt
    record = state.records[name]
    if record.weight is None or record.weight.address in record.addresses:
        return
    value = record.weight.value
    remove(change, name)
    give(change, {name: value}, always=True)


def remove(change, name):
    """Takes the weight off an adapter; it is 1 then."""
    state = change.model._randadapt
    record = state.records[name]
    if record.weight is None:
        return
    for layer in state.changed_layers:
        pairs = tuple(p for p in layer.adapter.weighted if p[0] != name)
        change.set(layer.adapter, "weighted", pairs)
    holder = state.layers[record.weight.address]
    attribute = stack.weight_attribute(name)
    if getattr(getattr(holder, "adapter", None), attribute, None) is not None:
        change.detach_sublayer(holder.adapter, attribute)
    change.set(record, "weight", None)


def _add(change, state, name):
    record = state.records[name]
    address = record.addresses[0]
    layer = state.layers[address]
    holder = weighted.WeightLayer(f"weight_{name}")
    with _compat.name_scope("adapter", layer.path or address):
        holder.build()
    change.attach_sublayer(layer.adapter, stack.weight_attribute(name), holder)
    weight = weighted.Weight(holder, address)
    change.set(record, "weight", weight)
    for one in record.addresses:
        adapters = state.layers[one].adapter
        change.set(adapters, "weighted", (*adapters.weighted, (name, weight)))
