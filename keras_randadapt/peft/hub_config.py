"""The config that a checkpoint of a model would have in transformers.

KerasHub's converters make a backbone's arguments from a config of transformers,
`config.json`. Here that is undone. A converter is run with stand-ins for the
values of the config, and the arguments in which they end up tell the values.
"""

import copy
import inspect
import itertools
import math

from keras_randadapt import _compat

#: How often a value is asked for that can't be a stand-in, at most.
_MOST_VALUES = 20
#: How many pairs of values are tried that may have to be equal.
_MOST_PAIRS = 100


class _NeedsValue(Exception):
    """The converter computes with a value of the config."""


class _Entry:
    """A value of a config that is not known, times and plus known numbers."""

    def __init__(self, path, scale=1, shift=0):
        self.path, self.scale, self.shift = path, scale, shift

    def __mul__(self, other):
        self._check_number(other)
        return _Entry(self.path, self.scale * other, self.shift * other)

    __rmul__ = __mul__

    def __add__(self, other):
        self._check_number(other)
        return _Entry(self.path, self.scale, self.shift + other)

    __radd__ = __add__

    def __sub__(self, other):
        self._check_number(other)
        return _Entry(self.path, self.scale, self.shift - other)

    def __getitem__(self, name):
        if not isinstance(name, str):
            raise _NeedsValue(self.path)
        return _Entry((*self.path, name))

    def get(self, name, default=None):
        return default

    def _check_number(self, other):
        if isinstance(other, _Entry):
            raise _NeedsValue(other.path)
        if not isinstance(other, (int, float)):
            raise _NeedsValue(self.path)

    def _needs_value(self, *others):
        raise _NeedsValue(self.path)

    __bool__ = __int__ = __float__ = __iter__ = __len__ = _needs_value
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _needs_value
    __truediv__ = __floordiv__ = __mod__ = __contains__ = _needs_value
    __rsub__ = __rtruediv__ = __rfloordiv__ = _needs_value
    __hash__ = None

    def value(self, argument):
        """The value in the config, if this entry became `argument`."""
        if self.scale == 1 and not self.shift:
            return argument
        if not isinstance(argument, (int, float)):
            return argument
        value = (argument - self.shift) / self.scale
        whole = isinstance(argument, int) and value == int(value)
        return int(value) if whole else value


class _Entries(dict):
    """A config that has an entry for everything that it is asked for."""

    def __init__(self, values, asked, path=()):
        super().__init__(
            (name, _Entries(value, asked, (*path, name)))
            if isinstance(value, dict)
            else (name, value)
            for name, value in values.items()
        )
        self._asked, self._path = asked, path

    def __missing__(self, name):
        return _Entry((*self._path, name))

    def get(self, name, default=None):
        if name not in self:
            self._asked.append((*self._path, name))
        return super().get(name, default)


class _Conversion:
    """A converter's function of a config, for one backbone.

    Attributes:
        arguments: dict, the arguments of the backbone.
        asked: Paths of optional values that the converter asked for.
    """

    def __init__(self, backbone, converter):
        # The config of an adapted model has its adapters too.
        self.arguments = own_class(backbone).get_config(backbone)
        self._function = converter.convert_backbone_config
        parameters = inspect.signature(self._function).parameters
        more = [own_class(backbone), None][: len(parameters) - 1]
        self._more = more
        own = inspect.signature(converter.backbone_cls.__init__).parameters
        self._defaults = {
            name: parameter.default
            for name, parameter in own.items()
            # `None` stands for what the class finds out. Dropout that the
            # converter does not read matters to no checkpoint.
            if parameter.default not in (inspect.Parameter.empty, None)
            and "drop" not in name
        }
        for name in own:
            # Some backbones leave arguments out of their configs.
            value = getattr(backbone, name, None)
            if name not in self.arguments and isinstance(
                value, (bool, int, float, str)
            ):
                self.arguments[name] = value
        for name in ("name", "trainable", "dtype"):
            self.arguments.pop(name, None)
        self.asked = []

    def run(self, config):
        return self._function(_Entries(config, self.asked), *self._more)

    def result(self, config):
        """`(made, values, wrong)` of a config.

        They are the arguments, the values of its entries by path, and the
        names of the arguments that a backbone made from it would have
        differently.

        Raises:
            _NeedsValue: If another value is needed first.
        """
        made = self.run(config)
        values = _read(made, self.arguments)
        whole = {**self._defaults, **made}
        wrong = sorted(
            name
            for name, value in whole.items()
            if name in self.arguments
            and not _is(_fill(value, values), self.arguments[name])
        )
        return made, values, wrong


