"""Kernels that a call of `generate` or `predict` forms once."""

import threading

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import forming
from keras_randadapt.sites import formed
from tests import zoo

METHODS = {
    "randlora": lambda: kra.RandLoRA(4),
    "dora": lambda: kra.DoRA(kra.LoRA(2)),
    "ia3": lambda: kra.IA3(),
}

_ALL = 10**9


def _language_model(dtype="float32"):
    hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=13,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=8,
        dtype=dtype,
    )
    model = hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    zoo.set_weights(model)
    for weight in model.weights:
        if "embedding" in weight.path:
            weight.assign(zoo.normal(*weight.shape))
    return model


def _prompt():
    ids = zoo.integers(2, 8, high=13)
    mask = np.arange(8)[None] < np.array([[3], [2]])
    return {"token_ids": ids * mask, "padding_mask": mask.astype("int32")}


def _text(model):
    found = model.generate(_prompt(), stop_token_ids=None)["token_ids"]
    return keras.ops.convert_to_numpy(found)


def _plain():
    """Two Dense layers of 240 and 120 numbers, in bytes 960 and 480."""
    model = keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(24, activation="tanh", name="up"),
            keras.layers.Dense(5, name="down"),
        ]
    )
    return zoo.set_weights(model)


@pytest.fixture
def products(monkeypatch):
    """The sites whose adapters were asked for a product of inputs."""
    found = []
    for cls in (Adapter, kra.RandLoRA, kra.DoRA, kra.IA3):
        own = vars(cls).get("adapt")
        if own is None:
            continue

        def adapt(self, *args, own=own, **kwargs):
            found.append(self.site.address)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(cls, "adapt", adapt)
    return found


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
@pytest.mark.parametrize("method", ["randlora"])
def test_generate_on_every_backend(method, products):
    _check_generate(method, products)


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
@pytest.mark.one_backend
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_generate(method, products):
    _check_generate(method, products)


def _check_generate(method, products):
    texts = []
    for limit in (0, _ALL):
        model = _language_model()
        kra.inject(model, METHODS[method](), "all-linear", memory_limit=limit)
        zoo.randomize(model, scale=1.0)
        before = zoo.snapshot(model)
        products.clear()
        texts.append(_text(model))
        # A compiled loop asks once for all its steps.
        assert bool(products) == (limit == 0)
        for path, value in zoo.snapshot(model).items():
            np.testing.assert_array_equal(value[1], before[path][1])
    np.testing.assert_array_equal(*texts)

    # The compiled loop forms the kernels of the values at the time.
    zoo.randomize(model, seed=3, scale=1.0)
    changed = _text(model)
    assert (changed != texts[1]).any()
    with kra.merged(model):
        np.testing.assert_array_equal(_text(model), changed)
    with kra.disabled(model):
        base = _text(model)
    np.testing.assert_array_equal(base, _text(_language_model()))


@pytest.mark.parametrize("method", METHODS)
def test_predict(method, products, monkeypatch):
    x = zoo.normal(24, 10)
    outputs, calls = [], []
    own = forming.kernels
    monkeypatch.setattr(
        forming, "kernels", lambda *given: calls.append(1) or own(*given)
    )
    for limit in (0, _ALL):
        model = _plain()
        kra.inject(model, METHODS[method](), "all-linear", memory_limit=limit)
        zoo.randomize(model)
        products.clear()
        calls.clear()
        outputs.append(model.predict(x, batch_size=8, verbose=0))
        # TensorFlow's compiled function takes no kernels.
        forms = limit and keras.config.backend() != "tensorflow"
        assert bool(products) != bool(forms)
        assert len(calls) <= 1
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)

    zoo.randomize(model, seed=3)
    changed = model.predict(x, batch_size=8, verbose=0)
    assert np.abs(changed - outputs[1]).max() > 0.01
    one_by_one = model(x, training=False)
    np.testing.assert_allclose(
        changed, keras.ops.convert_to_numpy(one_by_one), rtol=1e-4, atol=1e-5
    )
    batch = model.predict_on_batch(x[:8])
    np.testing.assert_allclose(batch, changed[:8], rtol=1e-4, atol=1e-5)
    with kra.disabled(model):
        base = model.predict(x, batch_size=8, verbose=0)
    np.testing.assert_array_equal(
        base, _plain().predict(x, batch_size=8, verbose=0)
    )


