"""`AdapterBank`: each example of a batch with the adapter of its tenant."""

import subprocess
import sys
import threading

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.serving import saved_model
from tests import adapter_files
from tests import zoo

METHODS = {
    "rlora": lambda: kra.RLoRA(5),
    "rlora_stacked": lambda: kra.RLoRA(23, scaling=2.0),
    "rlora_started": lambda: kra.RLoRA(5, beta_initializer="ones"),
    "vera": lambda: kra.VeRA(6, scaling=5.0),
    "vera_shared": lambda: kra.VeRA(6, shared=True, scaling=5.0),
    "vera_sparse": lambda: kra.VeRA(6, basis="sparse"),
    "lora": lambda: kra.LoRA(2, alpha=3),
    "pissa": lambda: kra.LoRA(2, initialization="pissa"),
    "lorafa": lambda: kra.LoRAFA(2),
    "miss": lambda: kra.MiSS(3),
    "shira": lambda: kra.SHiRA(1),
    "shira_magnitude": lambda: kra.SHiRA(1, mask="magnitude"),
    "fourierft": lambda: kra.FourierFT(7, scaling=20.0),
    "hira": lambda: kra.HiRA(2),
    "loha": lambda: kra.LoHa(2),
    "lokr": lambda: kra.LoKr(1),
    "oft": lambda: kra.OFT(4),
    "sora": lambda: kra.SoRA(2),
    "adalora": lambda: kra.AdaLoRA(2),
    "dylora": lambda: kra.DyLoRA(2),
    "rmlora": lambda: kra.RMLoRA(2),
    "ia3": lambda: kra.IA3(),
}


def _model(classes=3, dtype=None, seed=0):
    inputs = keras.Input((4, 6))
    x = keras.layers.Dense(6, name="query", dtype=dtype)(inputs)
    x = keras.layers.EinsumDense(
        "abc,cde->abde", (None, 2, 4), bias_axes="de", name="value", dtype=dtype
    )(x)
    x = keras.layers.Reshape((4, 8))(x)
    x = keras.layers.GlobalAveragePooling1D()(keras.ops.tanh(x))
    x = keras.layers.Dense(classes, name="logits", dtype=dtype)(x)
    return zoo.set_weights(keras.Model(inputs, x), seed)


X = zoo.normal(8, 4, 6)
NAMES = ["alice", None, "bob", "carol", "alice", "", "carol", "bob"]


def _tenant(path, make, seed, model=None, head=True):
    """Writes a tenant's file; its outputs for `X` by itself."""
    model = _model() if model is None else model
    kept = "logits" if head else None
    kra.inject(model, make(), ["query", "value"], keep_trainable=kept)
    zoo.randomize(model, seed=seed)
    layer = model.get_layer("logits")
    if head:
        layer.bias.assign(0.1 * seed + np.arange(layer.units, dtype="float32"))
        layer.kernel.assign(
            (1 + seed) * keras.ops.convert_to_tensor(layer.kernel)
        )
    kra.save_adapter(model, path)
    return np.asarray(keras.ops.convert_to_numpy(model(X)))


def _tenants(folder, make, **arguments):
    outputs = {
        name: _tenant(folder / f"{name}.safetensors", make, seed, **arguments)
        for seed, name in enumerate(("alice", "bob", "carol"))
    }
    outputs[None] = outputs[""] = np.asarray(
        keras.ops.convert_to_numpy(_model()(X))
    )
    return outputs


def _expected(outputs, names=NAMES):
    return np.stack([outputs[name][i] for i, name in enumerate(names)])