def config_of(backbone, model_type, converter):
    """The config of a backbone's checkpoint.

    Args:
        backbone: A backbone of KerasHub.
        model_type: string, as in a config of transformers.
        converter: The module of KerasHub that converts this type.

    Returns:
        `(config, wrong)`: a dict, and the names of the arguments of the
        backbone that a backbone made from the config would have differently.
    """
    conversion = _Conversion(backbone, converter)
    candidates = _candidates(conversion.arguments)
    config = {"model_type": model_type}
    chosen = []
    for _ in range(_MOST_VALUES):
        try:
            _, values, wrong = conversion.result(config)
            break
        except _NeedsValue as error:
            (path,) = error.args
            chosen.append(path)
            if not _choose(config, path, conversion, candidates):
                return config, sorted(conversion.arguments)
        except Exception:
            # It is KerasHub's code, which may raise anything on a config that
            # it does not expect. The caller is told that nothing is known.
            return config, sorted(conversion.arguments)
    else:
        return config, sorted(conversion.arguments)
    # An optional value is there only if it makes a difference. A value that was
    # chosen early may fit better now that the others are there.
    paths = list(dict.fromkeys([*chosen, *conversion.asked]))
    for path in paths:
        if wrong:
            wrong = _improve(config, [path], conversion, candidates, wrong)
    # Two values may be compared with each other.
    for pair in itertools.islice(itertools.permutations(paths, 2), _MOST_PAIRS):
        if wrong:
            wrong = _improve(config, pair, conversion, candidates, wrong)
    _, values, wrong = conversion.result(config)
    for path, value in values.items():
        _put(config, path, value)
    return config, wrong


def _choose(config, path, conversion, candidates):
    """Puts the value into a config with which most arguments fit."""
    best, fitting = None, -1
    for value in candidates:
        trial = _with(config, path, value)
        try:
            made, _, wrong = conversion.result(trial)
            score = 1 + len(made) - len(wrong)
        except _NeedsValue as error:
            # Another value is needed first. This one is at least possible.
            score = 0 if error.args != (path,) else -1
        except Exception:
            # KerasHub's code may raise anything on a value that is none.
            score = -1
        if score > fitting:
            best, fitting = value, score
    _put(config, path, best)
    return fitting >= 0


def _improve(config, paths, conversion, candidates, wrong):
    """Gives paths other values, both the same, if more arguments fit then.

    Args:
        config: A dict, which is changed.
        paths: The paths.
        conversion: A `_Conversion`.
        candidates: Values to try.
        wrong: The names of the arguments that do not fit now.

    Returns:
        The names of those that do not fit any more.
    """
    for value in candidates:
        trial = config
        for path in paths:
            trial = _with(trial, path, value)
        try:
            _, _, others = conversion.result(trial)
        except Exception:
            # KerasHub's code may raise anything on a value that is none.
            continue
        if len(others) < len(wrong):
            for path in paths:
                _put(config, path, value)
            wrong = others
    return wrong


def _with(config, path, value):
    """A copy of a config with a value."""
    config = copy.deepcopy(config)
    _put(config, path, value)
    return config


def _candidates(arguments):
    plain = []
    for value in arguments.values():
        plain += value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, (list, tuple)):
            plain.append(tuple(value))
    numbers = {
        value
        for value in plain
        if type(value) in (int, float) and value and math.isfinite(value)
    }
    ratios = [a / b for a, b in itertools.permutations(sorted(numbers), 2)]
    found = [False, True, None, *plain]
    found += [int(one) if one == int(one) else one for one in ratios]
    unique = []
    for value in found:
        if isinstance(value, (bool, int, float, str, tuple, type(None))):
            if not any(_is(value, other) for other in unique):
                unique.append(value)
    return unique


def _read(made, arguments):
    """dict from the paths of entries to their values."""
    values = {}

    def look(entry, argument):
        if isinstance(entry, _Entry):
            values.setdefault(entry.path, entry.value(argument))
        elif isinstance(entry, (list, tuple)):
            if isinstance(argument, (list, tuple)):
                for one, other in zip(entry, argument):
                    look(one, other)

    for name, entry in made.items():
        if name in arguments:
            look(entry, arguments[name])
    return values


def _fill(entry, values):
    if isinstance(entry, _Entry):
        value = values.get(entry.path)
        if entry.scale == 1 and not entry.shift:
            return value
        if isinstance(value, (int, float)):
            return value * entry.scale + entry.shift
        return value
    if isinstance(entry, (list, tuple)):
        return tuple(_fill(one, values) for one in entry)
    return entry


def _is(value, other):
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(_is, value, other))
    # Numbers and truth values are equal in Python, and not in a config.
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    return value == other


def _put(config, path, value):
    for name in path[:-1]:
        config = config.setdefault(name, {})
    config[path[-1]] = value


def own_class(model):
    """The class of a model, with or without adapters."""
    return getattr(type(model), "_own_class", None) or type(model)


def family_of(backbone):
    """The converter of a backbone, and the config of its checkpoint.

    Args:
        backbone: A Keras model.

    Returns:
        `(converter, config, wrong)`; see `config_of`. `None` where KerasHub
        has no converter.
    """
    converters = _compat.transformers_converters()
    own = own_class(backbone)
    if not converters or not _is_family(own):
        return None
    related = {
        model_type: converter
        for model_type, converter in converters.items()
        if issubclass(own, converter.backbone_cls)
        or issubclass(converter.backbone_cls, own)
    }
    exact = {
        model_type: converter
        for model_type, converter in related.items()
        if converter.backbone_cls is own
    }
    found = []
    for model_type, converter in (exact or related).items():
        config, wrong = config_of(backbone, model_type, converter)
        found.append((converter, config, wrong))
    if not found:
        return None
    # Ties are rare: a type without anything of its own comes first.
    return min(found, key=lambda one: len(one[2]))


def _is_family(cls):
    """Whether a class is that of a family, and not of all backbones."""
    import keras_hub

    base = keras_hub.models.Backbone
    return issubclass(cls, base) and cls is not base
