"""Switching and removing attached adapters."""

import contextlib
import functools
from collections.abc import Iterator
from collections.abc import Sequence

import keras

from keras_randadapt import _compat
from keras_randadapt.model import attach
from keras_randadapt.model import checks
from keras_randadapt.model import moving_state
from keras_randadapt.model import site_layers
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training
from keras_randadapt.model import transaction
from keras_randadapt.model import weighting
from keras_randadapt.sites.kernel_site import layer_of


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
    names = checks.check_names(
        state, list(state.records) if name is None else [name]
    )
    with attach.changing(model) as change:
        remove(change, names)
    return model


def remove(change, names):
    """Removes adapters of some names in a change.

    Args:
        change: What `attach.changing` gave.
        names: tuple of names.
    """
    model = change.model
    state = model._randadapt
    attach.record_common(change)
    attach.activate(change, tuple(n for n in state.active if n not in names))
    for name in names:
        weighting.remove(change, name)
        records = dict(state.records)
        record = records.pop(name)
        for address in record.changed:
            attach.remove_adapter(change, state.layers[address], name)
        change.set(state, "records", records)
        for address in record.changed:
            site_layers.leave_unused_site(change, address)
    kept = {a for record in state.records.values() for a in record.kept}
    change.set(
        state,
        "base_values",
        {a: v for a, v in state.base_values.items() if a in kept},
    )
    if not state.records:
        attach.leave_model(change)
    attach.refresh(change)
    if not state.records:
        # The class is taken back first, and changed last: see
        # `transaction.recover`.
        change.set(model, "__class__", model._own_class)
        change.on_undo(functools.partial(setattr, model, "_randadapt", state))
        del model._randadapt


@contextlib.contextmanager
def disabled(model: keras.Model) -> Iterator[keras.Model]:
    """For a block, the model computes what the base model does.

    Its losses are those of the base model as well. Callbacks may use the block
    in the middle of `fit`. Inside a training step, in `compute_loss` for
    example, gradients of what the block computes are as always, and the values
    of kept layers are those of the base model.

    Args:
        model: An adapted model.

    Yields:
        The model.

    Raises:
        ValueError: If the model has no adapter.

    Example:

    ```python
    with kra.disabled(model):
        base_logits = model.predict(x)
    ```
    """
    with _computing_with(model, (), "disabled"):
        yield model


@contextlib.contextmanager
def active(model: keras.Model, names: weighting.Names) -> Iterator[keras.Model]:
    """For a block, the model computes with other adapters.

    It may be used wherever `disabled` may, also inside a training step: another
    adapter is the reference of preference tuning then.

    Args:
        model: An adapted model.
        names: A name, a list of names, or a dict from name to weight. See
            `set_active`. Inside a training step the weights are constants of
            the step.

    Yields:
        The model.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If the model has no adapter, if a name is unknown or given
            twice, if two adapters keep the same layer trainable, or if a
            weight can't be given; see `set_active`.

    Example:

    ```python
    kra.inject(
        model, kra.LoRA(8), name="reference", keep_trainable="logits"
    )
    with kra.active(model, "reference"):
        logits = model.predict(x)
    ```
    """
    state = state_lib.state_of(model)
    names, weights = weighting.parsed(state, names)
    _check_together(state, names)
    with _computing_with(model, names, "active", weights):
        yield model


@contextlib.contextmanager
def _computing_with(model, names, block, weights=()):
    """For a block, the model computes with adapters of these names.

    Args:
        model: An adapted model.
        names: tuple of names.
        block: What `AdaptedState.block` is meanwhile.
        weights: dict from name to the weight inside the block.
    """
    weights = dict(weights)
    state = state_lib.state_of(model)
    if state.block == "merged":
        state_lib.check_no_block(model)
    if state.in_step or _compat.is_tracing():
        with _in_a_step(model, names, block, weights):
            yield
        return
    if weighting.missing(state, weights):
        state_lib.check_not_fitting(model)
        _add_weights(model, weights)
    outer = state.block
    functions = attach.functions_of_fit(model)
    before, frozen = state.active, state.frozen
    weights_before = weighting.of(state, weights)

    def enter(change):
        attach.record_common(change)
        change.set(state, "block", block)
        weighting.give(change, weights)
        attach.activate(change, names, freeze=False)
        _compat.refresh_torch_parameters(model)
        state.functions.bring_back(model, state.shown)
        return functools.partial(
            _leave,
            model,
            before,
            frozen,
            names,
            outer,
            functions,
            weights_before,
            {},
        )

    with transaction.block(model, enter):
        yield


def _leave(model, before, frozen, names, outer, functions, weights, found):
    """Ends a block; it may be repeated after an interruption.

    Args:
        model: An adapted model.
        before: Names of the adapters that were active before.
        frozen: Names of those of them that were not trained.
        names: Names of the adapters that the block computes with.
        outer: What `AdaptedState.block` was before.
        functions: What `attach.functions_of_fit` gave.
        weights: dict from name to the weight before the block.
        found: dict that keeps what the block left, for a repetition.
    """
    state = model._randadapt
    inside, outside = _held(state, names), _held(state, before)
    if not found:
        # A step that broke off in the block may have left no values.
        now = {
            address: state_lib.kept_layer_values(state.layers[address])
            for address in {**inside, **outside}
            if _compat.has_values(model)
        }
        kept = {
            name: dict(state.records[name].kept_values or {})
            for name in before
            if name not in names
        }
        found.update(now=now, kept=kept)
    now = found["now"]
    base = dict(state.base_values)
    base.update({a: now[a] for a in outside if a not in inside and a in now})
    state.base_values = base
    for name in names:
        if name not in before:
            record = state.records[name]
            record.kept_values = {a: now[a] for a in record.kept if a in now}
    for address in inside:
        if address not in outside:
            state_lib.assign_kept_layer_values(
                state.layers[address], base[address]
            )
    for name, values in found["kept"].items():
        for address, arrays in values.items():
            state_lib.assign_kept_layer_values(state.layers[address], arrays)
        state.records[name].kept_values = None
    moving_state.restore(state, before)
    weighting.restore(state, weights)
    state.active, state.frozen = before, frozen
    attach.show(model, before)
    state.block = outer
    _compat.refresh_torch_parameters(model)
    state.functions.bring_back(model, state.shown)
    training.wrap_optimizer(model)
    attach.restore_functions(functions)