def _close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.every_backend]
            * (name in ("rlora", "vera", "lora", "ia3")),
        )
        for name in METHODS
    ],
)
def test_each_row_is_what_its_adapter_gives(name, tmp_path):
    outputs = _tenants(tmp_path, METHODS[name])
    assert np.abs(outputs["alice"] - outputs["bob"]).max() > 0.01
    model = _model()
    before = zoo.snapshot(model)
    with kra.serving.AdapterBank(model, tmp_path) as bank:
        assert bank.names == ["alice", "bob", "carol"] and "bob" in bank
        _close(bank.predict(X, NAMES), _expected(outputs))
        # In batches of which the last is not full.
        _close(bank.predict(X, NAMES, batch_size=3), _expected(outputs))
        found = keras.ops.convert_to_numpy(bank(X, NAMES))
        _close(found, _expected(outputs))
        _close(bank.predict(X, [None] * 8), outputs[None])
        # The model itself computes what it did.
        _close(keras.ops.convert_to_numpy(model(X)), outputs[None])
    after = zoo.snapshot(model)
    assert before.keys() == after.keys() and kra.sites(model) == {}
    for key, (path, value) in before.items():
        np.testing.assert_array_equal(after[key][1], value, err_msg=path)


def test_biases(tmp_path):
    """BitFit on Dense layers."""
    outputs = _tenants(tmp_path, kra.BitFit)
    with kra.serving.AdapterBank(_model(), tmp_path) as bank:
        _close(bank.predict(X, NAMES), _expected(outputs))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_bases(mode, tmp_path):
    def model():
        one = _model()
        one.quantize(mode, filters=lambda layer: layer.name == "query")
        return one

    path = tmp_path / "alice.safetensors"
    alone = _tenant(path, METHODS["rlora"], 1, model())
    base = np.asarray(keras.ops.convert_to_numpy(model()(X)))
    with kra.serving.AdapterBank(model(), tmp_path) as bank:
        found = bank.predict(X, ["alice", None] * 4)
    _close(found[::2], alone[::2])
    _close(found[1::2], base[1::2])


def test_sixteen_bits(tmp_path):
    outputs = _tenants(tmp_path, METHODS["rlora"])
    model = _model(dtype="mixed_bfloat16")
    with kra.serving.AdapterBank(model, tmp_path) as bank:
        found = bank.predict(X, NAMES).astype("float32")
    _close(found, _expected(outputs), 0.06)


def test_names_that_ride_in_the_inputs(tmp_path):
    outputs = _tenants(tmp_path, METHODS["rlora"])
    inputs = {"x": keras.Input((4, 6), name="x")}
    inner = _model()
    model = keras.Model(inputs, inner(inputs["x"]))
    for name in ("alice", "bob", "carol"):
        # The files are of the inner model.
        (tmp_path / f"{name}.safetensors").unlink()
    outputs = {}
    for seed, name in enumerate(("alice", "bob")):
        kra.inject(model, kra.RLoRA(5), "query")
        zoo.randomize(model, seed=seed)
        kra.save_adapter(model, tmp_path / f"{name}.safetensors")
        outputs[name] = np.asarray(keras.ops.convert_to_numpy(model({"x": X})))
        kra.eject(model)
    names = np.array(["bob", "alice"] * 4)
    with kra.serving.AdapterBank(model, tmp_path) as bank:
        expected = _expected(outputs, list(names))
        _close(bank.predict({"x": X, "adapter": names}), expected)
        batches = [
            {"x": X[:4], "adapter": names[:4]},
            {"x": X[4:], "adapter": names[4:].astype("S")},
        ]
        _close(bank.predict(batches), expected)
        with pytest.raises(ValueError, match="an entry 'adapter'"):
            bank.predict({"x": X})
        with pytest.raises(ValueError, match="an entry 'adapter'"):
            bank({"x": X})
        found = bank({"x": X, "adapter": names})
        _close(keras.ops.convert_to_numpy(found), expected)


class _Batches(keras.utils.PyDataset):
    """Three examples a batch, with what training has beside them."""

    def __init__(self, names, count):
        super().__init__()
        self.names, self.count = names, count

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, i):
        part = slice(3 * i, 3 * i + 3)
        inputs = {"x": X[part], "adapter": self.names[part]}
        return inputs, np.zeros(len(X[part]))


def _pipelines(names):
    """Pipelines of Keras, of TensorFlow and of PyTorch."""
    yield _Batches(names, 3)
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        content = {"x": X, "adapter": names}
        yield tf.data.Dataset.from_tensor_slices(content).batch(3)
    if backend == "torch":
        from torch.utils import data

        content = [{"x": x, "adapter": name} for x, name in zip(X, names)]
        yield data.DataLoader(content, batch_size=3)


