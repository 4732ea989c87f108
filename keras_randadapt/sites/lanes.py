"""Adapters of stacked kernels, one expert at a time.

The adapter of a stacked kernel is one layer whose trained weights have an axis
of experts in front. A *lane* is what one expert has of it: an object of the
same class whose weights are those of the expert, so methods are written for
one kernel alone. Lanes are made for a computation, and nothing keeps them.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.sites.weighted import Weighted


class _Taken:
    """Weights in a fixed order, of which `lane` takes one after another."""

    def __init__(self, values):
        self.values = list(values)

    def next(self):
        return self.values.pop(0)


#: Whether all experts are computed at once. TensorFlow's `vectorized_map` loses
#: the gradients of functions that have one of their own, so there experts are
#: computed one by one.
_AT_ONCE = keras.config.backend() in ("jax", "torch")


def of_experts(function, adapters, *mapped):
    """Applies a function to the lanes of every expert and stacks the results.

    Args:
        function: Function of a list of lanes and of one slice of each of
            `mapped`, which gives a tensor.
        adapters: list of built adapters of one stacked kernel, as
            `AdapterStack.active` gives them.
        *mapped: Tensors whose first axis is that of the experts.

    Returns:
        Tensor whose first axis is that of the experts.
    """
    stacked = [
        ops.convert_to_tensor(_compat.unrounded(variable))
        for adapter in adapters
        for variable in _stacked_variables(adapter)
    ]

    def one(arguments):
        values, slices = arguments
        taken = _Taken(values)
        return function([lane(a, taken) for a in adapters], *slices)

    elements = (tuple(stacked), tuple(mapped))
    if _AT_ONCE and (stacked or mapped):
        return ops.vectorized_map(one, elements)
    number = adapters[0].site.stack
    return ops.stack([one(_slices(elements, e)) for e in range(number)])


def each(adapter):
    """The lanes of an adapter, one an expert; itself where nothing is stacked.

    Args:
        adapter: A built adapter or a `Weighted` one.

    Returns:
        list of adapters.
    """
    if adapter.site.stack is None:
        return [adapter]
    variables = _stacked_variables(adapter)
    return [
        lane(adapter, _Taken([ops.convert_to_tensor(v)[e] for v in variables]))
        for e in range(adapter.site.stack)
    ]


def lane(adapter, taken):
    """What one expert has of an adapter.

    Args:
        adapter: See `each`.
        taken: A `_Taken` with the expert's weights, in the order of
            `_stacked_variables`.
    """
    if isinstance(adapter, Weighted):
        return Weighted(lane(adapter.adapter, taken), adapter.weight)
    return shadow(
        adapter,
        {
            **{name: taken.next() for name in _stacked_names(adapter)},
            **{name: lane(a, taken) for name, a in _inner(adapter)},
            "site": dataclasses.replace(adapter.site, stack=None),
        },
    )


def assign_each(adapter, function, *mapped):
    """Lets a method assign the weights of each expert, and stacks them.

    Args:
        adapter: A built adapter of a stacked kernel.
        function: Function of a lane, whose weights have `assign`, and of one
            slice of each of `mapped`.
        *mapped: NumPy arrays whose first axis is that of the experts.
    """
    variables = _stacked_variables(adapter)
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    for e in range(adapter.site.stack):
        cells = [_Cell(value[e]) for value in values]
        function(lane(adapter, _Taken(cells)), *[one[e] for one in mapped])
    for variable, value in zip(variables, values):
        variable.assign(value)


class _Cell:
    """The weight of one expert while it is assigned, in place of a variable."""

    def __init__(self, array):
        self._array = array

    @property
    def shape(self):
        return self._array.shape

    @property
    def dtype(self):
        return self._array.dtype.name

    def assign(self, value):
        self._array[...] = ops.convert_to_numpy(value)

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)


def shadow(layer, attributes, cls=None):
    """An object like a layer, with other attributes; the layer is untouched.

    It has the layer's class and shares its state, so methods of the class work
    on it. It is no layer of any model.

    Args:
        layer: A layer.
        attributes: dict from name to value.
        cls: Optional class of the object; by default it is the layer's.
    """
    found = object.__new__(cls or type(layer))
    # The layer's own way of setting attributes would track them.
    found.__dict__.update({**vars(layer), **attributes})
    return found


def _stacked_variables(adapter):
    if isinstance(adapter, Weighted):
        return _stacked_variables(adapter.adapter)
    found = [getattr(adapter, name) for name in _stacked_names(adapter)]
    for _, inner in _inner(adapter):
        found += _stacked_variables(inner)
    return found


def _stacked_names(adapter):
    """The attributes of an adapter that hold its stacked weights."""
    ids = {id(variable) for variable in adapter.stacked_weights}
    return [name for name, value in vars(adapter).items() if id(value) in ids]


def _inner(adapter):
    """`(attribute, adapter)` pairs of the adapters that a method wraps."""
    modules = vars(adapter).get("_modules", {})
    return [
        (name, value)
        for name, value in {**vars(adapter), **modules}.items()
        if hasattr(value, "stacked_weights")
    ]


def _slices(elements, e):
    values, mapped = elements
    return tuple(v[e] for v in values), tuple(m[e] for m in mapped)
