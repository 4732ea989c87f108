"""Runs a converter of KerasHub without a checkpoint, and notes what it does.

A converter fills the variables of a backbone from tensors of a checkpoint. Here
it gets a stand-in for the checkpoint, whose tensors have names and no values,
and a stand-in for the backbone, whose variables keep what is assigned to them.
Nothing is read, nothing in the model changes, and no memory is taken.
"""

import collections
import inspect

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.sites import supported

#: Functions of NumPy that move numbers and compute nothing.
_MOVES = {
    np.concatenate,
    np.expand_dims,
    np.moveaxis,
    np.ravel,
    np.reshape,
    np.squeeze,
    np.stack,
    np.swapaxes,
    np.take,
    np.transpose,
}
#: Methods of arrays that do.
_METHODS = {"copy", "flatten", "ravel", "reshape", "squeeze", "swapaxes"}


class Assignment:
    """The value that a converter assigns to one variable.

    Attributes:
        layer: The layer that holds the variable.
        attribute: The attribute of the layer, without leading underscores.
        variable: The variable.
        shape: Its shape as a tuple; for a packed kernel, the unpacked one.
        value: A `Tensor`, or `None` where the value does not come from the
            checkpoint.
        array: A NumPy array, where the tensors of the checkpoint were given.
    """

    def __init__(self, layer, attribute, variable, shape, value, array=None):
        self.layer = layer
        self.attribute = attribute
        self.variable = variable
        self.shape = shape
        self.value = value
        self.array = array


class Tensor:
    """A tensor of a checkpoint, or what a converter makes of some of them.

    Its shape is not known. Moving its numbers makes another `Tensor`, which
    `replay` can compute. Everything else makes one that is `opaque`.
    """

    def __init__(self, function=None, arguments=(), options=None, key=None):
        self.function = function
        self.arguments = arguments
        self.options = options or {}
        self.key = key

    @property
    def opaque(self):
        """Why no `replay` is possible, or `None`."""
        if isinstance(self.function, str):
            return self.function
        return next(
            (part.opaque for part in self._parts() if part.opaque), None
        )

    def keys(self):
        """The names of the tensors that it is made of, each once, in order."""
        return list(dict.fromkeys(one.key for one in self.sources()))

    def sources(self):
        """The tensors of the checkpoint that it is made of."""
        if self.key is not None:
            return [self]
        return [one for part in self._parts() for one in part.sources()]

    def replay(self, arrays):
        """The array that this is for given tensors of the checkpoint.

        Args:
            arrays: dict from the names of tensors to NumPy arrays.

        Returns:
            A NumPy array.

        Raises:
            ValueError: If the arrays do not have fitting shapes.
        """
        if self.key is not None:
            return arrays[self.key]

        def real(value):
            if isinstance(value, Tensor):
                return value.replay(arrays)
            if isinstance(value, (list, tuple)):
                return type(value)(map(real, value))
            return value

        options = {name: real(value) for name, value in self.options.items()}
        return self.function(*map(real, self.arguments), **options)

    def signature(self):
        """A value that differs for tensors that are made in another way."""
        if self.key is not None:
            return "tensor"

        def sign(value):
            if isinstance(value, Tensor):
                return value.signature()
            if isinstance(value, (list, tuple)):
                return tuple(map(sign, value))
            return repr(value)

        name = getattr(self.function, "__name__", self.function)
        options = tuple((k, sign(v)) for k, v in sorted(self.options.items()))
        return name, tuple(map(sign, self.arguments)), options

    def _parts(self):
        stack = [*self.arguments, *self.options.values()]
        while stack:
            value = stack.pop(0)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                stack = [*value, *stack]

    def __array_function__(self, function, types, arguments, options):
        if function is np.split and isinstance(arguments[1], int):
            return [
                Tensor(_nth_of, (i, function, arguments, options))
                for i in range(arguments[1])
            ]
        if function in _MOVES:
            return Tensor(function, arguments, options)
        return Tensor(f"`numpy.{function.__name__}`", tuple(arguments), options)

    def __array_ufunc__(self, function, method, *arguments, **options):
        return Tensor(f"`numpy.{function.__name__}`", arguments)

    def __getitem__(self, index):
        return Tensor(_item, (self, index))

    # Without it, Python would count up and never stop.
    __iter__ = None

    @property
    def T(self):
        return Tensor(np.transpose, (self,))

    def transpose(self, *axes):
        if len(axes) == 1 and isinstance(axes[0], (list, tuple)):
            axes = axes[0]
        return Tensor(np.transpose, (self, axes or None))

    def astype(self, dtype, **options):
        # A converter's rounding is not what the map is about.
        return self

    def __getattr__(self, name):
        if name not in _METHODS:
            raise AttributeError(f"`{name}` of a tensor of the checkpoint")

        def call(*arguments, **options):
            return Tensor(_method, (self, name, *arguments), options)

        return call


def _arithmetic(name):
    def computed(self, *others):
        return Tensor(f"arithmetic (`{name}`)", (self, *others))

    return computed


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _side in ("", "r"):
        _operator = f"__{_side}{_name}__"
        setattr(Tensor, _operator, _arithmetic(_operator))


def _item(array, index):
    return array[index]


def _method(array, name, *arguments, **options):
    return getattr(array, name)(*arguments, **options)