def test_data_pipelines(tmp_path):
    def model():
        inputs = {"x": keras.Input((4, 6), name="x")}
        return keras.Model(inputs, _model()(inputs["x"]))

    outputs = {"": keras.ops.convert_to_numpy(model()({"x": X}))}
    for seed, name in enumerate(("alice", "bob")):
        one = model()
        kra.inject(one, kra.RLoRA(5), "query")
        zoo.randomize(one, seed=seed)
        kra.save_adapter(one, tmp_path / f"{name}.safetensors")
        outputs[name] = keras.ops.convert_to_numpy(one({"x": X}))
    names = ["bob", "alice", "", "bob", "bob", "", "alice", "alice"]
    with kra.serving.AdapterBank(model(), tmp_path) as bank:
        sizes, compiled = [], bank._compiled

        def counted(inputs, rows):
            sizes.append(len(rows))
            return compiled(inputs, rows)

        bank._compiled = counted
        for pipeline in _pipelines(names):
            _close(bank.predict(pipeline), _expected(outputs, names))
            # The last batch is filled up.
            assert set(sizes) == {3}
            with pytest.raises(ValueError, match="goes with arrays"):
                bank.predict(pipeline, names)
        with pytest.raises(ValueError, match="must have an end"):
            bank.predict(_Batches(names, None))


@pytest.mark.one_backend
def test_one_request_sees_one_state(tmp_path):
    """A tenant that is replaced meanwhile is the old one until the end."""
    outputs = _tenants(tmp_path, METHODS["rlora"])
    with kra.serving.AdapterBank(_model(), tmp_path, capacity=4) as bank:
        compiled = bank._compiled

        def replacing(inputs, rows):
            if "alice" in bank:
                bank.remove("alice")
                bank.add("alice", tmp_path / "bob.safetensors")
            return compiled(inputs, rows)

        bank._compiled = replacing
        found = bank.predict(X, ["alice"] * 8, batch_size=2)
        _close(found, outputs["alice"])
        bank._compiled = compiled
        _close(bank.predict(X, ["alice"] * 8), outputs["bob"])


@pytest.mark.one_backend
class TestHeads:
    def test_fewer_classes(self, tmp_path):
        outputs = {
            name: _tenant(
                tmp_path / f"{name}.safetensors",
                METHODS["rlora"],
                seed,
                _model(classes),
            )
            for seed, (name, classes) in enumerate(
                {"two": 2, "four": 4, "three": 3}.items()
            )
        }
        bank = kra.serving.AdapterBank(_model(4))
        for name in outputs:
            bank.add(name, tmp_path / f"{name}.safetensors")
        found = bank.predict(X[:3], ["two", "three", "four"])
        for i, (name, classes) in enumerate(
            {"two": 2, "three": 3, "four": 4}.items()
        ):
            assert bank.classes(name) == classes
            _close(found[i, :classes], outputs[name][i])
            assert np.all(found[i, classes:] == np.finfo("float32").min)

    def test_more_classes_than_the_models(self, tmp_path):
        _tenant(tmp_path / "a.safetensors", METHODS["rlora"], 0, _model(4))
        with pytest.raises(ValueError, match="kept layer .* must be"):
            kra.serving.AdapterBank(_model(3), tmp_path)

    def test_activation(self, tmp_path):
        def model(classes):
            one = _model(classes)
            one.get_layer("logits").activation = keras.activations.softmax
            return one

        _tenant(tmp_path / "a.safetensors", METHODS["rlora"], 0, model(2))
        with pytest.raises(ValueError, match="without an activation"):
            kra.serving.AdapterBank(model(3), tmp_path)

    def test_no_head(self, tmp_path):
        outputs = _tenants(tmp_path, METHODS["rlora"], head=False)
        with kra.serving.AdapterBank(_model(), tmp_path) as bank:
            assert bank.classes("bob") is None
            _close(bank.predict(X, NAMES), _expected(outputs))


