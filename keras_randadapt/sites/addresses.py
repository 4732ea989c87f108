"""The layers of a model and their structural addresses."""

import keras

from keras_randadapt import _compat
from keras_randadapt.sites import stack
from keras_randadapt.sites import supported


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
        if isinstance(value, stack.AdapterStack):
            return
        found[path] = value
        found.places[path] = place
        # Nothing below these is a layer, and looking at every attribute of
        # every one would unpack quantized kernels.
        if not supported.looks_supported(value):
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
