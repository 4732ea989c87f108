"""RM-LoRA: its parts, and that plain Keras training uses them."""

import copy

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.optimizers import MaskedGradient
from tests import zoo
from tests.methods import site_of

BACKEND = keras.config.backend()


def _numpy(x):
    return np.array(keras.ops.convert_to_numpy(x))


def _model():
    x = zoo.normal(8, 7)
    inputs = keras.Input((7,))
    hidden = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
    hidden = keras.layers.Dense(5, activation="tanh", name="two")(hidden)
    outputs = keras.layers.Dense(3, name="head")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    return model, x, zoo.normal(8, 3, seed=1)


def _adapted(compile=True, **arguments):
    model, x, y = _model()
    arguments = {"update_rank": 1, **arguments}
    kra.inject(
        model, kra.RMLoRA(4, **arguments), ["one", "two"], keep_trainable="head"
    )
    zoo.randomize(model)
    if compile:
        model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, x, y


def _fit(model, x, y, steps=1, **arguments):
    return model.fit(
        x,
        y,
        batch_size=8,
        epochs=steps,
        shuffle=False,
        verbose=0,
        **arguments,
    )


def _values(model):
    return [_numpy(v) for v in model.trainable_variables]


def _moved(model, x, y):
    """How many directions of each pair one step moves."""
    before = _values(model)
    _fit(model, x, y)
    counts = []
    for variable, b, a in zip(
        model.trainable_variables, before, _values(model)
    ):
        if variable.path.endswith(("lora_a", "lora_b")):
            axis = 0 if variable.path.endswith("lora_a") else 1
            counts.append(int(np.any(b != a, axis=axis).sum()))
    return counts


def _kinds(optimizer):
    """The classes of an optimizer and of those inside it."""
    kinds = []
    while optimizer is not None:
        kinds.append(type(optimizer))
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return kinds


