"""Experts in PEFT's format: their parameters, and where their tensors are.

transformers 5 holds the kernels of all experts of a layer in two parameters of
one module. PEFT adapts a parameter by a wrapper around its module, so that two
parameters of one module have two wrappers, one in the other. The names of its
tensors tell how deep a wrapper is, and not whose it is.
"""

import re
import reprlib

import numpy as np

from keras_randadapt.peft import family

_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_PARAMETER = re.compile(
    rf"(.*\.experts)\.({'|'.join(family.EXPERT_PARAMETERS)})"
)
_LAYER_OF_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_WRAPPER = ".base_layer"


def place_of(model_type, origin):
    """The parameter of transformers that holds a stacked kernel.

    Args:
        model_type: string, as in a config of transformers.
        origin: A `shapes.Origin` of the kernel, `(experts, input, output)`.

    Returns:
        `(module, weight_shape, inputs, outputs)`, as in a `ModulePart`, or a
        string that says why there is none.
    """
    if origin.coordinates is None:
        shape = origin.shapes[0]
        coordinates = np.ogrid[tuple(map(slice, shape))]
        coordinates = [np.broadcast_to(one, shape) for one in coordinates]
    else:
        coordinates = origin.coordinates
    several = [_ONE_EXPERT.fullmatch(key) for key in origin.keys]
    if all(several):
        found = _of_several(model_type, origin, coordinates, several)
    else:
        found = _of_one(origin, coordinates)
    if found is None:
        return (
            f"the experts of '{origin.keys[0]}' are in no parameter of "
            "transformers in a way that is known"
        )
    return found


def _of_several(model_type, origin, coordinates, matches):
    """Experts of a checkpoint that has a tensor for each of their layers."""
    known = family.expert_layers(model_type)
    stems = {match[1] for match in matches}
    if len(stems) != 1 or not all(match[3] in known for match in matches):
        return None
    places = [known[match[3]] for match in matches]
    parameters = {parameter for parameter, _ in places}
    owner = origin.owner
    if owner is None:
        owner = np.zeros(coordinates[0].shape, np.int32)
    rows = _line(coordinates[1], 1)
    columns = _line(coordinates[0], 2)
    owners = _line(owner, 2)
    if len(parameters) != 1 or rows is None or columns is None:
        return None
    if owners is None:
        return None
    # Every expert's tensors are in its own slice of the kernel.
    numbers = np.array([int(match[2]) for match in matches])
    experts = np.arange(len(owners))[:, None]
    if not np.array_equal(numbers[owners], experts + 0 * owners):
        return None
    (parameter,) = parameters
    size = origin.shapes[0][0]
    first = np.array([size * half for _, half in places])
    outputs = columns + first[owners]
    halves = family.halves_of(parameter)
    return _checked(
        f"{stems.pop()}.{parameter}",
        (len(owners), halves * size, origin.shapes[0][1]),
        rows,
        outputs,
    )


def _of_one(origin, coordinates):
    """Experts of a checkpoint that has the parameter itself."""
    match = _PARAMETER.fullmatch(origin.keys[0])
    if len(origin.keys) > 1 or match is None or len(coordinates) != 3:
        return None
    experts, *others = coordinates
    shape = list(origin.shapes[0])
    rows, columns = _line(others[1], 1), _line(others[0], 2)
    if rows is None or columns is None:
        # The parameter is `(experts, inputs, outputs)`.
        rows, columns = _line(others[0], 1), _line(others[1], 2)
        shape[1:] = shape[:0:-1]
    count = np.arange(experts.shape[0])[:, None, None]
    if rows is None or columns is None or np.any(experts != count):
        return None
    return _checked(match[0], tuple(shape), rows, columns)


def _line(array, axis):
    """The numbers along an axis, for each expert, if others do not matter."""
    along = array[:, :, :1] if axis == 1 else array[:, :1, :]
    if np.any(array != along):
        return None
    return along.reshape(len(along), -1)


def _checked(module, weight_shape, rows, columns):
    """The place, if it is the same for all experts and takes every input."""
    if np.any(rows != rows[:1]) or np.any(columns != columns[:1]):
        return None
    inputs, outputs = rows[0], columns[0]
    if not np.array_equal(np.sort(inputs), np.arange(weight_shape[2])):
        return None
    if len(np.unique(outputs)) != len(outputs):
        return None
    return module, weight_shape, inputs, outputs


def starts_of(parameters):
    """The starts of the names of tensors of adapted parameters.

    Args:
        parameters: The names of all parameters that are adapted, such as
            `"model.layers.0.mlp.experts.down_proj"`.

    Returns:
        dict from a name to the module whose wrapper adapts it, such as
        `"model.layers.0.mlp.experts"`.
    """
    starts = {}
    for module, inside in _by_module(parameters).items():
        # The wrapper of the last parameter is around all others.
        for depth, parameter in enumerate(reversed(inside)):
            starts[f"{module}.{parameter}"] = module + _WRAPPER * depth
    return starts


def _by_module(parameters):
    found = {}
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        found.setdefault(module, []).append(parameter)
    return {
        module: sorted(inside, key=family.EXPERT_PARAMETERS.index)
        for module, inside in found.items()
    }


