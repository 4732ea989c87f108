"""The layers that a bank's tenants may adapt, and those that they may not."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_randadapt as kra
from tests import zoo

IDS = zoo.integers(6, 5, high=11)
NAMES = ["alice", None, "bob", "bob", "", "alice"]

LOOKUPS = {
    "lora": lambda: kra.LoRA(2, alpha=3),
    "pissa": lambda: kra.LoRA(2, initialization="pissa"),
    "sora": lambda: kra.SoRA(2),
    "lorafa": lambda: kra.LoRAFA(2),
    "lorafa_hadamard": lambda: kra.LoRAFA(2, basis="hadamard"),
    "miss": lambda: kra.MiSS(3, scaling=2.0),
    "fourierft": lambda: kra.FourierFT(7, scaling=20.0),
    "loha": lambda: kra.LoHa(2),
    "lokr": lambda: kra.LoKr(1),
    "lokr_full": lambda: kra.LoKr(9),
    "miss_repeated": lambda: kra.MiSS(3, output_rank=4),
    "shira": lambda: kra.SHiRA(1, scaling=2.0),
    "rlora": lambda: kra.RLoRA(5, scaling=2.0),
    "vera": lambda: kra.VeRA(4, scaling=5.0),
    "vera_shared": lambda: kra.VeRA(4, shared=True, scaling=5.0),
    "vera_hadamard": lambda: kra.VeRA(4, basis="hadamard"),
}


def _check(folder, build, make, targets, x, tolerance=1e-5):
    """Compares each row with what its adapter gives alone."""
    expected = {None: _outputs(build(), x)}
    expected[""] = expected[None]
    for seed, name in enumerate(("alice", "bob")):
        model = build()
        kra.inject(model, make(), targets)
        zoo.randomize(model, seed=seed)
        expected[name] = _outputs(model, x)
        kra.save_adapter(model, folder / f"{name}.safetensors")
    assert np.abs(expected["alice"] - expected["bob"]).max() > 0.01
    rows = np.stack([expected[name][i] for i, name in enumerate(NAMES)])
    with kra.serving.AdapterBank(build(), folder) as bank:
        for found in (bank.predict(x, NAMES), bank(x, NAMES)):
            found = ops.convert_to_numpy(found)
            np.testing.assert_allclose(
                found, rows, rtol=tolerance, atol=tolerance
            )


def _outputs(model, x):
    return np.array(ops.convert_to_numpy(model(x)))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.every_backend] * (name in ("lora", "rlora")),
        )
        for name in LOOKUPS
    ],
)
def test_embeddings_and_tied_heads(name, tmp_path):
    _check(
        tmp_path,
        lambda: zoo.reversible_embedding()[0],
        LOOKUPS[name],
        "site",
        IDS,
    )


@pytest.mark.one_backend
@pytest.mark.cpu_seconds(10, reason="a step of each tenant is compiled")
@pytest.mark.parametrize(
    "build",
    [
        zoo.embedding,
        zoo.embedding_int8,
        zoo.reversible_embedding_untied,
        zoo.reversible_embedding_int8,
    ],
)
def test_kinds_of_embeddings(build, tmp_path):
    _check(tmp_path, lambda: build()[0], LOOKUPS["lora"], "site", IDS)


# JAX compiles a loop anew whenever it runs outside of a compiled function.
@pytest.mark.one_backend("torch")
@pytest.mark.parametrize(
    "build", [zoo.dense, zoo.einsum_query, zoo.reversible_embedding]
)
def test_nola(build, tmp_path):
    _check(
        tmp_path,
        lambda: build()[0],
        lambda: kra.NOLA(2, num_bases=5),
        "site",
        build()[1][:6],
    )


def _norms():
    inputs = keras.Input((4, 6))
    x = layers.LayerNormalization(name="one")(inputs)
    x = layers.Dense(6, "tanh")(x)
    x = layers.LayerNormalization(axis=[1, 2], name="two")(x)
    x = layers.BatchNormalization(name="three")(x)
    x = layers.GroupNormalization(2, name="four")(x)
    return zoo.set_weights(keras.Model(inputs, layers.Dense(3)(x)))


def test_offsets_of_normalizations(tmp_path):
    """BitFit adapts every bias, those of normalizations among them."""
    _check(tmp_path, _norms, kra.BitFit, None, zoo.normal(6, 4, 6))


class _FirstAxisIsTime(layers.Layer):
    """It calls its layer with the examples in the second axis."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = layers.Dense(6, name="query")

    def build(self, shape):
        self.query.build(shape)

    def call(self, x):
        return ops.transpose(self.query(ops.transpose(x, (1, 0, 2))), (1, 0, 2))


