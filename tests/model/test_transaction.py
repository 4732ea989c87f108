"""Whatever breaks a change off, the model is as before or as completed."""

import random
import threading
import zlib

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo
from tests.interruptions import FailingAssignment
from tests.interruptions import Interruption

pytestmark = pytest.mark.one_backend("torch")


def _plain():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="a")(inputs)
    x = keras.layers.Dense(8, activation="tanh", name="b")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    zoo.set_weights(model)
    # What is frozen before injection must be frozen after ejection.
    model.get_layer("a").trainable = False
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    return model


def _adapted(adapter=None, head="head"):
    model = _plain()
    adapter = adapter or kra.LoRA(2)
    kra.inject(model, adapter, ["a", "b"], keep_trainable=head)
    zoo.randomize(model)
    if head:
        layer = model.get_layer("head")
        layer.kernel.assign(0.5 * layer.kernel)
    return model


def _with_two():
    model = _adapted()
    kra.inject(model, kra.SoRA(2), "a", name="second", keep_trainable="head")
    zoo.randomize(model, "second", seed=2)
    return model


def _without_ranks():
    """SoRA of which training switched some ranks off."""
    model = _adapted(kra.SoRA(3))
    adapters = model._randadapt.adapters("default")
    gates = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    for adapter, gate in zip(adapters.values(), gates, strict=True):
        adapter.gate.assign(gate)
    return model


def _weighted():
    model = _with_two()
    kra.set_active(model, {"default": 0.5})
    return model


def _saved(folder):
    model = _adapted()
    zoo.randomize(model, seed=9)
    kra.save_adapter(model, folder / "saved.safetensors")
    return folder / "saved.safetensors"


def _in_block(block):
    def operate(model, folder):
        with block(model):
            pass

    return operate


#: By name: what makes the model, and what changes it.
OPERATIONS = {
    "inject": (
        _plain,
        lambda model, _: kra.inject(
            model,
            kra.LoRA(2, initialization="pissa"),
            ["a", "b"],
            keep_trainable="head",
        ),
    ),
    "inject_another": (
        _adapted,
        lambda model, _: kra.inject(
            model, kra.RMLoRA(2), "b", name="second", keep_trainable="head"
        ),
    ),
    "eject": (_adapted, lambda model, _: kra.eject(model)),
    "eject_one": (_with_two, lambda model, _: kra.eject(model, "default")),
    "merge": (_adapted, lambda model, _: kra.merge(model)),
    "merged": (_adapted, _in_block(kra.merged)),
    "disabled": (_adapted, _in_block(kra.disabled)),
    "set_active": (_with_two, lambda model, _: kra.set_active(model, "second")),
    "weights": (
        _with_two,
        lambda model, _: kra.set_active(model, {"default": 0.5}, train=[]),
    ),
    "other_weights": (
        _weighted,
        lambda model, _: kra.set_active(model, {"default": 0.25}),
    ),
    "eject_weighted": (_weighted, lambda model, _: kra.eject(model)),
    "active": (
        _weighted,
        _in_block(lambda model: kra.active(model, {"default": 2.0})),
    ),
    "load_new": (
        _plain,
        lambda model, folder: kra.load_adapter(model, _saved(folder)),
    ),
    "load_in_place": (
        _adapted,
        lambda model, folder: kra.load_adapter(model, _saved(folder)),
    ),
    "compact": (_without_ranks, lambda model, _: kra.compact(model)),
    "truncate": (
        lambda: _adapted(kra.DyLoRA(3)),
        lambda model, _: kra.truncate(model, 2),
    ),
    "to_lora": (
        lambda: _adapted(kra.VeRA(3)),
        lambda model, _: kra.to_lora(model, rank=2),
    ),
    "combine": (
        _with_two,
        lambda model, _: kra.combine(
            model,
            {"default": 0.7, "second": -0.3},
            "both",
            rank=2,
            heads_from="second",
        ),
    ),
}


def _summary(model):
    """All that a user could see of a model, as a dict of plain values."""
    state = vars(model).get("_randadapt")
    outputs = zoo.outputs(model, zoo.normal(4, 6))
    return {
        "outputs": outputs,
        "weights": [
            np.array(keras.ops.convert_to_numpy(w)) for w in model.weights
        ],
        "paths": [weight.path for weight in model.weights],
        "trained": [weight.path for weight in model.trainable_weights],
        "flags": [layer.trainable for layer in model._flatten_layers()],
        "classes": [
            (type(layer).__name__, hasattr(type(layer), "_site_base"))
            for layer in model._flatten_layers()
        ],
        "is_adapted": hasattr(type(model), "_own_class"),
        "optimizer": [type(model.optimizer).__name__, model.optimizer.built],
        "records": state
        and {
            name: (
                type(record.template).__name__,
                record.addresses,
                record.kept_values is None,
            )
            for name, record in state.records.items()
        },
        "active": state and (state.active, state.shown, state.block),
        "base": state and sorted(state.base_values),
    }


def _differences(a, b):
    return [key for key in a if not _equal(a[key], b[key])]


