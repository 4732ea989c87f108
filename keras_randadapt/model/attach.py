"""What changes of a model consist of: sites, classes, values, functions.

Adapters are attached in place: each site's layer gets a subclass of its own
class and an `AdapterStack` as a sublayer; the outermost model gets a subclass
of its own class. Layers keep their identity, names, paths and variables, so
whoever holds a reference to one goes on working. Every function here that
changes something gets the `transaction.Change` that the step belongs to.
"""

import contextlib
import dataclasses
import functools

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import adapted_model
from keras_randadapt.model import clones
from keras_randadapt.model import distribution
from keras_randadapt.model import exporting
from keras_randadapt.model import moving_state
from keras_randadapt.model import parts as parts_lib
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training
from keras_randadapt.model import transaction
from keras_randadapt.model import weighting
from keras_randadapt.model.site_layers import become_site
from keras_randadapt.model.site_layers import carry_gradients
from keras_randadapt.model.site_layers import stop_carrying
from keras_randadapt.optimizers import wrapper
from keras_randadapt.sites import lanes
from keras_randadapt.sites import quantized
from keras_randadapt.sites import stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attachment:
    """Adapters that were built for a model and are to be attached.

    Attributes:
        template: The template that the adapters are clones of.
        name: The adapter's name.
        layers: dict from structural address to layer; see `layers_of`.
        kept: Structural addresses of the layers to keep trainable.
        sources: See `Adapter.sources`.
        built: dict from the sites' addresses to built adapters.
        weight: The adapter's weight, if it becomes active.
        frozen: Whether it is not to be trained, if it becomes active.
    """

    template: Adapter
    name: str
    layers: dict[str, keras.layers.Layer]
    kept: list[str]
    sources: dict[str, str]
    built: dict[str, Adapter]
    weight: float = 1.0
    frozen: bool = False


@contextlib.contextmanager
def changing(model):
    """A change of the adapters of a model, in a block: all of it, or none.

    Args:
        model: A model that was checked.

    Yields:
        A `transaction.Change` whose `before` is what `refresh` has to know.
    """
    before = _before(model)
    # What callbacks attached was for the weights that were trained so far.
    training.release(model)
    with transaction.change(model) as change:
        change.before = before
        yield change


def attach(change, attachment):
    """Attaches built adapters at checked sites.

    Args:
        change: What `changing` gave.
        attachment: An `Attachment`.
    """
    model = change.model
    name, layers = attachment.name, attachment.layers
    built, kept = attachment.built, attachment.kept
    if not state_lib.is_adapted(model):
        _become_adapted(change, layers)
    record_common(change)
    carry_gradients(change)
    state = model._randadapt
    for address, adapter in built.items():
        become_site(change, layers[address])
        # A decomposition of a kernel may fail.
        _start(adapter, layers[address])
    for address, adapter in built.items():
        add_adapter(change, layers[address], name, adapter)
    for address, source in attachment.sources.items():
        become_site(change, layers[source])
        _connect(change, layers[source], layers[address], name)
    base_values = dict(state.base_values)
    held = {a for active in state.active for a in state.records[active].kept}
    for address in kept:
        if address not in held:
            base_values[address] = state_lib.kept_layer_values(layers[address])
    change.set(state, "base_values", base_values)
    record = state_lib.AdapterRecord(
        attachment.template, built, kept, attachment.sources
    )
    record.kept_values = {a: [v.copy() for v in base_values[a]] for a in kept}
    change.set(state, "records", {**state.records, name: record})
    if len(state.records) == 1:
        weighting.give(change, {name: attachment.weight})
        activate(change, (name,), train=() if attachment.frozen else (name,))
    else:
        training.apply_trainable(model)
    refresh(change)


def record_common(change):
    """Records what nearly every change touches; its first steps."""
    model = change.model
    # Taken back last, when all variables are there again.
    change.on_undo(functools.partial(_compat.refresh_torch_parameters, model))
    change.on_undo(
        functools.partial(restore_functions, compiled_functions(model))
    )
    change.record_flags()
    state = model._randadapt
    change.set(state, "functions", state.functions.copy())