def _nth_of(i, function, arguments, options):
    return function(*arguments, **options)[i]


class Checkpoint:
    """A stand-in for KerasHub's loader of a checkpoint."""

    prefix = ""
    safetensor_config = None

    def __init__(self, absent, arrays=None):
        self.safetensor_files = {}
        self.given = []
        self._absent = absent
        self._arrays = arrays or {}

    def get_prefixed_key(self, key, keys):
        return key

    def get_tensor(self, key):
        if key in self._absent:
            raise KeyError(key)
        if key in self._arrays:
            return self._arrays[key]
        self.given.append(Tensor(key=key))
        return self.given[-1]

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        value = self._arrays.get(hf_weight_key, Tensor(key=hf_weight_key))
        if hook_fn is not None:
            try:
                value = hook_fn(value, list(keras_variable.shape))
            except (AttributeError, TypeError) as error:
                # A shape that is asked for, which nobody knows.
                value = Tensor(f"a use of {error}", (value,))
        keras_variable.assign(value)


class _StandIn:
    """An object of the model, whose variables only note what they are given."""

    def __init__(self, real, noted):
        object.__setattr__(self, "stands_for", real)
        object.__setattr__(self, "noted", noted)
        object.__setattr__(self, "own", {})

    @property  # type: ignore[misc]
    def __class__(self):
        # Converters look at classes.
        return type(self.stands_for)

    def __getattr__(self, name):
        real, noted = self.stands_for, self.noted
        if name in self.own:
            return self.own[name]
        public = name.lstrip("_")
        if isinstance(real, keras.layers.Layer):
            # A site's kernel is the variable, whatever its adapters make of it.
            site = supported.looks_supported(real, any_kind=True)
            if site and public in ("kernel", "embeddings"):
                return _Variable(real, public, _compat.kernel_of(real), noted)
        # The attribute of a site may show the adapted value of a variable.
        value = vars(real).get(name)
        if not isinstance(value, keras.Variable):
            value = getattr(real, name)
        if isinstance(value, keras.Variable):
            return _Variable(real, public, value, noted)
        return _stand_in(value, noted)

    def __setattr__(self, name, value):
        self.own[name] = value


class _Variable:
    """A variable that notes what is assigned to it."""

    def __init__(self, layer, attribute, variable, noted):
        self._layer, self._attribute = layer, attribute
        self._variable, self._noted = variable, noted
        if isinstance(layer, keras.layers.EinsumDense) and (
            attribute == "kernel"
        ):
            self.shape = _compat.kernel_shape(layer)
        elif getattr(layer, "quantization_mode", None) is not None and (
            attribute in ("kernel", "embeddings")
        ):
            self.shape = tuple(supported.view_of(layer))
        else:
            self.shape = tuple(variable.shape)

    def assign(self, value):
        array = value if isinstance(value, np.ndarray) else None
        if not isinstance(value, Tensor):
            value = None
        self._noted.append(
            Assignment(
                self._layer,
                self._attribute,
                self._variable,
                self.shape,
                value,
                array,
            )
        )

    def __getattr__(self, name):
        return getattr(self._variable, name)

    def __add__(self, other):
        ours = [one for one in self._noted if one.variable is self._variable]
        if ours and ours[-1].array is not None:
            return ours[-1].array + other
        return Tensor(
            "arithmetic (`__add__`)", (*(one.value for one in ours[-1:]), other)
        )


def _stand_in(value, noted):
    if isinstance(value, keras.layers.Layer):
        return _StandIn(value, noted)
    if isinstance(value, (list, tuple)) and type(value).__name__ in (
        "list",
        "tuple",
        "TrackedList",
    ):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_stand_in(one, noted) for one in value)
    if isinstance(value, dict):
        return {key: _stand_in(one, noted) for key, one in value.items()}
    if inspect.ismethod(value):

        def call(*arguments, **options):
            arguments = [getattr(a, "_variable", a) for a in arguments]
            return _stand_in(value(*arguments, **options), noted)

        return call
    return value


Recording = collections.namedtuple("Recording", ["assignments", "stopped"])


def record(convert, part, config, arrays=None):
    """Runs a converter's function on a stand-in.

    Args:
        convert: Function `(part, checkpoint, config)` of a converter.
        part: A backbone, or a task for its head.
        config: The checkpoint's config as a dict.
        arrays: Optional dict from the names of tensors to NumPy arrays. What
            is assigned of these alone is computed.

    Returns:
        A `Recording`: a list of `Assignment`, the last one of each variable,
        and a string that says why the converter stopped half-way, or `None`.
    """
    absent = set()
    while True:
        noted, checkpoint = [], Checkpoint(absent, arrays)
        stopped = None
        try:
            convert(_StandIn(part, noted), checkpoint, config)
        except Exception as error:  # It is KerasHub's code: it may be any.
            stopped = f"{type(error).__name__}: {error}"
        # Some converters ask for a tensor, to see which of two names it has.
        # Such a one is not assigned, and the other name is today's.
        used = {
            id(source)
            for one in noted
            if one.value is not None
            for source in one.value.sources()
        }
        probed = {one.key for one in checkpoint.given if id(one) not in used}
        if stopped or not probed:
            break
        absent |= probed
    last = {(id(one.layer), one.attribute): one for one in noted}
    return Recording(list(last.values()), stopped)
