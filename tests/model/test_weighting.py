"""Weights of active adapters, adapters that are active but frozen, `status`."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import adapter_files
from tests import zoo
from tests.test_matrix import METHODS

X = zoo.normal(5, 6)


def _model(head=False, dtype=None):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="hidden", dtype=dtype),
            keras.layers.Dense(3, name="head", dtype=dtype),
        ]
    )
    zoo.set_weights(model)
    for i, name in enumerate("ab"):
        kept = "head" if head and name == "b" else None
        kra.inject(
            model, kra.LoRA(2, seed=i), "hidden", name=name, keep_trainable=kept
        )
        zoo.randomize(model, name, seed=i)
    return model


def _alone(model, name):
    """The output that one adapter alone adds to the base model's."""
    before = [one.name for one in kra.status(model) if one.active]
    kra.set_active(model, [])
    base = zoo.outputs(model, X)
    kra.set_active(model, name)
    change = zoo.outputs(model, X) - base
    kra.set_active(model, before)
    return base, change


def _close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def _kernels(model):
    """The merged float kernel and bias of each site."""
    merged = []
    with kra.merged(model):
        for layer in kra.sites(model).values():
            merged += [
                np.array(keras.ops.convert_to_numpy(w)).astype("float64")
                for w in layer._trainable_variables
            ]
    return merged


ADDITIVE = [name for name, make in METHODS.items() if make().additive]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.every_backend]
            * (name in ("lora", "rlora", "randlora")),
        )
        for name in ADDITIVE
    ],
)
def test_update_times_weight(name):
    """The sum of the updates times their weights, in all ways of computing."""
    model, x, targets = zoo.dense()
    kra.inject(model, METHODS[name](3), targets, name="a")
    kra.inject(model, kra.LoRA(2), targets, name="b")
    zoo.randomize(model, "a")
    zoo.randomize(model, "b", seed=1)
    kernels = {}
    for names in ("a", "b", []):
        kra.set_active(model, names)
        kernels["".join(names)] = _kernels(model)
    kra.set_active(model, {"a": 0.75, "b": -0.5})
    expected = [
        base + 0.75 * (a - base) - 0.5 * (b - base)
        for base, a, b in zip(kernels[""], kernels["a"], kernels["b"])
    ]
    for found, one in zip(_kernels(model), expected, strict=True):
        _close(found, one)
    out = zoo.outputs(model, x)
    with kra.merged(model):
        _close(zoo.outputs(model, x), out)
    kra.merge(model)
    _close(zoo.outputs(model, x), out)


@pytest.mark.parametrize(
    "builder",
    [
        zoo.einsum_query,
        zoo.embedding,
        zoo.reversible_embedding,
        zoo.conv2d_grouped,
        zoo.dense_int8,
    ],
    ids=lambda one: one.__name__,
)
def test_site_classes(builder):
    model, x, targets = builder()
    kra.inject(model, kra.LoRA(2), targets, name="a")
    zoo.randomize(model, "a")
    kra.set_active(model, {"a": 0.5})
    out = zoo.outputs(model, x)
    # Half of an update is the update of half of B.
    kra.set_active(model, "a")
    for layer in kra.sites(model).values():
        b = layer.adapter.get("a").lora_b
        b.assign(0.5 * keras.ops.convert_to_tensor(b))
    _close(zoo.outputs(model, x), out)


def test_sixteen_bits():
    model = _model(dtype="mixed_bfloat16")
    kra.set_active(model, {"a": 0.5, "b": 2.0})
    reference = _model()
    kra.set_active(reference, {"a": 0.5, "b": 2.0})
    _close(zoo.outputs(model, X), zoo.outputs(reference, X), 3e-2)


