"""Switching and removing attached adapters."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence

import keras

from keras_randadapt.model import attach
from keras_randadapt.model import checks
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training


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
    attach.activate(model, tuple(n for n in state.active if n not in names))
    for one in names:
        record = state.records.pop(one)
        for address in record.changed:
            state.layers[address].adapter.remove(one)
            attach.leave_unused_site(state, address)
    kept = {a for record in state.records.values() for a in record.kept}
    for address in state.base_values.keys() - kept:
        del state.base_values[address]
    if not state.records:
        attach.leave_model(model)
    attach.refresh(model, before)
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
    state = state_lib.state_of(model)
    outer = state.block
    if outer == "merged":
        state_lib.check_no_block(model)
    functions = attach.functions_of_fit(model)
    active = state.active
    state.block = "disabled"
    attach.activate(model, (), freeze=False)
    attach.forget_compiled(model)
    state.functions.bring_back(model, state.shown)
    try:
        yield model
    finally:
        state.block = outer
        attach.activate(model, active, freeze=False)
        attach.forget_compiled(model)
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
    before = attach.before_change(model)
    attach.activate(model, names)
    attach.refresh(model, before)


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
