"""Checks of arguments, models and sites before a model is changed."""

import re
import warnings
from collections.abc import Iterable
from collections.abc import Mapping

import keras

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import configs
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import distribution
from keras_randadapt.model import parts
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import supported

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*")

#: Layers of KerasHub that multiply by a sublayer's `kernel` instead of calling
#: the sublayer. For a quantized kernel this is wrong, since only the sublayer
#: knows the scale.
_READS_KERNELS = {
    "Gemma4TextDecoderBlock",
    "Gemma4VisionDecoderBlock",
    "Gemma4ClippableEinsumDense",
}

#: Sublayers of KerasHub whose variable the layer around them reads, so that
#: no adapter is seen before a merge: the class around and the attribute.
_READ_RAW = {("SAM3GeometryEncoder", "cls_embed")}


def check_model(model):
    """Raises an error if adapters can't be attached to a model."""
    state_lib.check_is_model(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    if _compat.is_nnx_enabled():
        raise NotImplementedError(
            "Keras runs on NNX (`KERAS_NNX_ENABLED`), whose modules do not "
            "let their class be changed, which is how adapters are attached. "
            "Unset `KERAS_NNX_ENABLED`."
        )
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no layers with "
            "weights yet. Call it once on data or call `model.build(...)`, "
            "then inject."
        )
    state_lib.check_has_values(model)
    if state_lib.is_adapted(model):
        return
    owner = parts.owner_of(model)
    if owner is not None:
        raise ValueError(
            f"Model '{model.name}' is a part of model '{owner.name}', which "
            "has adapters attached. Inject into that one, or eject there first."
        )
    for layer in _compat.flatten_layers(model):
        if isinstance(layer, layer_lib.AdaptedLayer) or (
            isinstance(layer, keras.Model) and state_lib.is_adapted(layer)
        ):
            raise ValueError(
                f"A part of model '{model.name}' has adapters attached "
                f"already ('{layer.name}'). Inject into the same model as "
                "before, or eject there first."
            )
    if _compat.calls_in_graph(model):
        warnings.warn(
            f"Model '{model.name}' is used inside another model. Functions "
            "that `fit`, `predict` or `generate` of that model compile may "
            "still compute with the old adapters after adapters are attached, "
            "switched, disabled, merged or removed. Inject into the outermost "
            "model instead.",
            AdapterWarning,
            stacklevel=3,
        )


def check_adapter(adapter):
    """Raises an error unless `adapter` is an unbuilt adapter."""
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        raise TypeError(
            f"`adapter` must be an instance: write `{adapter.__name__}(...)`. "
            f"Received the class {adapter.__name__}"
        )
    if not isinstance(adapter, Adapter):
        raise TypeError(
            "`adapter` must be an adapter such as `RLoRA(512)`. "
            f"Received: adapter={adapter!r} (of type {type(adapter).__name__})"
        )
    if adapter.built:
        raise ValueError(
            "`adapter` is built already. `inject` takes an unbuilt template "
            f"and clones it: write `{type(adapter).__name__}(...)` anew."
        )
    for part in _compat.flatten_layers(adapter):
        if isinstance(part, Adapter):
            _check_registered(type(part))


def check_storable(adapter):
    """Raises `TypeError` if no file can hold an adapter's config."""
    try:
        configs.canonical(configs.serialize(adapter))
    except TypeError as error:
        raise TypeError(
            "`adapter` has an argument that no file can store, such as a "
            f"function: {error}. Received: adapter={adapter!r}"
        ) from error


def _check_registered(cls):
    name = keras.saving.get_registered_name(cls)
    if keras.saving.get_registered_object(name) is not cls:
        raise TypeError(
            f"Keras can't find the adapter class `{cls.__name__}` by its name "
            f"'{name}', so no file of it could ever be loaded. Decorate the "
            "class with "
            "`@keras.saving.register_keras_serializable(package=...)`."
        )


def is_name(value):
    """Whether an adapter can be called so."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def check_new_name(model, name):
    """Raises `ValueError` if an adapter can't be given this name."""
    if not is_name(name):
        raise ValueError(
            "`name` must consist of letters, digits, `_` and `-`, and start "
            f"with a letter or digit. Received: name={name!r}"
        )
    if state_lib.is_adapted(model) and name in model._randadapt.records:
        raise ValueError(
            f"Model '{model.name}' has an adapter called '{name}' already. "
            "Give another `name`, or eject that one first: "
            f"`keras_randadapt.eject(model, {name!r})`."
        )


def check_names(state, names):
    """Validates names of attached adapters.

    Args:
        state: A `AdaptedState`.
        names: A name or an iterable of names.

    Returns:
        A tuple of names.

    Raises:
        TypeError: If a name is no string.
        ValueError: If one of these adapters is not attached.
    """
    given = names
    if isinstance(names, Mapping):
        # Weights that are ignored would be a wrong result.
        raise TypeError(
            "Names of adapters must be a string or a list of strings here, "
            f"without weights. Received: {given!r}"
        )
    names = (names,) if isinstance(names, str) else names
    names = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"Names of adapters must be strings. Received: {given!r}. "
            f"Attached: {sorted(state.records)}"
        )
    for name in names:
        if name not in state.records:
            raise ValueError(
                f"There is no adapter called {name!r}. "
                f"Attached: {sorted(state.records)}"
            )
    return names


