"""`name_map`: the modules of transformers that hold the sites of a model."""

import difflib
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import state as state_lib
from keras_randadapt.peft import experts
from keras_randadapt.peft import family
from keras_randadapt.peft import hub_config
from keras_randadapt.peft import parts as parts_lib
from keras_randadapt.peft import recording
from keras_randadapt.peft import shapes as shapes_lib
from keras_randadapt.peft.parts import ModulePart
from keras_randadapt.sites import supported

_KERNELS = ("kernel", "embeddings", *_compat.TABLES.values())


class NameMap:
    """Which modules of transformers hold which sites. `print` it.

    Attributes:
        model_type: The type of the model in transformers, such as `"llama"`.
        prefix: The name under which task classes of transformers hold the
            base model, such as `"model"`, or `""`.
        parts: dict from the structural address of a site to a tuple of
            `ModulePart`. A site that several modules hold has several.
        refused: dict from the address of a layer that could be a site to a
            string that says why no module holds it.
        variables: dict from the name of a tensor in checkpoints to a list of
            `(variable, origin)`, the variables whose values are in it.
        config: The config of the checkpoint, as far as KerasHub knows it.
        config_differs: Names of arguments of the backbone that the config does
            not give.
        lost: dict from the path of a variable to a string that says why its
            values can't go back to a checkpoint.
        lost_keys: The names of the tensors of these variables.
        record: Function that runs KerasHub's converter once more, with a dict
            of tensors of a checkpoint, and gives `recording.Recording`s.
        stopped: Why KerasHub's converter stopped half-way, or `""`.

    Example:

    ```python
    names = kra.peft.name_map(classifier)
    print(names.model_type, names.modules()[:2])
    ```
    """

    def __init__(self, model_type: str, prefix: str):
        self.model_type = model_type
        self.prefix = prefix
        self.parts: dict[str, tuple[ModulePart, ...]] = {}
        self.refused: dict[str, str] = {}
        self.variables: dict[str, list] = {}
        self.config: dict[str, Any] = {}
        self.config_differs: list[str] = []
        self.lost: dict[str, str] = {}
        self.lost_keys: set[str] = set()
        self.record: Callable[[dict], Iterable] = lambda arrays: ()
        self.stopped = ""
        self._known: dict[str, str] = {}

    def modules(self) -> list[str]:
        """The names of all modules that hold a site, each once."""
        return list(self.by_module())

    def by_module(self) -> dict[str, list[tuple[str, ModulePart]]]:
        """dict from module to a list of `(address, part)`."""
        found: dict[str, list[tuple[str, ModulePart]]] = {}
        for address, parts in self.parts.items():
            for part in parts:
                found.setdefault(part.module, []).append((address, part))
        return found

    def find(self, module: str) -> str | None:
        """The module of the map that a name means, or `None`.

        Args:
            module: A name with or without the prefix. It may also be the one
                of checkpoint files.
        """
        if not self._known:
            for ours, places in self.by_module().items():
                for name in (ours, places[0][1].file_module):
                    self._known[name] = ours
                    self._known[name.removeprefix(f"{self.prefix}.")] = ours
        return self._known.get(module)

    def near(self, module: str) -> list[str]:
        """Names of modules that look like one that is not in the map."""
        return difflib.get_close_matches(module, self.modules(), 3)

    def __str__(self):
        lines = [
            f"{len(self.parts)} sites in modules of transformers' "
            f"'{self.model_type}', and {len(self.refused)} in none:"
        ]
        width = max(map(len, (*self.parts, *self.refused)), default=0)
        for address, parts in self.parts.items():
            for part in parts:
                lines.append(
                    f"  {address.ljust(width)}  {part.module} "
                    f"({part.kind}, {part.describe()})"
                )
        for address, why in self.refused.items():
            lines.append(f"  {address.ljust(width)}  none: {why}")
        return "\n".join(lines)

    __repr__ = __str__


