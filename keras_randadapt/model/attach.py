"""Attaching built adapters in place, and what every change of a model does.

Adapters are attached in place: each site's layer gets a subclass of its own
class and an `AdapterStack` as a sublayer; the outermost model gets a subclass
of its own class. Layers keep their identity, names, paths and variables, so
whoever holds a reference to one goes on working.
"""

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import adapted_model
from keras_randadapt.model import parts as parts_lib
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training
from keras_randadapt.optimizers import wrapper
from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import quantized
from keras_randadapt.sites import stack
from keras_randadapt.sites import supported


def attach(model, template, name, addresses, kept, layers, built, sources):
    """Attaches built adapters at checked sites: the part that changes things.

    Args:
        model: A built model.
        template: The template that the adapters are clones of.
        name: The adapter's name.
        addresses: Structural addresses of the sites.
        kept: Structural addresses of the layers to keep trainable.
        layers: dict from structural address to layer; see `layers_of`.
        built: dict from address to adapter; see `build_adapters`.
        sources: See `Adapter.sources`.
    """
    before = before_change(model)
    if not state_lib.is_adapted(model):
        become_adapted(model, layers)
    state = model._randadapt
    try:
        for address in addresses:
            _become_site(layers[address])
            _start(built[address], layers[address])
    except BaseException:
        # A decomposition of a kernel may fail, or be interrupted.
        for address in addresses:
            leave_unused_site(state, address)
        if not state.records:
            leave_model(model)
        raise
    for address in addresses:
        layers[address].adapter.add(name, built[address])
    for address, source in sources.items():
        _become_site(layers[source])
        layers[address].adapter.listen_to(layers[source].adapter, name)
    record = state_lib.AdapterRecord(template, addresses, kept, sources)
    held = {a for active in state.active for a in state.records[active].kept}
    for address in kept:
        if address not in held:
            state.base_values[address] = state_lib.kept_layer_values(
                layers[address]
            )
    record.kept_values = {
        a: [v.copy() for v in state.base_values[a]] for a in kept
    }
    state.records[name] = record
    if len(state.records) == 1:
        activate(model, (name,))
    else:
        training.apply_trainable(model)
    refresh(model, before)


def replace(model, name, template, built):
    """Puts other built adapters in the place of an attached one.

    Args:
        model: An adapted model.
        name: The adapter's name.
        template: The template that the new adapters are clones of.
        built: dict from address to adapter. Sites that it lacks are let go.
    """
    before = before_change(model)
    state = model._randadapt
    record = state.records[name]
    gone = [address for address in record.changed if address not in built]
    for address in record.changed:
        state.layers[address].adapter.remove(name)
        if address in built:
            state.layers[address].adapter.add(name, built[address])
    record.template = template
    record.addresses = list(built)
    record.sources = {}
    for address in gone:
        leave_unused_site(state, address)
    show(model, state.active)
    training.apply_trainable(model)
    refresh(model, before)


def become_adapted(model, layers):
    layer_flags = []
    variable_flags = []
    for layer in _compat.flatten_layers(model):
        layer_flags.append((layer, layer.trainable))
        for variable in _compat.owned_variables(layer):
            variable_flags.append((variable, variable.trainable))
    parts = _models(model)
    model._randadapt = state_lib.AdaptedState(
        layers, layer_flags, variable_flags, parts
    )
    # A model frozen as a whole would train no adapter.
    _compat.set_layer_trainable_flag(model, True)
    model.__class__ = adapted_model.adapted_class(type(model))
    for part in parts:
        parts_lib.claim(part, model)


def leave_model(model):
    state = model._randadapt
    for part in state.parts:
        parts_lib.release(part, model)
    model.__class__ = model._own_class
    for layer, flag in state.layer_flags:
        _compat.set_layer_trainable_flag(layer, flag)
    for variable, flag in state.variable_flags:
        if variable.trainable != flag:
            variable.trainable = flag
    del model._randadapt


def _models(model):
    return [
        layer
        for layer in _compat.flatten_layers(model)
        if isinstance(layer, keras.Model)
    ]