@pytest.mark.one_backend
class TestTenants:
    @pytest.fixture
    def bank(self, tmp_path):
        self.outputs = _tenants(tmp_path, METHODS["rlora"])
        with kra.serving.AdapterBank(_model(), tmp_path, capacity=4) as bank:
            yield bank

    def test_added_and_removed(self, bank, tmp_path):
        bank.remove("alice")
        assert bank.names == ["bob", "carol"] and len(bank) == 2
        with pytest.raises(ValueError, match="no tenant called 'alice'"):
            bank.predict(X, NAMES)
        bank.add("again", tmp_path / "alice.safetensors")
        self.outputs["again"] = self.outputs["alice"]
        names = ["again" if one == "alice" else one for one in NAMES]
        _close(bank.predict(X, names), _expected(self.outputs, names))

    def test_full(self, bank, tmp_path):
        bank.add("four", tmp_path / "bob.safetensors")
        with pytest.raises(ValueError, match="is full: its capacity is 4"):
            bank.add("five", tmp_path / "bob.safetensors")
        assert len(bank) == 4

    def test_adding_compiles_nothing(self, bank, tmp_path):
        bank.predict(X, NAMES)
        compiled = bank._compiled
        variables = [id(v) for v in bank.model.variables]
        bank.add("four", tmp_path / "bob.safetensors")
        bank.predict(X, ["four"] * 8)
        assert bank._compiled is compiled
        assert variables == [id(v) for v in bank.model.variables]

    @pytest.mark.parametrize(
        ("name", "error", "match"),
        [
            ("alice", ValueError, "a tenant called 'alice' already"),
            ("", ValueError, "must not be empty"),
            (3, TypeError, "must be a string"),
            ("\ud800", ValueError, "text that UTF-8 can write"),
        ],
    )
    def test_bad_names(self, bank, tmp_path, name, error, match):
        with pytest.raises(error, match=match):
            bank.add(name, tmp_path / "bob.safetensors")

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: kra.RLoRA(5, seed=1), "seed=1 and 0"),
            (lambda: kra.RLoRA(6), "rank=6 and 5"),
            (lambda: kra.VeRA(5), "it has a VeRA, and the bank a RLoRA"),
        ],
    )
    def test_another_adapter(self, bank, tmp_path, make, match):
        path = tmp_path / "other.safetensors"
        _tenant(path, make, 1)
        with pytest.raises(ValueError, match=match):
            bank.add("other", path)
        assert len(bank) == 3

    def test_another_base(self, bank, tmp_path):
        path = tmp_path / "other.safetensors"
        _tenant(path, METHODS["rlora"], 1, _model(seed=5))
        with pytest.raises(ValueError, match="on other base weights"):
            bank.add("other", path)

    def test_other_sites(self, bank, tmp_path):
        model = _model()
        kra.inject(model, kra.RLoRA(5), "query", keep_trainable="logits")
        kra.save_adapter(model, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="can't share a bank"):
            bank.add("other", tmp_path / "other.safetensors")

    def test_damaged(self, bank, tmp_path):
        path = tmp_path / "bob.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="damaged or cut short"):
            bank.add("four", path)
        with pytest.raises(FileNotFoundError):
            bank.add("four", tmp_path / "nowhere.safetensors")

    @pytest.mark.parametrize("name", ["nobody", "", None])
    def test_no_such_tenant(self, bank, name):
        for call in (bank.remove, bank.classes):
            with pytest.raises(ValueError, match="no tenant called"):
                call(name)
        assert len(bank) == 3

    def test_nothing_to_compute(self, bank):
        with pytest.raises(ValueError, match="no example"):
            bank.predict(X[:0], [])
        with pytest.raises(ValueError, match="no example"):
            bank.predict([])

    def test_files_of_the_first_version(self, tmp_path):
        outputs = _tenants(tmp_path, METHODS["rlora"])
        for name in ("alice", "bob", "carol"):
            adapter_files.as_version_1(tmp_path / f"{name}.safetensors")
        with pytest.warns(kra.AdapterWarning, match="no fingerprint"):
            bank = kra.serving.AdapterBank(_model(), tmp_path)
        _close(bank.predict(X, NAMES), _expected(outputs))

    def test_number_of_names(self, bank):
        with pytest.raises(ValueError, match="7 names for 8 examples"):
            bank.predict(X, NAMES[:7])

    def test_status(self, bank):
        text = bank.status()
        assert "3 of 4" in text and "RLoRA" in text and "heads 1" in text

    def test_closed(self, bank):
        bank.close()
        with pytest.raises(ValueError, match="is closed"):
            bank.predict(X, NAMES)
        bank.close()


