"""Sparse inputs of Dense layers: TensorFlow's `SparseTensor`, JAX's `BCOO`."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.ops import sparse as sparse_lib
from tests import rotation
from tests import zoo
from tests.test_matrix import METHODS

BACKEND = keras.config.backend()
pytestmark = pytest.mark.skipif(
    BACKEND not in ("tensorflow", "jax"),
    reason="Keras has no sparse tensors on this backend",
)

#: With dropout, each method whose delta takes its input another way.
WITH_DROPOUT = {
    "lora_dropout": lambda: kra.LoRA(2, dropout=0.3),
    "rlora_dropout": lambda: kra.RLoRA(5, dropout=0.3),
    "randlora_dropout": lambda: kra.RandLoRA(3, dropout=0.3),
    "vera_dropout": lambda: kra.VeRA(5, dropout=0.3),
    "hydra_dropout": lambda: kra.Hydra(2, dropout=0.3),
    "dora_dropout": lambda: kra.DoRA(kra.LoRA(2, dropout=0.3)),
}
CASES = {**METHODS, **WITH_DROPOUT}
#: One of the two backends for most methods, and both for the library's heart.
EVERYWHERE = {"lora", "rlora", "randlora", "vera", "lorafa", "lora_dropout"}


def _here(name):
    if name in EVERYWHERE:
        return True
    backends = ["jax", "tensorflow"]
    return backends[rotation.checksum(name) % 2] == BACKEND


def _inputs():
    generator = np.random.default_rng(0)
    kept = generator.random((16, 24)) < 0.2
    return np.where(kept, generator.normal(size=kept.shape), 0).astype(
        "float32"
    )


def _sparse(x):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.sparse.from_dense(x)
    from jax.experimental import sparse

    return sparse.BCOO.fromdense(x)


def _model():
    model = keras.Sequential(
        [
            keras.Input((24,), sparse=True),
            keras.layers.Dense(8, activation="tanh", name="site"),
            keras.layers.Dense(3, name="out"),
        ]
    )
    return zoo.set_weights(model)


@pytest.mark.parametrize("name", [name for name in CASES if _here(name)])
def test_every_method(name):
    """The outputs and the steps are those of the dense inputs."""
    x, y = _inputs(), zoo.normal(16, 3)
    found = []
    for inputs in (_sparse(x), x):
        model = _model()
        kra.inject(model, CASES[name](), "site")
        zoo.randomize(model)
        out = [keras.ops.convert_to_numpy(model(inputs))]
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(inputs, y, batch_size=16, verbose=0, shuffle=False)
        out.append(model.predict(inputs, batch_size=16, verbose=0))
        found.append(out)
    assert all(np.all(np.isfinite(one)) for one in found[0])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    # Dropout draws the same numbers for both, as the seeds are the same.
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make, copies",
    [
        (lambda: kra.LoRA(2), 0),
        (lambda: kra.DoRA(kra.LoRA(2)), 0),
        (lambda: kra.RLoRA(5), 1),
        (lambda: kra.VeRA(5), 1),
    ],
    ids=["lora", "dora", "rlora", "vera"],
)
def test_dense_copies(make, copies, monkeypatch):
    """The base product takes the sparse input, and so do LoRA's products."""
    model = _model()
    kra.inject(model, make(), "site")
    made = []

    def recording(x):
        if isinstance(x, sparse_lib._SPARSE):
            made.append(x)
        return sparse_lib.dense(x)

    for module in ("ops.gradients", "ops.transforms", "adapters.variables"):
        monkeypatch.setattr(f"keras_randadapt.{module}.dense", recording)
    model(_sparse(_inputs()))
    assert len(made) == copies


@pytest.mark.parametrize("quantized", [False, True])
def test_a_site_behind_a_sparse_layer(quantized):
    model = _model()
    if quantized:
        model.quantize("int8", filters="out")
    kra.inject(model, kra.RLoRA(5), "out")
    zoo.randomize(model)
    x = _inputs()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(_sparse(x))),
        keras.ops.convert_to_numpy(model(x)),
        rtol=1e-4,
        atol=1e-5,
    )