def _equal(a, b):
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list) and a and isinstance(a[0], np.ndarray):
        return len(a) == len(b) and all(map(np.array_equal, a, b))
    return a == b


def _check_usable(model, base):
    """Trains a step, removes all adapters, and finds the base model again."""
    # Another thread need not wait for a change that was broken off.
    other = threading.Thread(target=kra.sites, args=[model])
    other.start()
    other.join(timeout=30)
    assert not other.is_alive()
    x = zoo.normal(4, 6)
    model.fit(x, zoo.normal(4, 3), epochs=1, verbose=0)
    model.predict(x, verbose=0)
    if kra.sites(model):
        kra.eject(model)
        assert _differences(_summary(model), base) in ([], ["optimizer"])


def _places(name, total, number):
    generator = random.Random(zlib.crc32(f"{name} {number}".encode()))
    return generator.sample(range(1, total + 1), min(number, total))


@pytest.fixture(scope="module", params=list(OPERATIONS))
def operation(request, tmp_path_factory):
    """`(name, make, operate, before, after, number of bytecodes)`."""
    name = request.param
    make, change = OPERATIONS[name]
    folder = tmp_path_factory.mktemp(name)
    saved = _saved(folder)

    def operate(model):
        if name.startswith("load"):
            kra.load_adapter(model, saved)
        else:
            change(model, folder)

    before = _summary(make())
    model = make()
    operate(model)
    after = _summary(model)
    model = make()
    with Interruption() as all_of_it:
        operate(model)
    return name, make, operate, before, after, all_of_it.count


def _check_interruptions(operation, number):
    name, make, operate, before, after, total = operation
    base = _summary(_plain())
    for i, place in enumerate(_places(name, total, number)):
        model = make()
        with pytest.raises(KeyboardInterrupt):
            with Interruption(place):
                operate(model)
        # Nothing that all models share is left behind.
        assert keras.Variable(0.0, name="probe").path == "probe", place
        now = _summary(model)
        to_before = _differences(now, before)
        to_after = _differences(now, after)
        assert not to_before or not to_after, (
            f"Interrupted at {place} of {total}: differs from before in "
            f"{to_before}, from after in {to_after}"
        )
        if i % 10 == 0:
            if name == "merge" and not to_after:
                base = after
            _check_usable(model, base)


def test_interrupted_anywhere(operation):
    _check_interruptions(operation, 10)


@pytest.mark.slow(reason="200 interruptions an operation")
def test_interrupted_at_200_places(operation):
    _check_interruptions(operation, 200)


@pytest.mark.parametrize(
    "name",
    ["merge", "merged", "set_active", "disabled", "to_lora", "combine"],
)
def test_out_of_memory(name, tmp_path):
    """Every assignment of the change fails once, the first time it is made."""
    make, change = OPERATIONS[name]
    before = _summary(make())
    number = 1
    while True:
        model = make()
        with FailingAssignment(number) as failing:
            try:
                change(model, tmp_path)
            except MemoryError:
                assert failing.failed
        if not failing.failed:
            break
        assert not _differences(_summary(model), before), number
        number += 1
    assert number > 2


def _check_taking_back(name, number, folder):
    """Interrupts the taking back of a change that ran out of memory."""
    make, change = OPERATIONS[name]
    before = _summary(make())

    def fail(place):
        model = make()
        with FailingAssignment(3) as failing:
            with Interruption(place, after=lambda: failing.failed) as it:
                try:
                    change(model, folder)
                except (MemoryError, KeyboardInterrupt):
                    pass
        assert failing.failed
        return model, it.count

    _, total = fail(None)
    for place in _places(name, total, number):
        model, _ = fail(place)
        differences = _differences(_summary(model), before)
        assert not differences, (place, total, differences)


@pytest.mark.parametrize("name", ["merge", "set_active"])
def test_interrupted_taking_back(name, tmp_path):
    _check_taking_back(name, 10, tmp_path)


@pytest.mark.slow(reason="200 interruptions an operation")
@pytest.mark.parametrize("name", ["merge", "set_active"])
def test_interrupted_taking_back_at_200_places(name, tmp_path):
    _check_taking_back(name, 200, tmp_path)


def test_what_is_left_open_is_taken_back_by_the_next_call():
    """Both chances of a change to take itself back are interrupted."""
    from keras_randadapt.model import transaction

    before = _summary(_adapted())
    for use in (
        lambda model: model(zoo.normal(4, 6)),
        lambda model: model.predict(zoo.normal(4, 6), verbose=0),
        lambda model: model.fit(
            zoo.normal(4, 6), zoo.normal(4, 3), epochs=0, verbose=0
        ),
        kra.sites,
        lambda model: model.get_config(),
    ):
        model = _adapted()
        take_back = transaction.Change.take_back
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transaction.Change, "take_back", _interrupted)
            with FailingAssignment(2):
                with pytest.raises(KeyboardInterrupt):
                    kra.merge(model)
        assert transaction.Change.take_back is take_back
        use(model)
        # `fit` builds the optimizer.
        assert _differences(_summary(model), before) in ([], ["optimizer"])


def _interrupted(change):
    raise KeyboardInterrupt