def _held(state, names):
    """dict from the addresses of kept layers to the adapter that keeps them."""
    return {a: name for name in names for a in state.records[name].kept}


@contextlib.contextmanager
def _in_a_step(model, names, block, weights):
    """A block inside a training step, in which no variable can be assigned.

    Kept layers get the values that they have with these adapters as constants
    of the step, and so do weights.
    """
    weights = tuple(weights.items())
    constants = state_constants(model._randadapt)
    state = model._randadapt
    outer, shown = state.block, state.shown
    inside, outside = _held(state, names), _held(state, state.active)
    values = []
    for address in {**inside, **outside}:
        name = inside.get(address)
        if name is not None and name == outside.get(address):
            continue
        arrays = state.base_values[address]
        if name is not None:
            arrays = state.records[name].kept_values[address]
        values += zip(state.layers[address].weights, arrays, strict=True)
    moved = moving_state.values_with(state, names)
    if moved is not None:
        variables = moving_state.movable(state)
        values += [(v, moved[k]) for k, v in variables.items() if k in moved]

    def enter(change):
        leave = functools.partial(
            _show_in_a_step, state, shown, outer, constants
        )
        change.on_undo(leave)
        _show_in_a_step(state, names, block, weights)
        return leave

    with transaction.block(model, enter):
        with _compat.substituted_values(model, values):
            yield


def state_constants(state):
    """The weights that are constants of the step that is running."""
    layers = state.changed_layers
    return layers[0].adapter.constants if layers else ()


def _show_in_a_step(state, names, block, constants):
    # The functions stay: the step that is running belongs to one of them.
    for layer in state.changed_layers:
        layer.adapter.active_names = names
        layer.adapter.constants = constants
    state.shown = names
    state.block = block


def _check_together(state, names):
    """Raises `ValueError` if adapters can't be active together."""
    if len(set(names)) != len(names):
        raise ValueError(f"`names` repeats a name. Received: names={names}")
    owner = {}
    for name in names:
        for address in state.records[name].kept:
            if address in owner:
                raise ValueError(
                    f"Adapters '{owner[address]}' and '{name}' both keep "
                    f"'{address}' trainable, each with weights of its own: "
                    f"only one can be active. Received: names={names}. "
                    "Make one adapter of both: `keras_randadapt.combine`, "
                    "whose `heads_from` chooses the weights."
                )
            owner[address] = name


def set_active(
    model: keras.Model,
    names: weighting.Names,
    train: str | Sequence[str] | None = None,
) -> None:
    """Chooses the adapters that the model computes with and trains.

    The updates of several active adapters are summed, each times its weight.
    Layers kept trainable take the values that they have under the active
    adapter. Weights are data: after the first that is not 1, other weights
    compile nothing again.

    Args:
        model: An adapted model.
        names: A name, a list of names, or a dict from name to weight, a finite
            number. An adapter that is given by its name alone has the weight
            1, which is the only one for methods that are not additive, such as
            DoRA. An empty list gives the base model.
        train: The active adapters that are trained, a name or a list of names.
            The others are active but frozen. By default, all are trained.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If a name is unknown or given twice, if a weight is not
            finite or not 1 for a method that is not additive, if two adapters
            keep the same layer trainable and so can't both be active, or if
            `train` names an adapter that is not to be active.

    Example:

    ```python
    kra.inject(model, kra.LoRA(8), name="french", keep_trainable="logits")
    kra.inject(model, kra.RLoRA(64), name="law")
    kra.set_active(model, {"french": 0.7, "law": 0.3})
    kra.set_active(model, ["french", "law"], train="law")
    ```
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    names, weights = weighting.parsed(state, names)
    _check_together(state, names)
    trained = weighting.parsed_train(names, train)
    if (names, trained) == (state.active, state.trained) and not (
        weighting.missing(state, weights)
    ):
        with transaction.change(model) as change:
            weighting.give(change, weights)
        return
    attach.use(model, names, weights, trained)


def _add_weights(model, weights):
    """Makes the variables of weights that a block is about to assign."""
    state = model._randadapt
    ones = dict.fromkeys(weighting.missing(state, weights), 1.0)
    attach.use(model, state.active, ones, state.trained, always=True)


def sites(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The sites of a model.

    Args:
        model: A Keras model.

    Returns:
        dict from structural address to layer, in the model's order; empty if
        no adapter is attached. A layer with several kernels, such as a bank of
        experts, has one address for each of them: the layer's own, a slash
        and the kernel's name. Its `adapter[kernel_name].get(name)` is the
        adapter of one.
    """
    state_lib.check_is_model(model)
    if not state_lib.is_adapted(model):
        return {}
    state = model._randadapt
    return {a: layer_of(state.layers[a]) for a in state.site_addresses}
