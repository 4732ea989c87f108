"""What `inject` warns of."""

import inspect
import warnings

import keras

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import linear
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import layer_of

#: The share of a model's parameters above which `"all-linear"` tells what it
#: leaves out.
_MUCH = 0.1


def _has_training_delta(template):
    return any(
        type(part).training_delta_kernel is not Adapter.training_delta_kernel
        for part in _compat.flatten_layers(template)
        if isinstance(part, Adapter)
    )


def warn_of_frozen_head(model, layers, chosen, kept):
    """Warns of the head of a KerasHub task that no one trains.

    A task that generates has the head of its preset. The heads of the others
    start at random, unless a preset of the task is loaded. A user who has such
    a head sets its `trainable` flag to `False` before `inject`.

    Args:
        model: The model.
        layers: dict from structural address to layer.
        chosen: The addresses of the sites.
        kept: The addresses of the layers that stay trainable. Those of other
            adapters count too.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model) or hasattr(model, "generate"):
        return
    if state_lib.is_adapted(model):
        records = model._randadapt.records.values()
        kept = [*kept, *(a for record in records for a in record.kept)]
    inside = {id(layer) for layer in _compat.flatten_layers(backbone)}
    trainable = _trainable_at_first(model)
    heads = [
        address
        for address, layer in layers.items()
        if id(layer) not in inside
        and address not in chosen
        and not linear.is_below(address, kept)
        and any(trainable(layer, v) for v in _compat.owned_variables(layer))
    ]
    if heads:
        names = [layers[address].name for address in heads]
        warnings.warn(
            f"The head of task '{model.name}' is not in `keep_trainable`, so "
            f"the adapter learns in front of a frozen one: {names[:5]}. It is "
            "random unless the preset has it. Give "
            f"`keep_trainable={names[:5]}`, or, if the head is trained "
            "already, set `trainable = False` on it before `inject`.",
            AdapterWarning,
            stacklevel=3,
        )


def _trainable_at_first(model):
    """A function: whether a variable was trainable before any injection."""
    if not state_lib.is_adapted(model):
        return lambda layer, variable: layer.trainable and variable.trainable
    state = model._randadapt
    flags = {id(variable): flag for variable, flag in state.variable_flags}
    owners = {id(layer): flag for layer, flag in state.layer_flags}
    return lambda layer, variable: (
        owners.get(id(layer)) and flags.get(id(variable))
    )


def warn_of_inference_in_fit(model, template):
    """Warns if `fit` will not tell the adapter that it is training."""
    if "training" in inspect.signature(model.call).parameters:
        return
    if template.dropout or _has_training_delta(template):
        warnings.warn(
            f"`{type(model).__name__}.call` takes no `training` argument, so "
            "Keras's `fit` runs the model as in inference: without dropout, "
            "and without the method's changes that apply only in training. "
            "Add the argument to `call`.",
            AdapterWarning,
            stacklevel=3,
        )


def warn_of_frozen_in_kept(layers, kept):
    """Warns of layers in `keep_trainable` that have integer kernels."""
    frozen = [
        layer.path or layer.name
        for address in kept
        for layer in _compat.flatten_layers(layers[address])
        # Kernels in float8 are floats and can be trained.
        if "float" not in (getattr(layer, "quantization_mode", None) or "float")
    ]
    if frozen:
        warnings.warn(
            f"{len(frozen)} layers of `keep_trainable` are quantized, so only "
            f"their biases can be trained: {frozen[:5]}. Leave them out of "
            "`quantize` with its `filters`.",
            AdapterWarning,
            stacklevel=3,
        )


def warn_of_missed_biases(layers, chosen, kept, kinds):
    """Warns of layers whose biases are not trained, if all biases should be.

    These are layers without a bias, and layers with a bias whose class can't
    be adapted.
    """
    inside = {
        id(layer)
        for address in kept
        for layer in _compat.flatten_layers(layers[address])
    }
    # The bias of a layer with several kernels belongs to one of them, and a
    # cell's belongs to the layer around it.
    inside |= {id(layer_of(layers[address])) for address in chosen}
    inside |= {
        id(layers[address])
        for address, kernels in layers.kernels.items()
        if not set(kernels).isdisjoint(chosen)
    }
    without, other = [], []
    for address, layer in layers.items():
        if id(layer_of(layer)) in inside or not layer.built:
            continue
        if supported.supported_class(layer, kinds) is not None:
            without.append(address)
        elif isinstance(getattr(layer, "bias", None), keras.Variable):
            other.append(address)
    for missed, words in (
        (without, "Layers without a bias are left out: "),
        (other, "Biases of layers that can't be adapted stay frozen: "),
    ):
        if missed:
            more = len(missed) - 5
            warnings.warn(
                f"{words}{layers.named(missed[:5])}"
                + (f" and {more} more." if more > 0 else "."),
                AdapterWarning,
                stacklevel=3,
            )


def warn_of_left_out(model, layers, left_out, targets):
    """Warns of layers that `targets` means and that get no adapter.

    Routers, gates and heads are part of what `"all-linear"` leaves out, so it
    is told only where that is much of the model.

    Args:
        model: The model.
        layers: dict from structural address to layer.
        left_out: See `Report`.
        targets: See `inject`.
    """
    if not left_out:
        return
    share = sum(left_out.values()) / max(1, model.count_params())
    if isinstance(targets, str) and targets == "all-linear":
        if share <= _MUCH:
            return
        words = '`targets="all-linear"` leaves out'
    else:
        words = "`targets` also means layers that are not adapted,"
    shown = [
        f"{place} ({type(layers[address]).__name__})"
        for address, place in zip(left_out, layers.named(left_out))
    ]
    more = len(shown) - 5
    warnings.warn(
        f"{words} {100 * share:.2g} % of the parameters: {shown[:5]}"
        + (f" and {more} more" if more > 0 else "")
        + ". They stay as they are. The report has all of them as `left_out`.",
        AdapterWarning,
        stacklevel=3,
    )
