"""Attaching adapters to a model, switching and removing them.

Adapters are attached in place: each site's layer gets a subclass of its own
class and an `AdapterStack` as a sublayer; the outermost model gets a subclass
of its own class. Layers keep their identity, names, paths and variables, so
whoever holds a reference to one goes on working.
"""

import contextlib
import re
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt import adapter_stack
from keras_randadapt import building
from keras_randadapt import checks
from keras_randadapt import claims
from keras_randadapt import quantized_kernels
from keras_randadapt import report as report_lib
from keras_randadapt import root
from keras_randadapt import site_classes
from keras_randadapt import site_layers
from keras_randadapt import targets as targets_lib
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import base as adapter_base
from keras_randadapt.adapters.base import Adapter

#: What `targets`, `exclude` and `keep_trainable` may be.
Targets = (
    str
    | re.Pattern
    | Sequence[str | re.Pattern]
    | Callable[[keras.layers.Layer], bool]
    | None
)


def inject(
    model: keras.Model,
    adapter: Adapter,
    targets: Targets = None,
    *,
    exclude: Targets = None,
    keep_trainable: Targets = None,
    name: str = "default",
) -> report_lib.Report:
    """Attaches an adapter to a model, in place, and freezes the rest.

    From then on `fit`, `predict`, `save` and the rest are plain Keras. The
    adapted model computes what the base model did until it is trained. It
    does not matter whether the model is compiled or trained already; if it
    is, no recompilation is needed, and `model.optimizer` is a fresh one of the
    same config. So it is whenever other weights are trained from then on.

    The first adapter of a model is active. Further ones, of other names, are
    attached inactive and take over by `set_active`.

    Args:
        model: A built Keras model: the outermost one that you will train and
            save.
        adapter: An adapter such as `RLoRA(512)`. It is a template: it stays
            unbuilt and can be injected elsewhere.
        targets: Which layers to adapt. A name or a list of names, each the
            layer's own name or the end of its path; a `re.Pattern` searched
            for in the path; `"all-linear"`, every Dense and EinsumDense layer
            but expert routers, heads of KerasHub tasks and those in
            `keep_trainable`; a function of a layer that returns a bool; or
            `None`, the query and value projections (for `BitFit`, whatever has
            a bias; for `Bottleneck`, attention and feed-forward outputs).
        exclude: Which of these to leave out: names, pattern, `"all-linear"` or
            function. A name may also be of a layer that contains targets.
        keep_trainable: Layers that are trained along with the adapter and
            saved with it, such as a classification head: names, pattern or
            function.
        name: The adapter's name: letters, digits, `_` and `-`.

    Returns:
        A `Report`; print it.

    Raises:
        TypeError: If `model` is no Keras model or `adapter` no adapter.
        ValueError: If the model is not built, a target matches nothing or
            only what can't be adapted, the method can't take a site's shape,
            or the name is taken. The model is then as it was.

    Example:

    ```python
    report = kra.inject(
        classifier,
        kra.RLoRA(rank=512, seed=0),
        targets=["query", "value"],
        keep_trainable=["logits"],
    )
    print(report)
    classifier.fit(x, y)
    ```
    """
    checks.check_model(model)
    checks.check_adapter(adapter)
    checks.check_new_name(model, name)
    layers = root.layers_of(model)
    kept = targets_lib.select_kept(layers, keep_trainable)
    chosen = targets_lib.select_sites(
        layers,
        targets,
        exclude,
        kept,
        {*adapter.site_kinds, *site_layers.KERNEL_KINDS},
        adapter.default_targets,
    )
    if adapter.adapts_bias and not adapter.adapts_kernel:
        chosen = _with_bias(layers, chosen)
        if targets is None:
            checks.warn_of_missed_biases(
                layers, chosen, kept, adapter.site_kinds
            )
    if targets == "all-linear":
        chosen = _without_task_head(model, layers, chosen)
    checks.check_attachable(model, layers, chosen, kept)
    checks.warn_of_inference_in_fit(model, adapter)
    checks.warn_of_frozen_in_kept(layers, kept)
    sources = adapter.sources(layers, chosen)
    built = building.build_adapters(adapter, name, layers, chosen, sources)
    attach(model, adapter, name, chosen, kept, layers, built, sources)
    return report_lib.Report(model, name)


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
    before = _before_change(model)
    if not root.is_adapted(model):
        _become_root(model, layers)
    state = model._randadapt
    try:
        for address in addresses:
            _become_site(layers[address])
            _start(built[address], layers[address])
    except BaseException:
        # A decomposition of a kernel may fail, or be interrupted.
        for address in addresses:
            _leave_unused_site(state, address)
        if not state.records:
            _leave_root(model)
        raise
    for address in addresses:
        layers[address].adapter.add(name, built[address])
    for address, source in sources.items():
        _become_site(layers[source])
        layers[address].adapter.listen_to(layers[source].adapter, name)
    record = root.AdapterRecord(template, addresses, kept, sources)
    held = {a for active in state.active for a in state.records[active].kept}
    for address in kept:
        if address not in held:
            state.base_values[address] = root.kept_layer_values(layers[address])
    record.kept_values = {
        a: [v.copy() for v in state.base_values[a]] for a in kept
    }
    state.records[name] = record
    if len(state.records) == 1:
        _activate(model, (name,))
    else:
        root.apply_trainable(model)
    _refresh(model, before)