class _Positions(layers.Layer):
    """It looks up what belongs to no example, as relative positions do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(4, 6, name="query")

    def build(self, shape):
        self.table.build()

    def call(self, x):
        places = ops.arange(4)
        return x + self.table(ops.abs(places[None] - places[:, None]))[1]


class _ReadsKernel(layers.Layer):
    """It multiplies by the kernel of a layer that it does not call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = layers.Dense(6, name="query")

    def build(self, shape):
        self.query.build(shape)

    def call(self, x):
        return ops.matmul(x, ops.convert_to_tensor(self.query.kernel))


class _ReadsBias(_ReadsKernel):
    """Likewise with its bias."""

    def call(self, x):
        return x + ops.convert_to_tensor(self.query.bias)


class _NormOfTime(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = layers.BatchNormalization(axis=1, name="query")

    def build(self, shape):
        self.query.build(shape)

    def call(self, x):
        return self.query(x)


@pytest.mark.parametrize(
    ("layer", "make", "match"),
    [
        (_FirstAxisIsTime, kra.IA3, r"shape \(4, 7, 6\) in a batch of 7"),
        (_Positions, kra.RLoRA, r"shape \(4, 4\) in a batch of 7"),
        (_ReadsKernel, kra.RLoRA, "reads its kernel"),
        (_ReadsBias, kra.BitFit, "reads its bias"),
        (_NormOfTime, kra.BitFit, "normalizes the axis"),
    ],
)
def test_layers_whose_examples_are_not_told_apart(layer, make, match, tmp_path):
    """A wrong answer would be that of another tenant, so there is none."""

    def build():
        inputs = keras.Input((4, 6))
        return zoo.set_weights(keras.Model(inputs, layer()(inputs)))

    model = build()
    kra.inject(model, make(), "query")
    kra.save_adapter(model, tmp_path / "a.safetensors")
    model = build()
    before = _outputs(model, zoo.normal(2, 4, 6))
    with pytest.raises(ValueError, match=match):
        kra.serving.AdapterBank(model, tmp_path)
    assert kra.sites(model) == {}
    np.testing.assert_array_equal(_outputs(model, zoo.normal(2, 4, 6)), before)


@pytest.mark.one_backend
def test_a_model_that_fails_for_zeros(tmp_path):
    """Its layers can't be checked at first, and each batch is."""

    class Picky(layers.Layer):
        def call(self, x):
            if x.shape[0] == 7:
                raise RuntimeError("seven is not allowed")
            return x

    def build():
        inputs = keras.Input((4, 6))
        x = layers.Dense(6, name="query")(Picky()(inputs))
        return zoo.set_weights(keras.Model(inputs, x))

    model = build()
    kra.inject(model, kra.LoRA(2), "query")
    zoo.randomize(model)
    expected = _outputs(model, zoo.normal(2, 4, 6))
    kra.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.warns(kra.AdapterWarning, match="(?s)not be checked.*seven"):
        bank = kra.serving.AdapterBank(build(), tmp_path)
    found = bank.predict(zoo.normal(2, 4, 6), ["a", "a"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("make", [kra.SAID, lambda: kra.RandLoRA(2)])
def test_methods_without_lookups(make, tmp_path):
    model, _, targets = zoo.embedding()
    kra.inject(model, make(), targets)
    kra.save_adapter(model, tmp_path / "a.safetensors")
    kra.eject(model)
    with pytest.raises(ValueError, match="can't have weights of each"):
        kra.serving.AdapterBank(model, tmp_path)