def test_other_weights_compile_nothing():
    model = _model()
    traces = []
    layer = model.get_layer("hidden")
    call = type(layer)._adapted_call

    def counted(self, *args, **kwargs):
        traces.append(self)
        return call(self, *args, **kwargs)

    base, a = _alone(model, "a")
    _, b = _alone(model, "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "_adapted_call", counted)
        kra.set_active(model, {"a": 0.25, "b": 0.75})
        _close(model.predict(X, verbose=0).ravel(), base + 0.25 * a + 0.75 * b)
        function, seen = model.predict_function, len(traces)
        for weights in ({"a": 3.0, "b": -1.0}, ["a", "b"], {"a": 0, "b": 1}):
            kra.set_active(model, weights)
            assert model.predict_function is function
            values = weights if isinstance(weights, dict) else {"a": 1, "b": 1}
            _close(
                model.predict(X, verbose=0).ravel(),
                base + values["a"] * a + values["b"] * b,
            )
        if keras.config.backend() != "torch":
            # PyTorch calls layers in every step.
            assert len(traces) == seen


@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_files_of_the_model(tmp_path, kind):
    model = _model()
    kra.set_active(model, {"a": 0.25, "b": -2.0})
    out = zoo.outputs(model, X)
    path = tmp_path / f"x.{kind}"
    if kind == "keras":
        model.save(path)
        loaded = keras.models.load_model(path)
    else:
        model.save_weights(path)
        # The first has no variable for a weight, and the second has others.
        for weights in (["a", "b"], {"a": 3.0, "b": 2.0}):
            loaded = _model()
            kra.set_active(loaded, weights)
            loaded.load_weights(path)
            np.testing.assert_array_equal(zoo.outputs(loaded, X), out)
    np.testing.assert_array_equal(zoo.outputs(loaded, X), out)
    assert [one.weight for one in kra.status(loaded)] == [0.25, -2.0]
    if kind == "weights.h5":
        kra.set_active(model, ["a", "b"])
        kra.eject(model)
        plain = _model()
        plain.save_weights(path)
        loaded.load_weights(path)
        assert [one.weight for one in kra.status(loaded)] == [1.0, 1.0]
        kra.set_active(plain, ["a", "b"])
        np.testing.assert_array_equal(
            zoo.outputs(loaded, X), zoo.outputs(plain, X)
        )


def test_adapter_file(tmp_path):
    model = _model()
    kra.set_active(model, {"a": 0.25, "b": 1.0}, train="b")
    sizes = {}
    for name in "ab":
        kra.save_adapter(model, tmp_path / name, name)
        sizes[name] = (tmp_path / name).stat().st_size
    metadata = adapter_files.read(tmp_path / "a")[1]
    assert metadata["weight"] == 0.25 and metadata["frozen"] is True
    assert not {"weight", "frozen"} & set(adapter_files.read(tmp_path / "b")[1])
    kra.set_active(model, {"a": 0.25})
    expected = zoo.outputs(model, X)
    kra.eject(model)
    report = kra.load_adapter(model, tmp_path / "a")
    assert report.file_bytes == sizes["a"]
    np.testing.assert_array_equal(zoo.outputs(model, X), expected)
    (one,) = kra.status(model)
    assert one.weight == 0.25 and not one.trained and one.active
    assert not model.trainable_variables
    # Into the adapter in place: the file says how it was used.
    kra.set_active(model, "a")
    assert model.trainable_variables
    kra.load_adapter(model, tmp_path / "a")
    assert kra.status(model)[0].weight == 0.25
    assert not model.trainable_variables


@pytest.mark.one_backend
@pytest.mark.parametrize("change", [{"weight": True}, {"frozen": False}])
def test_adapter_file_of_another_form(tmp_path, change):
    model = _model()
    kra.save_adapter(model, tmp_path / "a", "a")
    adapter_files.edit(tmp_path / "a", change)
    with pytest.raises(ValueError, match=f"metadata '{next(iter(change))}'"):
        kra.load_adapter(model, tmp_path / "a")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ({"a": np.nan}, ValueError, "must be finite"),
        ({"a": float("inf")}, ValueError, "must be finite"),
        ({"a": "1"}, TypeError, "must be a number"),
        ({"a": True}, TypeError, "must be a number"),
        ({"a": None}, TypeError, "must be a number"),
        ({"x": 1.0}, ValueError, "no adapter called 'x'"),
        ({3: 1.0}, TypeError, "must be strings"),
        ({"dora": 0.5}, ValueError, "`DoRA`.* only have the weight 1"),
        ({"ia3": 2}, ValueError, "`IA3`.* only have the weight 1"),
    ],
)
@pytest.mark.parametrize("block", [False, True])
def test_bad_weights(weights, error, match, block):
    model = _model()
    kra.inject(model, kra.DoRA(kra.LoRA(2)), "hidden", name="dora")
    kra.inject(model, kra.IA3(), "hidden", name="ia3")
    before, out = zoo.snapshot(model), zoo.outputs(model, X)
    with pytest.raises(error, match=match):
        if block:
            with kra.active(model, weights):
                pass
        else:
            kra.set_active(model, weights)
    assert zoo.snapshot(model).keys() == before.keys()
    np.testing.assert_array_equal(zoo.outputs(model, X), out)
    kra.set_active(model, {"dora": 1, "a": 0.5})