def add_adapter(change, layer, name, adapter):
    """Adds a built adapter to the stack of a site."""
    change.attach_sublayer(layer.adapter, stack.attribute(name), adapter)


def remove_adapter(change, layer, name):
    """Takes an adapter off a site, and what other sites hand it."""
    adapters = layer.adapter
    for attribute in ("relays_in", "relays_out"):
        relays = tuple(r for r in getattr(adapters, attribute) if r[0] != name)
        change.set(adapters, attribute, relays)
    if adapters.get(name) is not None:
        change.detach_sublayer(adapters, stack.attribute(name))


def _connect(change, source, layer, name):
    """Lets an adapter of a site get the input of another site."""
    relay = stack.Relay()
    change.set(
        layer.adapter, "relays_in", (*layer.adapter.relays_in, (name, relay))
    )
    change.set(
        source.adapter,
        "relays_out",
        (*source.adapter.relays_out, (name, relay)),
    )


def _become_adapted(change, layers):
    model = change.model
    # It stays in KerasHub, where it does nothing for models without adapters.
    _compat.check_before_export(exporting.check_transformers_export)
    layer_flags = []
    variable_flags = []
    for layer in _compat.flatten_layers(model):
        layer_flags.append((layer, layer.trainable))
        for variable in _compat.owned_variables(layer):
            variable_flags.append((variable, variable.trainable))
    parts = _compat.flatten_layers(model)
    # The class is set first and taken back last: see `transaction.recover`.
    change.set(
        model,
        "_randadapt",
        state_lib.AdaptedState(
            layers,
            layer_flags,
            variable_flags,
            parts,
            moving_state.find(layers),
            use,
        ),
    )
    change.set(model, "__class__", adapted_model.adapted_class(type(model)))
    clones.keep_flags(change, layer_flags)
    change.record_flags()
    # A model frozen as a whole would train no adapter.
    _compat.set_layer_trainable_flag(model, True)
    for part in parts:
        change.on_undo(functools.partial(parts_lib.release, part, model))
        parts_lib.claim(part, model)


def leave_model(change):
    """Gives a model without adapters back what it had, but its class."""
    model = change.model
    state = model._randadapt
    stop_carrying(change)
    for part in state.parts:
        change.on_undo(functools.partial(parts_lib.claim, part, model))
        parts_lib.release(part, model)
    clones.forget_flags(change, state.layer_flags)
    transaction.restore_flags(state.layer_flags, state.variable_flags)


def models_of(model):
    """All models at and below a model."""
    return [
        layer
        for layer in _compat.flatten_layers(model)
        if isinstance(layer, keras.Model)
    ]


def _start(adapter, layer):
    """Gives an adapter the base kernel, if it asks for it."""
    if type(adapter).start_from is not Adapter.start_from:
        kernel = quantized.float_kernel(layer)
        view = keras.ops.cast(layer.to_view(kernel), "float32")
        view = np.array(keras.ops.convert_to_numpy(view))
        if adapter.site.stack is None:
            adapter.start_from(view)
        else:
            lanes.assign_each(adapter, type(adapter).start_from, view)


def show(model, names):
    """Makes the sites compute with these adapters, and nothing else.

    It may be repeated after it was interrupted.

    Args:
        model: An adapted model.
        names: Names of adapters.
    """
    state = model._randadapt
    state.functions.put_away(model, state.shown)
    forget_compiled(model)
    state.shown = tuple(names)
    for layer in state.changed_layers:
        layer.adapter.active_names = state.shown
        layer.adapter.frozen_names = state.frozen