def replace(model, name, template, built):
    """Puts other built adapters in the place of an attached one.

    Args:
        model: An adapted model.
        name: The adapter's name.
        template: The template that the new adapters are clones of.
        built: dict from address to adapter. Sites that it lacks are let go.
    """
    before = _before_change(model)
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
        _leave_unused_site(state, address)
    show(model, state.active)
    root.apply_trainable(model)
    _refresh(model, before)


def attach_from_config(model, config):
    """Attaches an adapter that a whole-model config describes."""
    checks.check_model(model)
    layers = root.layers_of(model)
    template = adapter_base.deserialize(config["adapter"])
    name, addresses, kept = config["name"], config["sites"], config["kept"]
    checks.check_new_name(model, name)
    checks.check_attachable(model, layers, addresses, kept)
    sources = config.get("sources", {})
    built = building.build_adapters(template, name, layers, addresses, sources)
    attach(model, template, name, addresses, kept, layers, built, sources)


def eject(model: keras.Model, name: str | None = None) -> keras.Model:
    """Removes adapters: the model is then as it was before, bit for bit.

    Kept layers, heads mostly, get back the values they had at injection; to
    keep what was trained, use `merge` or `save_adapter` first.

    Args:
        model: An adapted model.
        name: Optional string: the one adapter to remove. All by default.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no adapter, or none of this name.
    """
    state = root.state_of(model)
    root.check_no_block(model)
    root.check_not_fitting(model)
    names = checks.check_names(state, state.records if name is None else [name])
    before = _before_change(model)
    _activate(model, tuple(n for n in state.active if n not in names))
    for one in names:
        record = state.records.pop(one)
        for address in record.changed:
            state.layers[address].adapter.remove(one)
            _leave_unused_site(state, address)
    kept = {a for record in state.records.values() for a in record.kept}
    for address in state.base_values.keys() - kept:
        del state.base_values[address]
    if not state.records:
        _leave_root(model)
    _refresh(model, before)
    return model


@contextlib.contextmanager
def disabled(model: keras.Model) -> Iterator[keras.Model]:
    """For a block, the model computes what the base model does.

    Callbacks may use it in the middle of `fit`.

    Args:
        model: An adapted model.

    Raises:
        ValueError: If the model has no adapter.

    Example:

    ```python
    with kra.disabled(model):
        base_logits = model.predict(x)
    ```
    """
    state = root.state_of(model)
    outer = state.block
    if outer == "merged":
        root.check_no_block(model)
    functions = functions_of_fit(model)
    active = state.active
    state.block = "disabled"
    _activate(model, (), freeze=False)
    _forget_compiled(model)
    state.functions.bring_back(model, state.shown)
    try:
        yield model
    finally:
        state.block = outer
        _activate(model, active, freeze=False)
        _forget_compiled(model)
        state.functions.bring_back(model, state.shown)
        root.wrap_optimizer(model)
        restore_functions(functions)


def set_active(model: keras.Model, names: str | Sequence[str]) -> None:
    """Chooses the adapters that the model computes with and trains.

    The deltas of several active adapters are summed. Layers kept trainable
    take the values that they have under the active adapter.

    Args:
        model: An adapted model.
        names: A name, or a list of names. An empty list gives the base model.

    Raises:
        ValueError: If a name is unknown or given twice, or if two adapters
            keep the same layer trainable and so can't both be active.
    """
    state = root.state_of(model)
    root.check_no_block(model)
    root.check_not_fitting(model)
    names = checks.check_names(state, names)
    if len(set(names)) != len(names):
        raise ValueError(f"`names` repeats a name. Received: names={names}")
    owner = {}
    for name in names:
        for address in state.records[name].kept:
            if address in owner:
                raise ValueError(
                    f"Adapters '{owner[address]}' and '{name}' both keep "
                    f"'{address}' trainable, each with weights of its own: "
                    f"only one can be active. Received: names={names}"
                )
            owner[address] = name
    before = _before_change(model)
    _activate(model, names)
    _refresh(model, before)


