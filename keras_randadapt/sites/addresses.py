"""The layers of a model and their structural addresses."""

import keras

from keras_randadapt import _compat
from keras_randadapt.sites import stack
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import KernelSite


class Layers(dict):
    """Every layer below a model, by structural address.

    A layer with several kernels is followed by a `KernelSite` for each.

    Attributes:
        kernels: dict from the address of a layer with several kernels to the
            list of their addresses.
        places: dict from address to the same path with layers' names. In a
            list, an address numbers layers of each class, so the layer with
            the address `dense_1` may be named `encoder`, while another layer
            is named `dense_1`.
    """

    def __init__(self):
        super().__init__()
        self.kernels = {}
        self.places = {}

    def attribute(self, address):
        """The attribute that holds a layer, or its name if a list holds it."""
        return self.places[address].rpartition("/")[2].lstrip("_")

    def is_kernel(self, address):
        """Whether an address is that of one kernel of a layer with several."""
        return isinstance(self[address], KernelSite)

    def named(self, addresses):
        """A list of layers as users name them, for messages."""
        return [self.places[address] for address in addresses]


def layers_by_address(model):
    """Every layer below `model`, by structural address.

    The address is the path of the layer's weights inside a `.weights.h5` file.
    It is made of attribute names and class names, so it is equal on every
    backend and in every run. `layer.path` is neither unique nor stable.

    Args:
        model: A built Keras model.

    Returns:
        `Layers`, in the order of Keras's weight files. A layer that is used in
        several places is listed once, at the first.
    """
    found = Layers()
    visited = {id(model)}
    _walk_layer(model, "", "", found, visited)
    return found


def _join(path, name):
    return f"{path}/{name}" if path else name


def _walk_layer(layer, address, place, found, visited):
    pairs = list(_compat.walk_attributes(layer))
    # The layers in a model's list of layers may be attributes as well.
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
        if isinstance(value, (stack.AdapterStack, stack.KernelStacks)):
            return
        found[path] = value
        found.places[path] = place
        # Most of these classes have no layers below, and reading all their
        # attributes would unpack quantized kernels.
        if supported.may_have_sublayers(value):
            _walk_layer(value, path, place, found, visited)
            _add_kernels(value, path, place, found)
    elif isinstance(value, (list, tuple, dict)):
        # Only the containers around this one are compared. Properties return
        # new lists, so a list that was walked before may be gone and its
        # `id` may be another's.
        if not any(value is other for other in containers):
            containers = (*containers, value)
            _visit_container(
                value, path, place, found, visited, containers, names
            )


def _add_kernels(layer, path, place, found):
    sites = supported.kernel_sites(layer)
    for site in sites:
        address = f"{path}/{site.kernel_name}"
        found[address] = site
        found.places[address] = f"{place}/{site.kernel_name}"
        found.kernels.setdefault(path, []).append(address)
    # A cell's name means its kernels too, although the layer around the cell
    # is what has adapters.
    owners = [site.owner for site in sites if site.owner is not layer]
    for address, below in list(found.items()):
        if any(below is owner for owner in owners):
            found.kernels[address] = found.kernels[path]


def _visit_container(container, path, place, found, visited, containers, names):
    # Names inside a container number everything that Keras saves, not only
    # layers.
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