def name_map(model: keras.Model) -> NameMap:
    """The modules of transformers that hold the layers of a KerasHub model.

    It is derived from the converter with which KerasHub loads checkpoints of
    transformers: the converter is run on stand-ins, and what it assigns to
    each variable is noted. Nothing is downloaded and nothing in the model
    changes. A site is in the map if a low-rank update of its kernel view is
    exactly one of the modules' weights.

    Args:
        model: A backbone or task of KerasHub, with or without adapters.

    Returns:
        A `NameMap`.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model has no KerasHub backbone, or if KerasHub has
            no converter for its class.

    Example:

    ```python
    print(kra.peft.name_map(classifier))
    ```
    """
    state_lib.check_is_model(model)
    layers = state_lib.layers_of(model)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model):
        backbone = model
    found = hub_config.family_of(backbone)
    if found is None:
        raise ValueError(
            "KerasHub has no converter from transformers for a "
            f"{type(backbone).__name__}, so the names of its layers there are "
            "not known. `kra.peft` takes KerasHub's backbones and tasks of "
            "the families that `from_preset` can load from Hugging Face. "
            f"Received: model={model.name!r} (of type {type(model).__name__})"
        )
    converter, config, wrong = found
    names = NameMap(
        config["model_type"], family.prefix_of(config["model_type"])
    )
    names.config, names.config_differs = config, wrong

    def record(arrays):
        yield recording.record(
            converter.convert_weights, backbone, config, arrays
        )
        if backbone is not model and hasattr(converter, "convert_head"):
            yield recording.record(
                converter.convert_head, model, config, arrays
            )

    names.record = record
    _fill(names, layers, list(record({})))
    return names