def sites(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The sites of a model.

    Args:
        model: A Keras model.

    Returns:
        dict from structural address to layer, in the model's order; empty if
        no adapter is attached.
    """
    root.check_is_model(model)
    if not root.is_adapted(model):
        return {}
    state = model._randadapt
    return {a: state.layers[a] for a in state.site_addresses}


# The state of the model.


def _become_root(model, layers):
    layer_flags = []
    variable_flags = []
    for layer in _compat.flatten_layers(model):
        layer_flags.append((layer, layer.trainable))
        for variable in _compat.owned_variables(layer):
            variable_flags.append((variable, variable.trainable))
    parts = _models(model)
    model._randadapt = root.RootState(
        layers, layer_flags, variable_flags, parts
    )
    # A model frozen as a whole would train no adapter.
    _compat.set_layer_trainable_flag(model, True)
    model.__class__ = root.root_class(type(model))
    for part in parts:
        claims.claim(part, model)


def _leave_root(model):
    state = model._randadapt
    for part in state.parts:
        claims.release(part, model)
    model.__class__ = model._root_base
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
    if isinstance(layer, site_classes.Site):
        return
    layer.__class__ = site_layers.site_class(type(layer))
    _compat.attach_sublayer(layer, "adapter", adapter_stack.AdapterStack())


def _start(adapter, layer):
    """Gives an adapter the base kernel, if it asks for it."""
    if type(adapter).start_from is not Adapter.start_from:
        kernel = quantized_kernels.float_kernel(layer)
        view = keras.ops.cast(layer.to_view(kernel), "float32")
        adapter.start_from(np.array(keras.ops.convert_to_numpy(view)))


def _leave_unused_site(state, address):
    """Gives a layer its own class back if no adapter is left on it."""
    for record in state.records.values():
        if address in record.changed:
            return
    layer = state.layers[address]
    if isinstance(layer, site_classes.Site):
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


def _activate(model, names, freeze=True):
    """Switches the active adapters and the values of their kept layers."""
    state = model._randadapt
    for name in state.active:
        if name not in names:
            record = state.records[name]
            record.kept_values = {
                a: root.kept_layer_values(state.layers[a]) for a in record.kept
            }
            for address in record.kept:
                root.assign_kept_layer_values(
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
                    state.base_values[address] = root.kept_layer_values(layer)
                root.assign_kept_layer_values(layer, values)
            record.kept_values = None
    state.active = tuple(names)
    show(model, names)
    if freeze:
        root.apply_trainable(model)


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


def _before_change(model):
    """What `_refresh` has to know of the model as it was.

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


def _forget_compiled(model):
    for part in _models(model):
        _compat.reset_compiled_functions(part)
    _compat.refresh_torch_parameters(model)


def _refresh(model, before):
    """Makes Keras see the model as it is now.

    Args:
        model: An adapted model.
        before: What `_before_change` gave.
    """
    from keras_randadapt.optimizers import wrapper

    variables_before, trained_before, fresh = before
    _forget_compiled(model)
    if root.is_adapted(model):
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
    root.wrap_optimizer(model)


def _with_bias(layers, chosen):
    """Those of the chosen layers that have a bias; a warning for others."""
    without = [
        a for a in chosen if site_layers.bias_variable(layers[a]) is None
    ]
    if len(without) == len(chosen):
        raise ValueError(
            f"None of the {len(chosen)} layers that `targets` matched has a "
            "bias to train."
        )
    if without:
        warnings.warn(
            f"{len(without)} of the {len(chosen)} layers that `targets` "
            f"matched have no bias and are left out: {without[:5]}",
            AdapterWarning,
            stacklevel=3,
        )
    return [a for a in chosen if a not in without]


def _without_task_head(model, layers, chosen):
    """For `"all-linear"`, leaves out the heads of KerasHub tasks."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model):
        return chosen
    inside = {id(layer) for layer in _compat.flatten_layers(backbone)}
    return [a for a in chosen if id(layers[a]) in inside] or chosen
