"""The orthogonality penalty against its formula."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


def _orthonormal(rows, columns, seed=0):
    """Orthonormal rows or columns, whichever are fewer."""
    u, _, v = np.linalg.svd(
        zoo.normal(rows, columns, seed=seed), full_matrices=False
    )
    return u @ v


def _penalty(strength, matrix):
    value = kra.regularizers.Orthogonality(strength)(
        keras.ops.convert_to_tensor(matrix.astype("float32"))
    )
    return float(keras.ops.convert_to_numpy(value))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 3)])
def test_formula(shape):
    """By singular values: the sum of `(s**2 - 1)**2`."""
    matrix = zoo.normal(*shape)
    s = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    expected = 0.3 * ((s**2 - 1) ** 2).sum()
    np.testing.assert_allclose(_penalty(0.3, matrix), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_zero_for_orthonormal_factors(shape):
    assert _penalty(1.0, _orthonormal(*shape)) < 1e-10
    assert _penalty(1.0, 1.1 * _orthonormal(*shape)) > 0.1


@pytest.mark.parametrize("rank", [32, 64, 80])
def test_orthonormal_pair_is_as_near_to_the_identity_as_its_rank_allows(rank):
    """`||W W' - I||_F**2 = d - rank`: 68, 36 and 20 for 100 classes."""
    a = _orthonormal(120, rank, seed=1)
    b = _orthonormal(rank, 100, seed=2)
    assert _penalty(0.1, a) + _penalty(0.1, b) < 1e-8
    delta = a.astype("float64") @ b
    error = delta.T @ delta - np.eye(100)
    np.testing.assert_allclose((error**2).sum(), 100 - rank, rtol=1e-4)


@pytest.mark.every_backend
def test_in_the_model_losses_and_the_gradient():
    """Plain SGD on a constant loss follows the penalty's gradient."""
    model, x, targets = zoo.dense()
    regularizer = kra.regularizers.Orthogonality(0.2)
    kra.inject(model, kra.LoRA(3, regularizer=regularizer), targets)
    zoo.randomize(model)
    a, b = map(keras.ops.convert_to_numpy, model.trainable_variables)
    a, b = np.array(a, "float64"), np.array(b, "float64")
    expected = _penalty(0.2, a) + _penalty(0.2, b)
    losses = [float(keras.ops.convert_to_numpy(v)) for v in model.losses]
    assert len(losses) == 2
    np.testing.assert_allclose(sum(losses), expected, rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.1), loss="mse", loss_weights=[0.0])
    y = np.zeros((8, 6), "float32")
    model.fit(x, y, batch_size=8, verbose=0)
    for variable, value, rank_axis in zip(
        model.trainable_variables, (a, b), (1, 0), strict=True
    ):
        if rank_axis == 1:
            gradient = 4 * value @ (value.T @ value - np.eye(3))
        else:
            gradient = 4 * (value @ value.T - np.eye(3)) @ value
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(variable),
            value - 0.1 * 0.2 * gradient,
            rtol=1e-5,
            atol=1e-6,
        )


def test_only_while_the_adapter_is_trained():
    model, _, targets = zoo.dense()
    regularizer = kra.regularizers.Orthogonality(0.2)
    kra.inject(model, kra.LoRA(3, regularizer=regularizer), targets)
    kra.inject(model, kra.LoRA(3), targets, name="b")
    assert len(model.losses) == 2
    kra.set_active(model, "b")
    assert len(model.losses) == 0
    kra.set_active(model, ["default", "b"])
    assert len(model.losses) == 2
    kra.eject(model)
    assert len(model.losses) == 0


def test_config(tmp_path):
    regularizer = kra.regularizers.Orthogonality(0.25)
    adapter = kra.LoRA(3, regularizer=regularizer)
    again = kra.LoRA.from_config(adapter.get_config())
    assert again.get_config() == adapter.get_config()
    assert again.regularizer.strength == 0.25
    model, _, targets = zoo.dense()
    kra.inject(model, adapter, targets)
    kra.save_adapter(model, tmp_path / "a.safetensors")
    kra.eject(model)
    kra.load_adapter(model, tmp_path / "a.safetensors")
    assert len(model.losses) == 2
    model.save(tmp_path / "model.keras")
    assert len(keras.models.load_model(tmp_path / "model.keras").losses) == 2
    # Any regularizer will do, by its name too.
    named = kra.LoRA(3, regularizer="l2")
    assert isinstance(named.regularizer, keras.regularizers.L2)
    assert kra.LoRA.from_config(named.get_config()).get_config() == (
        named.get_config()
    )
    assert "regularizer" not in kra.LoRA(3).get_config()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kra.regularizers.Orthogonality(-1), "`strength` must be at"),
        (lambda: kra.regularizers.Orthogonality("x"), "`strength` must be a"),
        (lambda: _penalty(1.0, np.zeros(3)), "a penalty on matrices"),
        (lambda: kra.LoRA(2, regularizer="no_such"), "`regularizer` must be"),
        (lambda: kra.LoRA(2, regularizer=3), "`regularizer` must be"),
        (lambda: kra.LoRA(2, regularizer=lambda x: 0), "`regularizer` must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