@pytest.mark.one_backend
def test_ranks_of_lora(tmp_path):
    """They are filled up, and scalings are folded in."""
    makes = {
        "large": lambda: kra.LoRA(4, alpha=8),
        "small": lambda: kra.LoRA(1, alpha=3),
        "other": lambda: kra.LoRA(3, scaling=0.5, seed=4),
    }
    outputs = {
        name: _tenant(tmp_path / f"{name}.safetensors", make, seed)
        for seed, (name, make) in enumerate(makes.items())
    }
    bank = kra.serving.AdapterBank(_model())
    for name in makes:
        bank.add(name, tmp_path / f"{name}.safetensors")
    names = ["small", "large", "other", "small"] * 2
    _close(bank.predict(X, names), _expected(outputs, names))
    _tenant(tmp_path / "huge.safetensors", lambda: kra.LoRA(6), 1)
    with pytest.raises(ValueError, match="rank 6, and the bank's is 4.*rank=6"):
        bank.add("huge", tmp_path / "huge.safetensors")
    bank.close()
    with kra.serving.AdapterBank(_model(), tmp_path, rank=8) as bank:
        _close(bank.predict(X, names), _expected(outputs, names))
        bank.save(tmp_path / "bank.file")
    with kra.serving.AdapterBank.load(tmp_path / "bank.file", _model()) as bank:
        _close(bank.predict(X, names), _expected(outputs, names))
        bank.remove("small")
        bank.add("small", tmp_path / "small.safetensors")
        _close(bank.predict(X, names), _expected(outputs, names))


@pytest.mark.one_backend
def test_adapters_that_became_loras(tmp_path):
    """`to_lora` and `compact` give each site a rank of its own."""
    outputs = {}
    model = _model()
    kra.inject(model, kra.RLoRA(5), ["query", "value"])
    zoo.randomize(model, seed=1)
    kra.to_lora(model, energy=0.9)
    kra.save_adapter(model, tmp_path / "became.safetensors")
    outputs["became"] = keras.ops.convert_to_numpy(model(X))
    model = _model()
    kra.inject(model, kra.SoRA(4), ["query", "value"])
    zoo.randomize(model, seed=2)
    for i, adapter in enumerate(model._randadapt.adapters("default").values()):
        adapter.gate.assign([0.5, 0.0, 2.0, float(i)])
    kra.compact(model)
    kra.save_adapter(model, tmp_path / "compact.safetensors")
    outputs["compact"] = keras.ops.convert_to_numpy(model(X))
    outputs[None] = keras.ops.convert_to_numpy(_model()(X))
    names = ["became", "compact", None, "compact"] * 2
    with kra.serving.AdapterBank(_model(), tmp_path, rank=6) as bank:
        _close(bank.predict(X, names), _expected(outputs, names))


@pytest.mark.one_backend
class TestConfigs:
    """What tenants may differ in, and what they must not."""

    def _bank(self, folder, first, second, **arguments):
        outputs = {}
        for seed, (name, make) in enumerate({"a": first, "b": second}.items()):
            path = folder / f"{name}.safetensors"
            outputs[name] = _tenant(path, make, seed)
        bank = kra.serving.AdapterBank(_model(), folder, **arguments)
        names = ["a", "b"] * 4
        _close(bank.predict(X, names), _expected(outputs, names))

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (lambda: kra.RLoRA(5), lambda: kra.RLoRA(5, dropout=0.5)),
            (lambda: kra.VeRA(5), lambda: kra.VeRA(5, d_initial=0.5)),
            (
                lambda: kra.LoRA(2),
                lambda: kra.LoRA(
                    1, initialization="gaussian", dtype="bfloat16"
                ),
            ),
        ],
    )
    def test_arguments_of_training(self, tmp_path, first, second):
        self._bank(tmp_path, first, second)

    @pytest.mark.parametrize(
        ("first", "second", "match"),
        [
            # The first values of a decomposition depend on its rank.
            (
                lambda: kra.LoRA(4, initialization="pissa"),
                lambda: kra.LoRA(2, initialization="pissa"),
                "rank=2 and 4",
            ),
            (
                lambda: kra.LoRA(2),
                lambda: kra.LoRA(2, initialization="pissa"),
                "can't share this bank",
            ),
        ],
    )
    def test_other_updates(self, tmp_path, first, second, match):
        with pytest.raises(ValueError, match=match):
            self._bank(tmp_path, first, second)

    def test_ranks_of_other_methods(self, tmp_path):
        with pytest.raises(ValueError, match="`rank` is for banks of LoRAs"):
            self._bank(tmp_path, METHODS["rlora"], METHODS["rlora"], rank=8)