class TestAdapter:
    def test_delta_is_that_of_lora(self):
        adapter = kra.RMLoRA(3, scaling=2.0)
        adapter.build_at(site_of((7, 5)))
        a, b = zoo.normal(7, 3, seed=1), zoo.normal(3, 5, seed=2)
        adapter.lora_a.assign(a)
        adapter.lora_b.assign(b)
        x = zoo.normal(2, 7)
        np.testing.assert_allclose(
            _numpy(adapter.delta(keras.ops.convert_to_tensor(x))),
            x @ (2.0 * a.astype("float64") @ b),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_defaults(self):
        adapter = kra.RMLoRA(7)
        assert (adapter.orthogonality, adapter.update_rank) == (0.1, 3)
        assert (adapter.scaling, adapter.mask_updates) == (1.0, False)
        assert kra.RMLoRA(1).update_rank == 1

    def test_first_factor_is_nearly_orthonormal(self):
        adapter = kra.RMLoRA(8, seed=3)
        adapter.build_at(site_of((512, 16)))
        a = _numpy(adapter.lora_a).astype("float64")
        assert a.std() == pytest.approx(512**-0.5, rel=0.03)
        penalty = ((a.T @ a - np.eye(8)) ** 2).sum()
        # Of expectation rank * (rank + 1) / input_dim.
        assert penalty == pytest.approx(72 / 512, rel=0.5)
        assert not np.any(_numpy(adapter.lora_b))

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"orthogonality": 0.0, "update_rank": 1, "mask_updates": True},
            {"alpha": 8, "a_initializer": "kaiming_uniform", "seed": 5},
            {"a_initializer": {"name": "normal", "stddev": 0.5}},
        ],
        ids=str,
    )
    def test_config(self, arguments):
        adapter = kra.RMLoRA(4, **arguments)
        config = adapter.get_config()
        again = kra.RMLoRA.from_config(config)
        assert again.get_config() == config
        for one in (adapter, again):
            one.build_at(site_of((7, 5)))
        np.testing.assert_array_equal(
            _numpy(adapter.lora_a), _numpy(again.lora_a)
        )

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"orthogonality": -0.1}, "`orthogonality` must be at least 0"),
            ({"orthogonality": float("inf")}, "`orthogonality` must be a fin"),
            ({"update_rank": 0}, "`update_rank` must be at least 1"),
            ({"update_rank": 5}, "`update_rank` must be at most 4"),
            ({"update_rank": 2.0}, "`update_rank` must be an integer"),
            ({"regularizer": "l2"}, "has a regularizer of its own"),
            ({"rank": 0}, "`rank` must be at least 1"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            kra.RMLoRA(**{"rank": 4, **arguments})


class TestTraining:
    def test_reference_in_numpy(self):
        """Steps of SGD on a linear model with the penalty and the masks,
        written out; equal on every backend."""
        inputs = keras.Input((7,))
        layer = keras.layers.Dense(5, use_bias=False, name="one")
        model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
        kernel = _numpy(layer.kernel).astype("float64")
        kra.inject(
            model, kra.RMLoRA(4, orthogonality=0.05, update_rank=2), ["one"]
        )
        zoo.randomize(model)
        a, b = (v.astype("float64") for v in _values(model))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x, y = zoo.normal(8, 7), zoo.normal(8, 5, seed=1)
        eye = np.eye(4)
        losses = _fit(model, x, y, 6).history["loss"]
        for step in range(6):
            error = x @ (kernel + a @ b) - y
            gram_a, gram_b = a.T @ a - eye, b @ b.T - eye
            penalty = 0.05 * ((gram_a**2).sum() + (gram_b**2).sum())
            loss = (error**2).mean() + penalty
            np.testing.assert_allclose(losses[step], loss, rtol=1e-5)
            of_delta = 2 / error.size * x.T @ error
            of_a = of_delta @ b.T + 0.2 * a @ gram_a
            of_b = a.T @ of_delta + 0.2 * gram_b @ b
            drawn = DRAWN[step]
            a[:, drawn] -= 0.1 * of_a[:, drawn]
            b[drawn] -= 0.1 * of_b[drawn]
        for value, expected in zip(_values(model), (a, b)):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_fit(self, jit_compile):
        model, x, y = _adapted(compile=False)
        if BACKEND == "torch":
            # tests/optimizers has what torch.compile makes of the step.
            jit_compile = False
        model.compile(
            keras.optimizers.AdamW(0.01), "mse", jit_compile=jit_compile
        )
        assert len(model.losses) == 4
        # Without compilation JAX takes seconds a step.
        losses = _fit(model, x, y, 4).history["loss"]
        assert losses[-1] < losses[0]
        assert int(_numpy(model.optimizer.iterations)) == 4

    def test_ablations(self):
        """R-LoRA, GM-LoRA and LoRA."""
        for orthogonality, update_rank, losses, moved in (
            (0.1, 1, 4, 1),
            (0.1, 4, 4, 4),
            (0.0, 1, 0, 1),
            (0.0, 4, 0, 4),
        ):
            model, x, y = _adapted(
                orthogonality=orthogonality, update_rank=update_rank
            )
            assert len(model.losses) == losses
            assert isinstance(model.optimizer, MaskedGradient) == (moved < 4)
            assert _moved(model, x, y) == [moved] * 4

    def test_orthogonality_is_learned(self):
        model, x, y = _adapted(orthogonality=1.0, update_rank=2)
        before = sum(float(_numpy(v)) for v in model.losses)
        _fit(model, x, y, 60)
        assert sum(float(_numpy(v)) for v in model.losses) < 0.2 * before

    def test_mask_updates(self):
        for mask_updates in (False, True):
            model, x, y = _adapted(compile=False, mask_updates=mask_updates)
            model.compile(keras.optimizers.AdamW(0.1), "mse")
            assert model.optimizer.mask_updates == mask_updates
            assert _moved(model, x, y) == [1 if mask_updates else 4] * 4

    def test_seeds(self):
        """Of adapters of one seed and another name, other masks; the same of
        a model made anew."""
        seeds = set()
        for seed, name in ((0, "a"), (0, "b"), (1, "a"), (0, "a")):
            optimizer = kra.RMLoRA(4, seed=seed).wrap_optimizer(
                keras.optimizers.SGD(), name
            )
            seeds.add(optimizer.seed)
        assert len(seeds) == 3


@pytest.mark.one_backend
class TestWrapping:
    """The optimizer of a compiled model is wrapped exactly while needed."""

    def test_compile_after_injection(self):
        model, x, y = _adapted()
        sgd = type(keras.optimizers.SGD())
        assert _kinds(model.optimizer) == [MaskedGradient, sgd]
        assert _moved(model, x, y) == [1] * 4
        model.compile("adam", "mse")
        adam = type(keras.optimizers.Adam())
        assert _kinds(model.optimizer) == [MaskedGradient, adam]
        model.compile(optimizer=model.optimizer, loss="mse")
        assert _kinds(model.optimizer) == [MaskedGradient, adam]

    @pytest.mark.parametrize("trained", [False, True])
    def test_compile_before_injection(self, trained):
        model, x, y = _model()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        if trained:
            _fit(model, x, y)
        kra.inject(model, kra.RMLoRA(4, update_rank=1), ["one", "two"])
        zoo.randomize(model)
        assert _moved(model, x, y) == [1] * 4
        kra.eject(model)
        assert _kinds(model.optimizer) == [type(keras.optimizers.SGD())]
        _fit(model, x, y)

    def test_merge_and_blocks(self):
        model, x, y = _adapted()
        _fit(model, x, y, 2)
        optimizer = model.optimizer
        with kra.disabled(model), kra.disabled(model):
            model.evaluate(x, y, verbose=0)
        with kra.merged(model):
            model.evaluate(x, y, verbose=0)
        assert model.optimizer is optimizer
        assert int(_numpy(optimizer.iterations)) == 2
        with kra.disabled(model):
            model.compile(keras.optimizers.SGD(0.1), "mse")
        assert isinstance(model.optimizer, MaskedGradient)
        kra.merge(model)
        assert _kinds(model.optimizer) == [type(keras.optimizers.SGD())]
        _fit(model, x, y)

    def test_switching_adapters(self):
        model, x, y = _adapted()
        kra.inject(model, kra.LoRA(2), ["one"], name="plain")
        kra.inject(model, kra.RMLoRA(4, update_rank=2), ["two"], name="half")
        assert _moved(model, x, y) == [1] * 4
        kra.set_active(model, "plain")
        assert not isinstance(model.optimizer, MaskedGradient)
        kra.set_active(model, ["default", "plain", "half"])
        for name in ("plain", "half"):
            zoo.randomize(model, name)
        sgd = type(keras.optimizers.SGD())
        assert _kinds(model.optimizer) == [MaskedGradient] * 2 + [sgd]
        counts = dict(
            zip(
                [
                    v.path.split("/adapter/")[1].split("/")[0] + v.path[:3]
                    for v in model.trainable_variables
                    if "/adapter/" in v.path
                ],
                _moved(model, x, y),
            )
        )
        assert counts == {
            "defaultone": 1,
            "defaulttwo": 1,
            "plainone": 2,
            "halftwo": 2,
        }
        kra.eject(model, "half")
        kra.set_active(model, "default")
        assert _kinds(model.optimizer) == [MaskedGradient, sgd]
        assert _moved(model, x, y) == [1] * 4

    def test_wrapper_of_the_user(self):
        model, x, y = _adapted(compile=False)
        mine = MaskedGradient(keras.optimizers.SGD(0.1), 3)
        model.compile(mine, "mse")
        assert model.optimizer is mine
        assert _moved(model, x, y) == [3] * 4
        kra.inject(model, kra.LoRA(2), ["one"], name="other")
        assert model.optimizer is mine
        kra.set_active(model, ["default", "other"])
        assert _kinds(model.optimizer) == [
            MaskedGradient,
            type(keras.optimizers.SGD()),
        ]
        assert model.optimizer.update_rank == 3

    def test_mixed_float16(self):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model, x, y = _model()
        finally:
            keras.config.set_dtype_policy("float32")
        kra.inject(model, kra.RMLoRA(4, update_rank=1), ["one", "two"])
        zoo.randomize(model)
        for optimizer in (
            keras.optimizers.SGD(0.1),
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1), initial_scale=64.0
            ),
        ):
            model.compile(optimizer, "mse")
            kinds = [
                keras.optimizers.LossScaleOptimizer,
                MaskedGradient,
                type(keras.optimizers.SGD()),
            ]
            assert _kinds(model.optimizer) == kinds
        assert model.optimizer.initial_scale == 64.0
        # The user's own is left as it was.
        assert not isinstance(optimizer.inner_optimizer, MaskedGradient)
        assert _moved(model, x, y) == [1] * 4
        kra.eject(model)
        assert _kinds(model.optimizer) == kinds[::2]

    def test_built_optimizer_keeps_its_state(self):
        model, x, y = _adapted(compile=False)
        optimizer = keras.optimizers.Adam(0.1)
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(5)
        model.compile(optimizer, "mse")
        _fit(model, x, y)
        assert int(_numpy(optimizer.iterations)) == 6

    def test_without_an_optimizer(self):
        model, x, y = _adapted(compile=False)
        model.compile(optimizer=None, loss="mse")
        assert model.optimizer is None
        kra.eject(model)
        assert model.optimizer is None

    def test_keras_hub_task(self):
        task, x, _ = zoo.bert_classifier()
        kra.inject(task, kra.RMLoRA(4), keep_trainable="logits")
        y = zoo.integers(4, high=3)
        # The task compiles itself, with defaults of its own.
        assert isinstance(task.optimizer, MaskedGradient)
        task.compile(optimizer="auto")
        assert isinstance(task.optimizer, MaskedGradient)
        before = _values(task)
        task.fit(x, y, batch_size=4, verbose=0)
        for b, a in zip(before, _values(task)):
            assert np.any(b != a)