@pytest.mark.one_backend
def test_nothing_stays_after_eject():
    model = _model()
    kra.set_active(model, {"a": 0.5, "b": 0.5})
    kra.eject(model, "a")
    assert kra.status(model)[0].weight == 0.5
    kra.eject(model)
    assert len(model.variables) == 4
    assert not any("weight_" in v.path for v in model.variables)


def test_trained_and_frozen():
    model = _model(head=True)
    kra.set_active(model, {"a": 0.5, "b": 1.0}, train="a")
    adapters = {n: model._randadapt.adapters(n) for n in "ab"}
    head = model.get_layer("head")

    def values():
        found = {
            n: [
                np.array(keras.ops.convert_to_numpy(w))
                for a in one.values()
                for w in a.stored_weights()
            ]
            for n, one in adapters.items()
        }
        found["head"] = [np.array(w) for w in head.get_weights()]
        return found

    before = values()
    assert len(model.trainable_variables) == 2
    # A user's flag must not thaw what is frozen here.
    model.get_layer("hidden").trainable = True
    assert len(model.trainable_variables) == 2
    zoo.fit(model, X)
    after = values()
    assert not np.array_equal(before["a"][0], after["a"][0])
    for name in ("b", "head"):
        for one, other in zip(before[name], after[name]):
            np.testing.assert_array_equal(one, other)
    trained = {one.name: one.trained for one in kra.status(model)}
    assert trained == {"a": True, "b": False}
    # Without `train`, all are trained again.
    kra.set_active(model, {"a": 0.5, "b": 1.0})
    assert len(model.trainable_variables) == 6


def test_frozen_in_a_whole_model_file(tmp_path):
    model = _model()
    kra.set_active(model, ["a", "b"], train=["b"])
    model.save(tmp_path / "x.keras")
    loaded = keras.models.load_model(tmp_path / "x.keras")
    assert [one.trained for one in kra.status(loaded)] == [False, True]
    paths = [v.path for v in loaded.trainable_variables]
    assert len(paths) == 2 and all("/b/" in path for path in paths)


def test_frozen_in_a_weights_file(tmp_path):
    """The file says what was trained, and loading warns of a change."""
    model = _model()
    kra.set_active(model, ["a", "b"], train="b")
    model.save_weights(tmp_path / "frozen.weights.h5")
    loaded = _model()
    kra.set_active(loaded, ["a", "b"])
    loaded.save_weights(tmp_path / "all.weights.h5")
    match = r"changes what is trained: \['b'\]"
    with pytest.warns(kra.AdapterWarning, match=match) as seen:
        loaded.load_weights(tmp_path / "frozen.weights.h5")
    assert {w.filename for w in seen} == {__file__}
    assert [one.trained for one in kra.status(loaded)] == [False, True]
    assert len(loaded.trainable_variables) == 2
    # Nothing changes a second time, and nothing is said.
    loaded.load_weights(tmp_path / "frozen.weights.h5")
    with pytest.warns(kra.AdapterWarning, match="changes what is trained"):
        loaded.load_weights(tmp_path / "all.weights.h5")
    assert len(loaded.trainable_variables) == 4