@pytest.mark.one_backend
class TestLimit:
    def _names(self, model):
        layers = model._randadapt.layers
        return [layers[one].name for one in forming.sites_to_form(model)]

    @pytest.mark.parametrize(
        "limit, names",
        [(0, []), (479, []), (480, ["down"]), (960, ["up"]), (1440, 2)],
    )
    def test_bytes(self, limit, names):
        model = _plain()
        kra.inject(model, kra.LoRA(2), "all-linear", memory_limit=limit)
        names = ["up", "down"] if names == 2 else names
        assert self._names(model) == names

    def test_default(self):
        """A quarter of the 1556 bytes of the base holds neither kernel."""
        model = _plain()
        kra.inject(model, kra.LoRA(2), "all-linear")
        assert forming.memory_limit(model._randadapt) == 389
        assert self._names(model) == []

    def test_costly_methods_come_first(self):
        model = _plain()
        kra.inject(model, kra.LoRA(2), "up", memory_limit=_ALL)
        kra.inject(model, kra.RandLoRA(2), "down", name="b")
        kra.set_active(model, ["default", "b"])
        assert self._names(model) == ["down", "up"]

    def test_few_inputs_do_not_pay(self):
        """RLoRA's update costs as much as products of `rank + outputs` rows."""
        model = _plain()
        kra.inject(model, kra.RLoRA(16), "up", memory_limit=_ALL)
        found = [len(forming.sites_to_form(model, n)) for n in (39, 40, None)]
        assert found == [0, 1, 1]
        kra.eject(model)
        kra.inject(model, kra.LoRA(2), "up", memory_limit=_ALL)
        # A step of many rows needs 10 * 24 / (10 + 24) of them.
        found = [
            len(forming.sites_to_form(model, n, whole=True)) for n in (6, 7)
        ]
        assert found == [0, 1] and len(forming.sites_to_form(model, 1)) == 1

    def test_left_out(self):
        for model in (zoo.dense_int8()[0], zoo.dense()[0]):
            adapter = kra.LoRA(2)
            kra.inject(model, adapter, "site", memory_limit=_ALL)
            layer = model.get_layer("site")
            names = [] if layer.quantization_mode else ["site"]
            assert self._names(model) == names
        half = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_bfloat16")]
        )
        kra.inject(half, kra.LoRA(2), "all-linear", memory_limit=_ALL)
        assert self._names(half) == []

    @pytest.mark.parametrize(
        "limit, error",
        [(-1, ValueError), (0.5, TypeError), (True, TypeError)],
    )
    def test_bad_limit(self, limit, error):
        model = _plain()
        with pytest.raises(error, match="memory_limit"):
            kra.inject(model, kra.LoRA(2), "up", memory_limit=limit)
        assert not kra.sites(model)


@pytest.mark.one_backend
def test_another_thread_sees_nothing():
    model = _plain()
    kra.inject(model, kra.LoRA(2), "up", memory_limit=_ALL)
    site = model.get_layer("up")
    seen = []
    addresses = forming.sites_to_form(model)
    with formed.shown(
        forming._by_site(model, forming.kernels(model, addresses))
    ):
        thread = threading.Thread(
            target=lambda: seen.append(formed.kernel_of(site))
        )
        thread.start()
        thread.join()
        seen.append(formed.kernel_of(site))
    seen.append(formed.kernel_of(site))
    assert seen[0] is None and seen[1] is not None and seen[2] is None