@pytest.mark.one_backend
class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: kra.DoRA(kra.LoRA(2)), "has a `DoRA`"),
            (lambda: kra.RandLoRA(2), "has a `RandLoRA`"),
            (lambda: kra.Bottleneck(2), "has a `Bottleneck`"),
        ],
    )
    def test_methods(self, tmp_path, make, match):
        model = _model()
        kra.inject(model, make(), "query")
        kra.save_adapter(model, tmp_path / "a.safetensors")
        plain = _model()
        before = zoo.snapshot(plain)
        with pytest.raises(ValueError, match=match):
            kra.serving.AdapterBank(plain, tmp_path)
        assert zoo.snapshot(plain).keys() == before.keys()
        assert type(plain) is keras.Model or kra.sites(plain) == {}

    def test_layers(self, tmp_path):
        model, _, targets = zoo.conv2d_strided()
        kra.inject(model, kra.LoRA(2), targets)
        kra.save_adapter(model, tmp_path / "a.safetensors")
        kra.eject(model)
        with pytest.raises(ValueError, match="a Conv2D, with a `LoRA`. In"):
            kra.serving.AdapterBank(model, tmp_path)

    def test_weights(self, tmp_path):
        model = _model()
        kra.inject(model, kra.LoRA(2), "query")
        kra.set_active(model, {"default": 0.5})
        kra.save_adapter(model, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="has the weight 0.5"):
            kra.serving.AdapterBank(_model(), tmp_path)

    def test_moved_state(self, tmp_path):
        _tenant(tmp_path / "a.safetensors", METHODS["rlora"], 0)
        adapter_files.edit(
            tmp_path / "a.safetensors",
            {"moved": ["layers/x#0"]},
            {"layers/x#0": np.zeros(2, "float32")},
        )
        with pytest.raises(ValueError, match="state of the base model"):
            kra.serving.AdapterBank(_model(), tmp_path)

    def test_other_models(self, tmp_path):
        _tenant(tmp_path / "a.safetensors", METHODS["rlora"], 0)
        model, _, _ = zoo.dense()
        with pytest.raises(ValueError, match="lacks 2 of its 3 addresses"):
            kra.serving.AdapterBank(model, tmp_path)
        assert kra.sites(model) == {}

    def test_files_of_a_part(self, tmp_path):
        inner = _model()
        kra.inject(inner, kra.LoRA(2), "query")
        kra.save_adapter(inner, tmp_path / "a.safetensors")
        kra.eject(inner)
        inputs = keras.Input((4, 6))
        outputs = keras.layers.Activation("tanh")(inner(inputs))
        model = keras.Model(inputs, outputs)
        with pytest.raises(ValueError, match="of a part of this model"):
            kra.serving.AdapterBank(model, tmp_path)

    def test_adapted_model(self):
        model = _model()
        kra.inject(model, kra.LoRA(2), "query")
        with pytest.raises(ValueError, match="has adapters attached"):
            kra.serving.AdapterBank(model)

    def test_no_tenant(self):
        with pytest.raises(ValueError, match="no tenant yet"):
            kra.serving.AdapterBank(_model()).predict(X, [None] * 8)

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="a dict from name to file, or a"):
            kra.serving.AdapterBank(_model(), tmp_path / "nowhere")