@pytest.mark.one_backend
def test_a_weights_file_in_the_middle_of_training(tmp_path):
    """The same use loads, and another one is refused before anything."""
    model = _model()
    kra.set_active(model, ["a", "b"])
    model.save_weights(tmp_path / "same.weights.h5")
    kra.set_active(model, {"a": 0.5, "b": 1.0})
    model.save_weights(tmp_path / "other.weights.h5")
    trained = _model()
    kra.set_active(trained, ["a", "b"])
    names = []

    class Load(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.load_weights(tmp_path / "same.weights.h5")
            with pytest.raises(ValueError, match="is being trained"):
                self.model.load_weights(tmp_path / "other.weights.h5")
            names.append([one.weight for one in kra.status(self.model)])

    zoo.fit(trained, X, steps=1, callbacks=[Load()])
    assert names == [[1.0, 1.0]]


@pytest.mark.one_backend
def test_nothing_is_trained():
    model = _model()
    kra.set_active(model, ["a", "b"], train=[])
    assert model.trainable_variables == []
    with pytest.raises(ValueError, match="`train` must name active adapters"):
        kra.set_active(model, "a", train="b")
    assert [one.active for one in kra.status(model)] == [True, True]


def test_block():
    model = _model()
    base, a = _alone(model, "a")
    out = zoo.outputs(model, X)
    with kra.active(model, {"a": 0.5}):
        _close(zoo.outputs(model, X), base + 0.5 * a)
        with kra.active(model, {"a": 2.0}):
            _close(zoo.outputs(model, X), base + 2 * a)
        _close(zoo.outputs(model, X), base + 0.5 * a)
    np.testing.assert_array_equal(zoo.outputs(model, X), out)
    kra.set_active(model, {"a": 0.25, "b": 1.0}, train="b")
    out = zoo.outputs(model, X)
    with kra.active(model, "a"):
        _close(zoo.outputs(model, X), base + a)
    np.testing.assert_array_equal(zoo.outputs(model, X), out)
    assert [one.trained for one in kra.status(model)] == [False, True]
    assert [one.weight for one in kra.status(model)] == [0.25, 1.0]


class Distilled(keras.Model):
    """Learns from a mixture of its other adapters, in the training step."""

    def __init__(self, base, weights):
        super().__init__()
        self.base = base
        self.mixture = weights

    def call(self, x, training=None):
        return self.base(x, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        with kra.active(self, self.mixture):
            reference = keras.ops.stop_gradient(self.base(x))
        return keras.ops.mean((y_pred - reference) ** 2)


def test_inside_a_training_step():
    """Weights of a block in a step are constants of the step."""
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, name="hidden")]
    )
    zoo.set_weights(inner)
    model = Distilled(inner, {"b": 0.5, "c": -1.0})
    model(X)
    for i, name in enumerate("abc"):
        kra.inject(model, kra.LoRA(2, seed=i), "hidden", name=name)
        zoo.randomize(model, name, seed=i)
    kra.set_active(model, {"b": 0.5, "c": -1.0})
    target = zoo.outputs(model, X)
    kra.set_active(model, ["b", "c"])
    kra.set_active(model, "a")
    out = zoo.outputs(model, X)
    expected = np.mean((out - target) ** 2)
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(X, X, batch_size=5, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-4)
    np.testing.assert_array_equal(zoo.outputs(model, X), out)


@pytest.mark.one_backend
def test_weights_in_a_callback():
    """A variable can't be added in `fit`, and one that is there is assigned."""
    model = _model()
    base, a = _alone(model, "a")
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with kra.active(self.model, {"a": 0.5}):
                seen.append(zoo.outputs(self.model, X))

    with pytest.raises(ValueError, match="is being trained"):
        zoo.fit(model, X, callbacks=[Look()])
    model = _model()
    kra.set_active(model, {"a": 0.5})
    kra.set_active(model, "b")
    zoo.fit(model, X, callbacks=[Look()])
    _close(seen[-1], base + 0.5 * a)
    assert [one.weight for one in kra.status(model)] == [None, 1.0]


class TestStatus:
    def test_as_data(self):
        model = _model(head=True)
        kra.set_active(model, {"a": 0.5, "b": 1.0}, train="b")
        first, second = kra.status(model)
        assert (first.name, first.method, first.active) == ("a", "LoRA", True)
        assert first.weight == 0.5 and not first.trained
        assert first.sites == ("layers/dense",) and first.kept == ()
        assert first.parameters == 2 * 6 + 2 * 8
        assert second.trained and second.kept == ("layers/dense_1",)
        assert second.head_parameters == 8 * 3 + 3
        assert len(first.base_digest) == 16
        assert first.base_digest == second.base_digest

    def test_as_a_table(self):
        model = _model()
        kra.set_active(model, {"a": 0.5})
        lines = str(kra.status(model)).splitlines()
        assert lines[0].split()[:5] == [
            "name",
            "method",
            "active",
            "weight",
            "trained",
        ]
        assert lines[1].split()[:7] == [
            "a",
            "LoRA",
            "yes",
            "0.5",
            "yes",
            "1",
            "28",
        ]
        assert lines[2].split()[:5] == ["b", "LoRA", "no", "-", "no"]
        assert repr(kra.status(model)) == str(kra.status(model))

    def test_without_adapters(self):
        model = _model()
        kra.eject(model)
        assert kra.status(model) == ()
        assert str(kra.status(model)) == "No adapter is attached."
        with pytest.raises(TypeError, match="`model` must be"):
            kra.status(model.layers[0])

    def test_digest_tells_base_weights_apart(self):
        model, same = _model(), _model()
        before = kra.status(model)[0].base_digest
        assert kra.status(same)[0].base_digest == before
        kernel = same.get_layer("hidden")._kernel
        kernel.assign(2 * keras.ops.convert_to_tensor(kernel))
        assert kra.status(same)[0].base_digest != before
        with kra.merged(model):
            assert kra.status(model)[0].base_digest is None