class _Same:
    """Arrays that compare equal if all their numbers do."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __eq__(self, other):
        return _are_equal(self.arrays, other.arrays)


def _are_equal(ours, theirs):
    if isinstance(ours, np.ndarray) or ours is None:
        return np.array_equal(ours, theirs)
    return len(ours) == len(theirs) and all(map(_are_equal, ours, theirs))


def _fill(names, layers, runs):
    assignments = [one for run in runs for one in run.assignments]
    addresses = {id(layer): address for address, layer in layers.items()}
    stacked = {
        layer.key: address
        for address, layer in layers.items()
        if getattr(layer, "stack", None) is not None
    }
    sites = {
        address: layer
        for address, layer in layers.items()
        if supported.supported_class(layer) is not None and layer.built
    }
    cache = {}

    def split(one, origin):
        # Layers of one kind share arrays.
        key = (
            id(origin.coordinates),
            type(one.layer).__name__,
            getattr(one.layer, "equation", None),
            origin.shapes,
        )
        if key not in cache:
            found = parts_lib.splits(one.layer, origin)
            # The arrays are kept, so that no other ones get their `id`.
            cache[key] = (found, origin.coordinates)
        return cache[key][0]

    def is_site(one):
        return (
            one.attribute in _KERNELS and addresses.get(id(one.layer)) in sites
        )

    def axes(one):
        if one.attribute == "bias":
            return 1
        return parts_lib.axes_of(one.layer) if is_site(one) else None

    def accept(one, origin):
        if not is_site(one):
            return _Same(origin.coordinates)
        found = split(one, origin)
        return None if found is None else _Same([s[1:] for s in found])

    origins, refused = shapes_lib.origins_of(assignments, axes, accept)
    whole = dict(origins)
    for i in refused:
        # A layer may be filled by what is no module's, such as a parameter.
        if is_site(assignments[i]):
            found, _ = shapes_lib.origins_of(
                [assignments[i]],
                lambda one: None,
                lambda one, origin: _Same(origin.coordinates),
            )
            whole.update({i: origin for origin in found.values()})
    prefixed = any(
        key.startswith(f"{names.prefix}.")
        for origin in origins.values()
        for key in origin.keys
    )
    for i, one in enumerate(assignments):
        address = addresses.get(id(one.layer))
        for key in whole[i].keys if i in whole else ():
            names.variables.setdefault(key, []).append((one, whole[i]))
        if i in refused:
            if one.value is not None and i not in whole:
                names.lost[one.variable.path] = refused[i]
                names.lost_keys.update(one.value.keys())
            if is_site(one):
                names.refused[address] = refused[i]
            elif (id(one.layer), one.attribute) in stacked:
                address = stacked[id(one.layer), one.attribute]
                names.refused[address] = refused[i]
        elif is_site(one):
            origin = origins[i]
            _add_site(names, address, one, origin, split(one, origin), prefixed)
        elif (id(one.layer), one.attribute) in stacked:
            address = stacked[id(one.layer), one.attribute]
            _add_experts(names, address, one, origins[i], prefixed)
    stopped = names.stopped = "; ".join(r.stopped for r in runs if r.stopped)
    for address in sites:
        if address not in names.parts and address not in names.refused:
            names.refused[address] = (
                f"KerasHub's converter stopped before it: {stopped}"
                if stopped
                else "KerasHub's converter does not fill it"
            )
    # The order is the model's, as everywhere.
    names.parts = {a: names.parts[a] for a in sites if a in names.parts}
    names.refused = {a: names.refused[a] for a in sites if a in names.refused}
    _refuse_incomplete(names)


def _add_site(names, address, one, origin, splits, prefixed):
    parameters = [k for k in origin.keys if not k.endswith(".weight")]
    if parameters:
        names.refused[address] = (
            f"'{parameters[0]}' is a parameter in transformers, and no module"
        )
        return
    routers = [k for k in origin.keys if family.is_router(k[: -len(".weight")])]
    if routers:
        names.refused[address] = (
            f"'{routers[0]}' is a router's, which is no linear layer in "
            "transformers, so PEFT does not adapt it"
        )
        return
    if getattr(one.layer, "tie_weights", False):
        names.refused[address] = (
            "the embedding and the output head share its weights, and PEFT "
            "adapts one of the two"
        )
        return
    parts = []
    for key, split, shape in zip(origin.keys, splits, origin.shapes):
        kind, columns, inputs, outputs = split
        module = key.removesuffix(".weight")
        if names.prefix and not prefixed:
            module = f"{names.prefix}.{module}"
        parts.append(
            ModulePart(
                module=family.renamed(names.model_type, module),
                file_module=module,
                kind=kind,
                weight_shape=shape,
                columns=columns,
                inputs=inputs,
                outputs=outputs,
            )
        )
    names.parts[address] = tuple(parts)


def _add_experts(names, address, one, origin, prefixed):
    found = experts.place_of(names.model_type, origin)
    if isinstance(found, str):
        names.refused[address] = found
        return
    module, weight_shape, inputs, outputs = found
    if names.prefix and not prefixed:
        module = f"{names.prefix}.{module}"
    part = ModulePart(
        module=family.renamed(names.model_type, module),
        file_module=module,
        kind="experts",
        weight_shape=weight_shape,
        columns=np.arange(len(outputs)),
        inputs=inputs,
        outputs=outputs,
    )
    names.parts[address] = (part,)


def _refuse_incomplete(names):
    """Takes out sites of modules that the sites do not hold exactly once."""
    for module, places in names.by_module().items():
        outputs = np.concatenate([part.outputs for _, part in places])
        n_out = places[0][1].dims[1]
        if len(np.unique(outputs)) < len(outputs):
            why = f"other layers have the weights of '{module}' too"
        elif len(outputs) < n_out:
            why = (
                f"the sites have {len(outputs):,} of the {n_out:,} outputs of "
                f"'{module}'"
            )
        else:
            continue
        for address, _ in places:
            names.parts.pop(address, None)
            names.refused[address] = why