def _requests(bank, outputs, seconds_of_work, path):
    """Eight threads ask while tenants come and go; what was wrong."""
    wrong, stop = [], threading.Event()
    fixed = ["alice", "bob", "carol"]

    def ask(seed):
        generator = np.random.default_rng(seed)
        for _ in range(seconds_of_work):
            names = list(generator.choice([*fixed, ""], 8))
            found = bank.predict(X, names)
            if np.abs(found - _expected(outputs, names)).max() > 1e-4:
                wrong.append(names)

    def change():
        i = 0
        while not stop.is_set():
            bank.add(f"guest {i}", path)
            bank.remove(f"guest {i}")
            i += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    changer = threading.Thread(target=change)
    changer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changer.join()
    return wrong


def test_threads(tmp_path):
    outputs = _tenants(tmp_path, METHODS["rlora"])
    with kra.serving.AdapterBank(_model(), tmp_path) as bank:
        assert _requests(bank, outputs, 5, tmp_path / "bob.safetensors") == []


@pytest.mark.slow(reason="ten thousand requests")
def test_ten_thousand_requests(tmp_path):
    outputs = _tenants(tmp_path, METHODS["rlora"])
    with kra.serving.AdapterBank(_model(), tmp_path) as bank:
        path = tmp_path / "bob.safetensors"
        assert _requests(bank, outputs, 1250, path) == []


_ONLY_TENSORFLOW = """
import sys

# An import of one of these raises an error; TensorFlow can do without Keras.
for name in ("keras", "keras_hub", "keras_randadapt"):
    sys.modules[name] = None

import numpy as np
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
serve = model.signatures["serving_default"]
given = np.load(sys.argv[2])
inputs = {"x": tf.constant(given["x"]), "adapter": tf.constant(given["names"])}
found = serve(**inputs)["output_0"]
np.save(sys.argv[3], found.numpy())
try:
    serve(x=inputs["x"], adapter=tf.constant(["nobody"] * len(given["x"])))
except tf.errors.InvalidArgumentError as error:
    assert "no tenants called" in str(error) and "nobody" in str(error), error
else:
    raise AssertionError("an unknown name was answered")
"""


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="Keras makes no SavedModel of itself on this backend",
)
class TestSavedModel:
    @pytest.mark.cpu_seconds(15, reason="a process imports TensorFlow")
    @pytest.mark.parametrize("name", ["rlora", "lora"])
    def test_in_a_process_of_tensorflow_alone(self, tmp_path, name):
        files = tmp_path / "files"
        files.mkdir()
        outputs = _tenants(files, METHODS[name])
        inner = _model()
        with kra.serving.AdapterBank(inner, files) as bank:
            bank.model.inputs[0].name = "x"
            bank.export(tmp_path / "saved")
        names = np.array([one or "" for one in NAMES])
        np.savez(tmp_path / "given.npz", x=X, names=names.astype("S"))
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                _ONLY_TENSORFLOW,
                tmp_path / "saved",
                tmp_path / "given.npz",
                tmp_path / "found.npy",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        _close(np.load(tmp_path / "found.npy"), _expected(outputs))

    def test_signature_decides_the_shapes(self):
        inputs = {"ids": keras.Input((None,), dtype="int32", name="ids")}
        model = keras.Model(inputs, keras.layers.Embedding(5, 2)(inputs["ids"]))
        spec = {"ids": keras.InputSpec(shape=(None, 7), dtype="int32")}
        for signature in (spec, [spec]):
            (found,) = saved_model.specs_of(model, signature).values()
            assert (found.shape.as_list(), found.name) == ([None, 7], "ids")
        assert saved_model.specs_of(model)["ids"].shape.as_list() == [
            None,
            None,
        ]
        for bad in ({"x": spec["ids"]}, [], spec["ids"], {"ids": None}):
            with pytest.raises(ValueError, match="which are \\['ids'\\]"):
                saved_model.specs_of(model, bad)


def test_no_saved_model(tmp_path):
    _tenants(tmp_path, METHODS["rlora"])
    with kra.serving.AdapterBank(_model()) as bank:
        match = "no tenant yet"
        if keras.config.backend() != "tensorflow":
            match = "takes the TensorFlow backend"
        with pytest.raises(ValueError, match=match):
            bank.export(tmp_path / "saved")