@pytest.mark.one_backend
class TestFiles:
    @pytest.mark.parametrize(
        "name", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"]
    )
    def test_training_resumes_bit_for_bit(self, name, tmp_path):
        straight, x, y = _adapted(compile=False)
        straight.compile(name, "mse")
        _fit(straight, x, y, 5)
        model, _, _ = _adapted(compile=False)
        model.compile(name, "mse")
        _fit(model, x, y, 3)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert _kinds(loaded.optimizer) == _kinds(model.optimizer)
        assert int(_numpy(loaded.optimizer.iterations)) == 3
        assert len(loaded.losses) == 4
        _fit(loaded, x, y, 2)
        for expected, value in zip(_values(straight), _values(loaded)):
            np.testing.assert_array_equal(expected, value)
        kra.eject(loaded)
        assert not isinstance(loaded.optimizer, MaskedGradient)
        _fit(loaded, x, y)

    def test_backup_and_restore(self, tmp_path):
        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 3:
                    raise InterruptedError

        def backup():
            return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

        straight, x, y = _adapted()
        _fit(straight, x, y, 5)
        model, _, _ = _adapted()
        with pytest.raises(InterruptedError):
            _fit(model, x, y, 5, callbacks=[backup(), Stop()])
        again, _, _ = _adapted()
        history = _fit(again, x, y, 5, callbacks=[backup()])
        assert len(history.epoch) == 2
        for expected, value in zip(_values(straight), _values(again)):
            np.testing.assert_array_equal(expected, value)

    def test_copy(self):
        model, x, y = _adapted()
        _fit(model, x, y)
        again = copy.deepcopy(model)
        assert isinstance(again.optimizer, MaskedGradient)
        assert _moved(again, x, y) == [1] * 4

    def test_weights_alone(self, tmp_path):
        """Into a model whose optimizer has another structure."""
        model, x, y = _adapted()
        _fit(model, x, y)
        model.save_weights(tmp_path / "a.weights.h5")
        other, _, _ = _adapted()
        other.compile("adam", "mse")
        other.fit(x, y, verbose=0)
        with pytest.warns(UserWarning, match="Skipping variable loading"):
            other.load_weights(tmp_path / "a.weights.h5")
        for expected, value in zip(_values(model), _values(other)):
            np.testing.assert_array_equal(expected, value)

    def test_weights_of_before_compile(self, tmp_path):
        early, x, y = _adapted(compile=False)
        early.save_weights(tmp_path / "a.weights.h5")
        model, _, _ = _adapted()
        _fit(model, x, y)
        with pytest.warns(UserWarning, match="starts afresh"):
            model.load_weights(tmp_path / "a.weights.h5")

    def test_weights_of_another_update_rank(self, tmp_path):
        model, x, y = _adapted()
        model.save_weights(tmp_path / "a.weights.h5")
        plain, _, _ = _adapted(update_rank=4)
        with pytest.raises(ValueError, match="update_rank=1 in the file and 4"):
            plain.load_weights(tmp_path / "a.weights.h5")

    def test_model_with_a_compile_of_its_own(self, tmp_path):
        """Keras restores no compilation of such a model, adapted or not."""
        model = Custom()
        model(zoo.normal(2, 7))
        kra.inject(model, kra.RMLoRA(4, update_rank=1), ["one"])
        model.compile(rate=0.1)
        assert isinstance(model.optimizer, MaskedGradient)
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match="method is custom"):
            loaded = keras.models.load_model(tmp_path / "model.keras")
        assert getattr(loaded, "optimizer", None) is None
        loaded.compile(rate=0.1)
        assert isinstance(loaded.optimizer, MaskedGradient)


@keras.saving.register_keras_serializable(package="tests")
class Custom(keras.Model):
    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(5, name="one")

    def call(self, x):
        return self.one(x)

    def compile(self, rate):
        super().compile(keras.optimizers.SGD(rate), "mse")

    def get_config(self):
        return {}


#: What the masks of `kra.RMLoRA(4, update_rank=2)`, named "default", draw.
DRAWN = [[0, 3], [1, 3], [0, 2], [2, 3], [0, 3], [1, 3]]