def _become_site(layer):
    if isinstance(layer, layer_lib.AdaptedLayer):
        return
    layer.__class__ = supported.site_class(type(layer))
    _compat.attach_sublayer(layer, "adapter", stack.AdapterStack())


def _start(adapter, layer):
    """Gives an adapter the base kernel, if it asks for it."""
    if type(adapter).start_from is not Adapter.start_from:
        kernel = quantized.float_kernel(layer)
        view = keras.ops.cast(layer.to_view(kernel), "float32")
        adapter.start_from(np.array(keras.ops.convert_to_numpy(view)))


def leave_unused_site(state, address):
    """Gives a layer its own class back if no adapter is left on it."""
    for record in state.records.values():
        if address in record.changed:
            return
    layer = state.layers[address]
    if isinstance(layer, layer_lib.AdaptedLayer):
        _compat.detach_sublayer(layer, "adapter")
        layer.__class__ = layer._site_base


def show(model, names):
    """Makes the sites compute with these adapters, and nothing else."""
    state = model._randadapt
    state.functions.put_away(model, state.shown)
    state.shown = tuple(names)
    for layer in state.changed_layers:
        layer.adapter.active_names = state.shown
    for part in _models(model):
        _compat.reset_compiled_functions(part)


def activate(model, names, freeze=True):
    """Switches the active adapters and the values of their kept layers."""
    state = model._randadapt
    for name in state.active:
        if name not in names:
            record = state.records[name]
            record.kept_values = {
                a: state_lib.kept_layer_values(state.layers[a])
                for a in record.kept
            }
            for address in record.kept:
                state_lib.assign_kept_layer_values(
                    state.layers[address], state.base_values[address]
                )
    for name in names:
        record = state.records[name]
        if record.kept_values is not None:
            for address, values in record.kept_values.items():
                layer = state.layers[address]
                # They may have been changed since this was done last. (A step
                # that broke off may have left none.)
                if _compat.has_values(model):
                    state.base_values[address] = state_lib.kept_layer_values(
                        layer
                    )
                state_lib.assign_kept_layer_values(layer, values)
            record.kept_values = None
    state.active = tuple(names)
    show(model, names)
    if freeze:
        training.apply_trainable(model)


def functions_of_fit(model):
    """The step functions of a `fit` that a callback's block interrupts.

    `fit` goes on with them after the block, and on JAX a callback finds the
    variables' values of the moment only once they are asked for.
    """
    if not model._randadapt.fitting:
        return {}
    _compat.sync_jax_state(model)
    return {part: _compat.compiled_functions(part) for part in _models(model)}


def restore_functions(functions):
    for part, by_attribute in functions.items():
        for attribute, function in by_attribute.items():
            setattr(part, attribute, function)


def before_change(model):
    """What `refresh` has to know of the model as it was.

    A fresh optimizer is made now: where its config can't be read back, the
    error comes before anything has changed.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        fresh = type(optimizer).from_config(optimizer.get_config())
    else:
        fresh = None
    # All variables and not their ids, which new ones could get.
    return model.variables, model.trainable_variables, fresh


def forget_compiled(model):
    for part in _models(model):
        _compat.reset_compiled_functions(part)
    _compat.refresh_torch_parameters(model)


def refresh(model, before):
    """Makes Keras see the model as it is now.

    Args:
        model: An adapted model.
        before: What `before_change` gave.
    """
    variables_before, trained_before, fresh = before
    forget_compiled(model)
    if state_lib.is_adapted(model):
        state = model._randadapt
        if list(map(id, model.variables)) == list(map(id, variables_before)):
            state.functions.bring_back(model, state.shown)
        else:
            state.functions.clear()
    trained = model.trainable_variables
    changed = list(map(id, trained)) != list(map(id, trained_before))
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        if not changed or fresh is None:
            fresh = optimizer
        wrapper.copy_exclusions(optimizer, fresh, model.variables)
        if fresh is not optimizer:
            model.optimizer = fresh
    training.wrap_optimizer(model)
