"""Two learning rates in one optimizer."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.optimizers import learning_rate_groups
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")

HAS_MULTI = hasattr(keras.optimizers, "MultiOptimizer")
needs_multi = pytest.mark.skipif(
    not HAS_MULTI, reason="this Keras has no MultiOptimizer"
)


def _model():
    model, x, _ = zoo.classifier()
    kra.inject(model, kra.LoRA(2), keep_trainable="logits")
    return model, x


def _values(model):
    return {
        v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables
    }


@needs_multi
class TestLearningRateGroups:
    @pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "lion"])
    def test_each_group_moves_at_its_rate(self, name):
        """One step equals that of plain optimizers of either rate."""
        steps = {}
        for kind in ("groups", "adapter", "head"):
            model, x = _model()
            rates = {"adapter": 0.1, "head": 0.01}
            if kind == "groups":
                optimizer = learning_rate_groups(model, name, **rates)
            else:
                optimizer = keras.optimizers.get(name)
                optimizer.learning_rate = rates[kind]
            zoo.fit(model, x, steps=1, optimizer=optimizer)
            steps[kind] = _values(model)
        for path, value in steps["groups"].items():
            kind = "adapter" if "/adapter/" in path else "head"
            np.testing.assert_allclose(
                value, steps[kind][path], rtol=1e-5, atol=1e-6, err_msg=path
            )

    @pytest.mark.parametrize(
        "adapter", [kra.LoRA(2), kra.LoRAFA(2), kra.DoRA(kra.LoRA(2))], ids=str
    )
    def test_lora_plus(self, adapter):
        """One step of SGD moves B by its own rate, and the others by theirs."""
        moves = {}
        for rates in ({}, {"lora_b": 1.6}):
            model, x, _ = zoo.classifier()
            kra.inject(model, adapter, keep_trainable="logits")
            # Away from zero, so that A moves too.
            zoo.randomize(model)
            before = _values(model)
            optimizer = learning_rate_groups(
                model, "sgd", adapter=0.1, head=0.01, **rates
            )
            zoo.fit(model, x, steps=1, optimizer=optimizer)
            moves[len(rates)] = {
                path: value - before[path]
                for path, value in _values(model).items()
            }
        assert any(path.endswith("/lora_b") for path in moves[0])
        for path, move in moves[0].items():
            factor = 16 if path.endswith("/lora_b") else 1
            np.testing.assert_allclose(
                moves[1][path], factor * move, rtol=1e-3, atol=1e-5
            )

    def test_lora_plus_without_lora(self):
        model, _, _ = zoo.classifier()
        kra.inject(model, kra.RLoRA(4), keep_trainable="logits")
        with pytest.raises(ValueError, match="no active adapter of this model"):
            learning_rate_groups(model, adapter=0.1, lora_b=1.0)

    def test_exclusions_from_weight_decay(self):
        """They are in no config."""
        model, x = _model()
        optimizer = keras.optimizers.AdamW(weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        groups = learning_rate_groups(model, optimizer, adapter=0.1)
        zoo.fit(model, x, steps=1, optimizer=groups)
        # Its optimizer is made anew.
        kra.inject(model, kra.LoRA(1, seed=3), "query", name="second")
        kra.set_active(model, ["default", "second"])
        assert model.optimizer is not groups
        for one in (groups, model.optimizer):
            decays = {
                variable.path.rpartition("/")[2]: {
                    leaf._use_weight_decay(variable) for leaf in one.optimizers
                }
                for variable in model.trainable_variables
            }
            assert decays["bias"] == {False}
            assert decays["kernel"] == decays["lora_a"] == {True}

    def test_exclusions_are_of_living_variables(self):
        """Keras knows them by `id`, which a new variable might get."""
        model, x = _model()
        optimizer = keras.optimizers.AdamW(weight_decay=0.5)
        mine = [v for v in model.trainable_variables if "lora" in v.path]
        optimizer.exclude_from_weight_decay(mine)
        zoo.fit(model, x, steps=1, optimizer=optimizer)
        kra.inject(model, kra.LoRA(1), "query", name="second")
        kra.set_active(model, "second")
        kra.set_active(model, ["default", "second"])
        assert model.optimizer is not optimizer
        for variable in model.trainable_variables:
            decays = model.optimizer._use_weight_decay(variable)
            assert decays != any(variable is one for one in mine)
        kra.eject(model, "default")
        living = map(model.optimizer._var_key, model.variables)
        assert model.optimizer._exclude_from_weight_decay <= set(living)

    def test_own_layer_called_adapter(self):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(3, name="hidden")(inputs)
        outputs = keras.layers.Dense(2, name="adapter")(x)
        model = keras.Model(inputs, outputs)
        kra.inject(model, kra.LoRA(2), "hidden")
        learning_rate_groups(model, "adam", adapter=0.1)
        kra.eject(model)
        kra.inject(model, kra.LoRA(2), "hidden", keep_trainable="adapter")
        with pytest.raises(ValueError, match="'adapter/kernel' belongs to no"):
            learning_rate_groups(model, "adam", adapter=0.1)

    def test_settings_of_the_optimizer_are_kept(self):
        model, _ = _model()
        optimizer = learning_rate_groups(
            model,
            keras.optimizers.AdamW(weight_decay=0.5, beta_1=0.7),
            adapter=0.1,
            head=0.01,
        )
        assert {o.weight_decay for o in optimizer.optimizers} == {0.5}
        assert {o.beta_1 for o in optimizer.optimizers} == {0.7}

    def test_recommended_rate(self):
        model, _ = _model()
        optimizer = learning_rate_groups(model)
        assert sorted(float(o.learning_rate) for o in optimizer.optimizers) == (
            pytest.approx([5e-4, 1e-3])
        )
        kra.inject(model, kra.RLoRA(4), name="b")
        kra.set_active(model, ["default", "b"])
        with pytest.raises(ValueError, match="do not recommend one rate"):
            learning_rate_groups(model)
        kra.set_active(model, "b")
        optimizer = learning_rate_groups(model, head=0.01)
        assert sorted(float(o.learning_rate) for o in optimizer.optimizers) == (
            pytest.approx([0.01, 0.05])
        )

    def test_schedules(self):
        model, x = _model()
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
            [1, 2], [0.1, 0.0, 0.0]
        )
        optimizer = learning_rate_groups(
            model, "sgd", adapter=schedule, head=0.01
        )
        zoo.fit(model, x, steps=2, optimizer=optimizer)
        before = _values(model)
        y = zoo.normal(4, 3, seed=1)
        model.fit(x, y, batch_size=4, epochs=2, verbose=0)
        for path, value in _values(model).items():
            moved = np.any(value != before[path])
            assert moved == ("/adapter/" not in path), path

    @pytest.mark.every_backend
    def test_mixed_precision(self):
        """Inside the loss scaling that `compile` adds. No attention: JAX's
        takes no float16 on a CPU."""
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model, x, _ = zoo.sequential()
        finally:
            keras.config.set_dtype_policy("float32")
        kra.inject(
            model,
            kra.LoRA(2),
            lambda layer: layer.units == 8,
            keep_trainable=lambda layer: getattr(layer, "units", 0) == 5,
        )
        before = _values(model)
        assert len(before) == 4
        optimizer = learning_rate_groups(model, "adam", adapter=0.1, head=0.1)
        zoo.fit(model, x, steps=6, optimizer=optimizer)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        for path, value in _values(model).items():
            assert np.all(np.isfinite(value))
            assert np.any(value != before[path]), path

    def test_bad_input(self):
        model, _ = _model()
        rates = {"adapter": 0.1, "head": 0.01}
        with pytest.raises(TypeError, match="must be a Keras optimizer"):
            learning_rate_groups(model, 3, **rates)
        built = keras.optimizers.Adam()
        built.build(model.trainable_variables)
        with pytest.raises(ValueError, match="`head` must be at least 0"):
            learning_rate_groups(model, "sgd", adapter=1, head=-1)
        with pytest.raises(ValueError, match="built already"):
            learning_rate_groups(model, built, **rates)
        with pytest.raises(ValueError, match="a plain optimizer"):
            learning_rate_groups(
                model,
                keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
                **rates,
            )
        with pytest.raises(ValueError, match="put the `GaLore` around"):
            learning_rate_groups(
                model, kra.optimizers.GaLore("adam", 2), **rates
            )
        kra.eject(model)
        with pytest.raises(ValueError, match="no adapter attached"):
            learning_rate_groups(model, "adam", **rates)


@pytest.mark.skipif(HAS_MULTI, reason="this Keras has MultiOptimizer")
def test_older_keras():
    model, _ = _model()
    with pytest.raises(NotImplementedError, match="Upgrade Keras"):
        learning_rate_groups(model, "adam", adapter=0.1, head=0.01)


@needs_multi
@pytest.mark.every_backend
@pytest.mark.parametrize("rates", [{}, {"lora_b": 1.0}], ids=str)
def test_global_clipnorm_is_one_norm_of_all_groups(rates):
    """One step is that of a plain optimizer that clips all gradients."""
    model, _ = _model()
    gradients = [
        keras.ops.ones(v.shape) * (3.0 if "/adapter/" in v.path else 0.5)
        for v in model.trainable_variables
    ]
    steps = []
    for groups in (False, True):
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.7)
        if groups:
            optimizer = learning_rate_groups(
                model, optimizer, adapter=1.0, head=1.0, **rates
            )
        before = _values(model)
        optimizer.build(model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        after = _values(model)
        steps.append(
            np.concatenate([np.ravel(after[p] - before[p]) for p in before])
        )
    assert np.linalg.norm(steps[0]) == pytest.approx(0.7, rel=1e-4)
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-4, atol=1e-6)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, kra.optimizers.ClipByGlobalNorm)
    assert again.norm == 0.7 and len(again.optimizers) == 2 + len(rates)


def test_small_gradients_and_absent_ones_are_not_clipped():
    clip = kra.optimizers.ClipByGlobalNorm("sgd", 5.0)
    gradients = [keras.ops.ones((2, 2)), None, keras.ops.ones((3,))]
    got = clip.transform_gradients(gradients, [None] * 3, 0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(got[0]), 1.0)
    assert got[1] is None


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), "one"])
def test_bad_norm(norm):
    with pytest.raises(ValueError, match="`global_clipnorm` must be"):
        kra.optimizers.ClipByGlobalNorm("sgd", norm)


@needs_multi
def test_logs_show_the_rate_of_every_group():
    model, x = _model()
    optimizer = learning_rate_groups(
        model, "sgd", adapter=0.1, lora_b=0.2, head=0.01
    )
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=9)
    logs = zoo.fit(model, x, optimizer=optimizer, callbacks=[plateau]).history
    for name, rate in (("adapter", 0.1), ("lora_b", 0.2), ("head", 0.01)):
        rates = logs[f"learning_rate_{name}"]
        assert rates[0] == pytest.approx(rate) and rates[-1] < rate
