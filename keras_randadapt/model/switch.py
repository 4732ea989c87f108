"""Switching and removing attached adapters."""

import contextlib
import functools
from collections.abc import Iterator
from collections.abc import Sequence

import keras

from keras_randadapt import _compat
from keras_randadapt.model import attach
from keras_randadapt.model import checks
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training
from keras_randadapt.model import transaction


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
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    names = checks.check_names(state, state.records if name is None else [name])
    before = attach.before_change(model)
    training.release(model)
    with transaction.change(model) as change:
        remove(change, before, names)
    return model


def remove(change, before, names):
    """Removes adapters of some names in a change.

    Args:
        change: A `transaction.Change`.
        before: What `attach.before_change` gave.
        names: tuple of names.
    """
    model = change.model
    state = model._randadapt
    attach.record_common(change)
    attach.activate(change, tuple(n for n in state.active if n not in names))
    for name in names:
        records = dict(state.records)
        record = records.pop(name)
        for address in record.changed:
            attach.remove_adapter(change, state.layers[address], name)
        change.set(state, "records", records)
        for address in record.changed:
            attach.leave_unused_site(change, address)
    kept = {a for record in state.records.values() for a in record.kept}
    change.set(
        state,
        "base_values",
        {a: v for a, v in state.base_values.items() if a in kept},
    )
    if not state.records:
        attach.leave_model(change)
    attach.refresh(change, before)
    if not state.records:
        # The class is taken back first, and changed last: see
        # `transaction.recover`.
        change.set(model, "__class__", model._own_class)
        change.on_undo(functools.partial(setattr, model, "_randadapt", state))
        del model._randadapt


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
    state = state_lib.state_of(model)
    outer = state.block
    if outer == "merged":
        state_lib.check_no_block(model)
    functions = attach.functions_of_fit(model)
    active = state.active

    def enter(change):
        attach.record_common(change)
        change.set(state, "block", "disabled")
        attach.activate(change, (), freeze=False)
        _compat.refresh_torch_parameters(model)
        state.functions.bring_back(model, state.shown)
        return functools.partial(_enable, model, active, outer, functions, {})

    with transaction.block(model, enter):
        yield model


def _enable(model, active, outer, functions, found):
    """Ends a `disabled` block; it may be repeated after an interruption.

    Args:
        model: An adapted model.
        active: Names of the adapters that were active before.
        outer: What `AdaptedState.block` was before.
        functions: What `attach.functions_of_fit` gave.
        found: dict that keeps what the block left, for a repetition.
    """
    state = model._randadapt
    records = [state.records[name] for name in active]
    if not found:
        # A step that broke off in the block may have left no values.
        base = {
            address: state_lib.kept_layer_values(state.layers[address])
            for record in records
            for address in record.kept
            if _compat.has_values(model)
        }
        kept = [dict(record.kept_values or {}) for record in records]
        found.update(base=base, kept=kept)
    for values in found["kept"]:
        for address, arrays in values.items():
            state_lib.assign_kept_layer_values(state.layers[address], arrays)
    state.base_values = {**state.base_values, **found["base"]}
    for record in records:
        record.kept_values = None
    state.active = active
    attach.show(model, active)
    state.block = outer
    _compat.refresh_torch_parameters(model)
    state.functions.bring_back(model, state.shown)
    training.wrap_optimizer(model)
    attach.restore_functions(functions)


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
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    names = checks.check_names(state, names)
    if len(set(names)) != len(names):
        raise ValueError(f"`names` repeats a name. Received: names={names}")
    owner: dict[str, str] = {}
    for name in names:
        for address in state.records[name].kept:
            if address in owner:
                raise ValueError(
                    f"Adapters '{owner[address]}' and '{name}' both keep "
                    f"'{address}' trainable, each with weights of its own: "
                    f"only one can be active. Received: names={names}"
                )
            owner[address] = name
    before = attach.before_change(model)
    training.release(model)
    with transaction.change(model) as change:
        attach.record_common(change)
        attach.activate(change, names)
        attach.refresh(change, before)


def sites(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The sites of a model.

    Args:
        model: A Keras model.

    Returns:
        dict from structural address to layer, in the model's order; empty if
        no adapter is attached.
    """
    state_lib.check_is_model(model)
    if not state_lib.is_adapted(model):
        return {}
    state = model._randadapt
    return {a: state.layers[a] for a in state.site_addresses}