def activate(change, names, freeze=True, train=None):
    """Switches the active adapters and the values of their kept layers.

    Args:
        change: A `transaction.Change`, in which `record_common` was called.
        names: Names of adapters.
        freeze: bool. Whether to set the `trainable` flags as well.
        train: Names of those of them that are to be trained. By default, all
            are that are not frozen now.
    """
    model = change.model
    state = model._randadapt
    moving_state.switch(change, names)
    base_values = dict(state.base_values)
    for name in state.active:
        if name not in names:
            record = state.records[name]
            found = {
                a: state_lib.kept_layer_values(state.layers[a])
                for a in record.kept
            }
            change.set(record, "kept_values", found)
            for address in record.kept:
                _assign(change, state.layers[address], base_values[address])
    for name in names:
        record = state.records[name]
        if record.kept_values is not None:
            for address, values in record.kept_values.items():
                layer = state.layers[address]
                # They may have been changed since this was done last.
                base_values[address] = state_lib.kept_layer_values(layer)
                _assign(change, layer, values)
            change.set(record, "kept_values", None)
    change.set(state, "base_values", base_values)
    # It is taken back once `active` and `frozen` are what they were.
    change.on_undo(functools.partial(show, model, state.shown))
    change.set(state, "active", tuple(names))
    if train is None:
        frozen = tuple(name for name in names if name in state.frozen)
    else:
        frozen = tuple(name for name in names if name not in train)
    change.set(state, "frozen", frozen)
    show(model, names)
    if freeze:
        training.apply_trainable(model)


def use(model, names, weights, train, always=False):
    """Makes adapters active, with weights, and trains some of them.

    Args:
        model: An adapted model.
        names, train: See `activate`.
        weights, always: See `weighting.give`.
    """
    with changing(model) as change:
        record_common(change)
        weighting.give(change, weights, always)
        activate(change, names, train=train)
        refresh(change)


def assign_kept(change, name, values):
    """Gives the kept layers of an adapter values, active or not.

    Args:
        change: A `transaction.Change`.
        name: The adapter's name.
        values: dict from address to list of arrays.
    """
    state = change.model._randadapt
    record = state.records[name]
    if record.kept_values is not None:
        change.set(record, "kept_values", values)
        return
    for address, arrays in values.items():
        _assign(change, state.layers[address], arrays)


def _assign(change, layer, values):
    for weight, value in zip(layer.weights, values, strict=True):
        change.assign(weight, value)


def compiled_functions(model):
    """The step functions of a model and the models in it."""
    return {part: _compat.compiled_functions(part) for part in models_of(model)}


def functions_of_fit(model):
    """The step functions of a `fit` that a callback's block interrupts.

    `fit` goes on with them after the block, and on JAX a callback finds the
    variables' values of the moment only once they are asked for.
    """
    if not model._randadapt.fitting:
        return {}
    _compat.sync_jax_state(model)
    return compiled_functions(model)


def restore_functions(functions):
    """Puts step functions back.

    Args:
        functions: What `compiled_functions` gave.
    """
    for part, by_attribute in functions.items():
        for attribute, function in by_attribute.items():
            setattr(part, attribute, function)


def _before(model):
    """The variables of a model and those it trains, and a fresh optimizer.

    A fresh optimizer is made now: where its config can't be read back, the
    error comes before anything has changed.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        distribution.check_scope(model)
        fresh = type(optimizer).from_config(optimizer.get_config())
    else:
        fresh = None
    # All variables and not their ids, which new ones could get.
    return model.variables, model.trainable_variables, fresh


def forget_compiled(model):
    """Drops the compiled functions of a model and of the models in it."""
    for part in models_of(model):
        _compat.reset_compiled_functions(part)


def refresh(change):
    """Makes Keras see the model as it is now.

    Args:
        change: A `transaction.Change`.
    """
    model = change.model
    state = model._randadapt
    variables_before, trained_before, fresh = change.before
    forget_compiled(model)
    _compat.refresh_torch_parameters(model)
    if list(map(id, model.variables)) == list(map(id, variables_before)):
        state.functions.bring_back(model, state.shown)
    else:
        state.functions.clear()
    trained = model.trainable_variables
    changed = list(map(id, trained)) != list(map(id, trained_before))
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    if not changed or fresh is None:
        fresh = optimizer
        change.on_undo(
            functools.partial(
                wrapper.restore_exclusions, wrapper.exclusions(optimizer)
            )
        )
    wrapper.copy_exclusions(optimizer, fresh, model.variables)
    wrapped = training.wrapped_optimizer(model, fresh, state.trained)
    if wrapped is not optimizer:
        change.set(model, "optimizer", wrapped)