def one_name(state, name):
    """The given name of an attached adapter, or by default the only name."""
    if name is None:
        if len(state.records) > 1:
            raise ValueError(
                "The model has several adapters: say which with `name`. "
                f"Attached: {sorted(state.records)}"
            )
        (name,) = state.records
    check_names(state, [name])
    return name


def check_attachable(model, layers, addresses, kept):
    """Raises `ValueError` if one of these layers can't be a site or kept."""
    absent = [a for a in [*addresses, *kept] if a not in layers]
    if absent:
        raise ValueError(
            f"The model has no layer at the addresses {absent[:5]}."
        )
    owners = {}
    for layer in _compat.flatten_layers(model):
        for variable in _compat.owned_variables(layer):
            owners.setdefault(id(variable), []).append(layer)
    for address in addresses:
        supported.check_site(address, layers[address])
        _check_parent(address, layers)
        kernel = supported.kernel_variable(layers[address])
        if kernel is None:
            continue
        sharing = owners.get(id(kernel), [])
        (place,) = layers.named([address])
        if len(sharing) > 1:
            others = [
                x.path or x.name for x in sharing if x is not layers[address]
            ]
            raise ValueError(
                f"The kernel of '{place}' belongs to other layers as well "
                f"({others}): an adapter here would not reach them, and a "
                "merge would change them. Leave the layer out with `exclude`."
            )
        distribution.check_kernel(place, kernel)
    for address in kept:
        for layer in _compat.flatten_layers(layers[address]):
            if supported.has_keras_lora(layer):
                raise ValueError(
                    f"Layer '{layer.name}' of `keep_trainable` has Keras's own "
                    "LoRA enabled, which freezes its kernel, and "
                    "`keep_trainable` would train it. Build the model anew "
                    "without `enable_lora`, or leave the layer out."
                )
    _check_overlap(model, layers, addresses, kept)


def _check_overlap(model, layers, addresses, kept):
    """Raises `ValueError` if a kept layer contains a site or a kept layer.

    The values of kept layers are switched with their adapter, so each weight
    must belong to one kept layer.
    """
    all_sites, all_kept = list(addresses), list(kept)
    if state_lib.is_adapted(model):
        for record in model._randadapt.records.values():
            all_sites += record.addresses
            all_kept += record.kept
    for address in all_kept:
        nested = [a for a in all_kept if a.startswith(f"{address}/")]
        if nested:
            inner, outer = layers.named([nested[0], address])
            raise ValueError(
                f"'{inner}' and '{outer}', which contains it, would be "
                "kept trainable by different adapters. Let them keep the same "
                "layer, or layers that do not contain each other."
            )
        inside = [
            a for a in all_sites if a == address or a.startswith(f"{address}/")
        ]
        if inside:
            inner, outer = layers.named([inside[0], address])
            raise ValueError(
                f"'{inner}' is both a target and, by `keep_trainable` of "
                f"this or another adapter, part of '{outer}', whose own "
                "weights are trained. Choose one of the two: `exclude` takes "
                "layers out of the targets."
            )


def reads_kernel(address, layers):
    """Whether the layer around a layer multiplies by its kernel variable."""
    parent = layers.get(address.rpartition("/")[0])
    return type(parent).__name__ in _READS_KERNELS


def _check_parent(address, layers):
    layer = layers[address]
    parent = layers.get(address.rpartition("/")[0])
    attribute = address.rpartition("/")[2]
    if (type(parent).__name__, attribute) in _READ_RAW:
        raise ValueError(
            f"KerasHub's {type(parent).__name__} reads the variable of "
            f"'{layers.named([address])[0]}' and never calls the layer, so an "
            "adapter there would do nothing until it is merged. Leave it out "
            f"with `exclude={attribute!r}`."
        )
    reads = reads_kernel(address, layers)
    if layer.quantization_mode is not None and reads:
        raise ValueError(
            f"'{layers.named([address])[0]}' is quantized to "
            f"'{layer.quantization_mode}', and "
            f"KerasHub's {type(parent).__name__} multiplies by its integers "
            "without their scale. Leave it out with `exclude`, or do not "
            "quantize."
        )


def check_called(template, address, layers):
    """Raises `ValueError` if a method's changes are not all in the kernel.

    The check is for layers of KerasHub whose parent reads the kernel and does
    not call them. Other parents are found when they read it, see
    `sites.layer`.
    """
    if template.dropout and not getattr(layers[address], "takes_dropout", True):
        raise ValueError(
            "The kernels of a recurrent layer are adapted before the loop "
            "over time, so the adapter's `dropout` would be missed. Inject it "
            "with `dropout=0`, or leave the layer out with `exclude`. "
            f"Received: dropout={template.dropout}"
        )
    parent = layers.get(address.rpartition("/")[0])
    if not reads_kernel(address, layers):
        return
    missed = None
    if template.adapts_output:
        missed = "the change of its output"
    elif template.dropout:
        missed = "the adapter's `dropout`"
    if missed:
        raise ValueError(
            f"KerasHub's {type(parent).__name__} does not call "
            f"'{layers[address].name}' but reads its kernel, so {missed} would "
            "be missed. Leave it out with `exclude`."
        )