def named(path, targets, modules):
    """Gives what was read of wrappers the names of their parameters.

    Args:
        path: The directory, for errors.
        targets: `target_parameters` of the config: names or their ends.
        modules: dict from module to what belongs to it, as the names of
            tensors have it.

    Returns:
        `(modules, parameters)`: the dict with other keys, in the same order,
        and the list of those that are parameters.

    Raises:
        ValueError: If a wrapper has no parameter, or a parameter no wrapper.
    """
    depths = {}
    for module in modules:
        bare = module
        while bare.endswith(_WRAPPER):
            bare = bare.removesuffix(_WRAPPER)
        depths.setdefault(bare, []).append(module)
    parameters = [
        f"{module}.{parameter}"
        for module in depths
        if module.rpartition(".")[2] == "experts"
        for parameter in family.EXPERT_PARAMETERS
        if _is_target(f"{module}.{parameter}", targets)
    ]
    others = [
        target
        for target in targets
        if not any(_is_target(name, [target]) for name in parameters)
    ]
    if others:
        raise ValueError(
            f"'{path}' has target_parameters = {targets}, and "
            f"{reprlib.repr(others[0])} is not one of the parameters "
            f"{list(family.EXPERT_PARAMETERS)} of a module `experts` that it "
            "has tensors for. Merge it with PEFT (`merge_and_unload`) instead."
        )
    starts = starts_of(parameters)
    new = {start: name for name, start in starts.items()}
    for bare, found in depths.items():
        wanted = [s for s in new if s == bare or s.startswith(bare + _WRAPPER)]
        is_wrapped = wanted or found != [bare]
        if is_wrapped and sorted(wanted) != sorted(found):
            raise ValueError(
                f"'{path}' has tensors for {len(found)} wrappers of the module "
                f"'{bare}', and its `target_parameters` mean {len(wanted)} of "
                f"the parameters {list(family.EXPERT_PARAMETERS)} there: "
                f"{targets}. Other parameters can't be read."
            )
    return {new.get(m, m): one for m, one in modules.items()}, list(starts)


class Gathered:
    """Updates of the layers of single experts, as those of their parameters.

    transformers 4 has a module for each layer of each expert, and so have the
    adapters that PEFT made for it.

    Args:
        path: The directory, for errors.
        names: A `NameMap`.
    """

    def __init__(self, path, names):
        self._path, self._names = path, names
        self._places = names.by_module()
        self._found = {}

    def shape_of(self, module):
        """The shape of the weight of an expert's layer, or `None`.

        Args:
            module: The name of a module, as the directory has it.
        """
        place = self._place(module)
        if place is None:
            return None
        parameter, _, part = place
        experts, outputs, inputs = self._places[parameter][0][1].weight_shape
        number = int(_LAYER_OF_EXPERT.fullmatch(module)[2])
        if number >= experts:
            raise ValueError(
                f"'{self._path}' adapts '{module}', and this model has "
                f"{experts} experts, from 0 on. The adapter is of a larger "
                "model."
            )
        return outputs // family.halves_of(parameter.rpartition(".")[2]), inputs

    def add(self, module, update):
        """Keeps the update of an expert's layer, a `methods.Update`."""
        if update.a is None or update.magnitude is not None:
            raise ValueError(
                f"'{self._path}' adapts '{module}', a layer of one expert, by "
                "a method that does more than adding a low-rank update, such "
                "as DoRA or IA3. `kra.peft.load` takes a LoRA of experts."
            )
        parameter, number, part = self._place(module)
        updates = self._found.setdefault(parameter, {})
        if (number, part) in updates:
            raise ValueError(
                f"'{self._path}' holds the module '{module}' twice, with and "
                "without the prefix."
            )
        updates[number, part] = update

    def updates(self, make):
        """dict from the parameters to their updates.

        Args:
            make: Function of `a`, `b` and a scaling, that makes an update.
        """
        return {
            parameter: self._joined(parameter, updates, make)
            for parameter, updates in self._found.items()
        }

    def _place(self, module):
        """`(parameter, expert, part)` of an expert's layer, or `None`."""
        match = _LAYER_OF_EXPERT.fullmatch(module)
        known = family.expert_layers(self._names.model_type)
        if match is None or match[3] not in known:
            return None
        parameter, part = known[match[3]]
        found = self._names.find(f"{match[1]}.{parameter}")
        if found is None or self._places[found][0][1].kind != "experts":
            return None
        return found, int(match[2]), part

    def _joined(self, parameter, updates, make):
        shape = self._places[parameter][0][1].weight_shape
        parts = family.halves_of(parameter.rpartition(".")[2])
        rank = max(len(one.a) for one in updates.values())
        scalings = {one.scaling for one in updates.values()}
        common = scalings.pop() if len(scalings) == 1 else None
        a = np.zeros((shape[0], parts, rank, shape[2]))
        b = np.zeros((shape[0], parts, shape[1] // parts, parts, rank))
        for (number, part), one in updates.items():
            own = slice(len(one.a))
            factor = 1.0 if common is not None else one.scaling
            a[number, part, own] = one.a
            b[number, part, :, part, own] = factor * one.b
        return make(
            a=a.reshape(shape[0], parts * rank, shape[2]),
            b=b.reshape(shape[0], shape[1], parts * rank),
            scaling=1.0 if common is None else common,
        )

    def missing(self, targets):
        """Experts' layers that names mean and that have no update.

        Args:
            targets: `target_modules` of a config.

        Returns:
            list of names.
        """
        if not isinstance(targets, list):
            return []
        targets = [one for one in targets if isinstance(one, str)]
        layers = family.expert_layers(self._names.model_type)
        lacking = []
        for parameter, updates in self._found.items():
            module, _, name = parameter.rpartition(".")
            for layer, (held, part) in layers.items():
                if held != name:
                    continue
                experts = self._places[parameter][0][1].weight_shape[0]
                lacking += [
                    f"{module}.{number}.{layer}"
                    for number in range(experts)
                    if (number, part) not in updates
                    and _is_target(f"{module}.{number}.{layer}", targets)
                ]
        return lacking


def _is_target(name, targets):
    return any(name == one or name.endswith(f".{one}") for one in targets)
