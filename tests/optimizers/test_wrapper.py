"""What every wrapper of an optimizer does, by small wrappers."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt.optimizers import OptimizerWrapper
from keras_randadapt.optimizers import automatic
from keras_randadapt.optimizers import wrapper
from tests import zoo


def _numpy(x):
    return np.array(ops.convert_to_numpy(x))


@keras.saving.register_keras_serializable(package="tests")
class Shrink(OptimizerWrapper):
    """Doubles gradients, counts updates, and ends each with a soft threshold:
    all that a later method does with state, gradients and values."""

    changes_values = True

    def __init__(self, optimizer, threshold, name=None):
        super().__init__(optimizer, name)
        self.threshold = threshold

    def build_state(self, variables):
        self.variables_to_shrink = [variables[0]]
        self.total = self.add_variable((), name="total")
        self.distance = self.add_variable_from_reference(
            variables[0], name="distance"
        )

    def transform_gradients(self, gradients, variables, step):
        return [g if g is None else 2 * g for g in gradients]

    def keeps_value(self, variable):
        return variable is self.variables_to_shrink[0]

    def after_update(self, variables, before, step):
        assert [b is not None for b in before] == [
            v is self.variables_to_shrink[0] for v in variables
        ]
        variable = self.variables_to_shrink[0]
        value = ops.convert_to_tensor(variable)
        shrunk = ops.sign(value) * ops.maximum(
            ops.abs(value) - self.threshold, 0
        )
        shrunk = ops.where(self.is_update_step(), shrunk, value)
        self.distance.assign_add(ops.abs(shrunk - before[0]))
        variable.assign(shrunk)
        self.total.assign_add(ops.cast(step, "float32"))

    def get_config(self):
        return {**super().get_config(), "threshold": self.threshold}


def _variables():
    return [
        keras.Variable(zoo.normal(3, 2), name="x"),
        keras.Variable(zoo.normal(4), name="y"),
    ]


def _gradients():
    return [
        ops.convert_to_tensor(zoo.normal(*s, seed=1)) for s in ((3, 2), (4,))
    ]


def _soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def _model():
    inputs = keras.Input((7,))
    outputs = keras.layers.Dense(3, name="one")(inputs)
    return zoo.set_weights(keras.Model(inputs, outputs))


def test_hooks():
    variables = _variables()
    x, y = (_numpy(v) for v in variables)
    gx, gy = (_numpy(g) for g in _gradients())
    optimizer = Shrink(keras.optimizers.SGD(0.1), 0.05)
    distance = 0
    for step in range(3):
        optimizer.apply(_gradients(), variables)
        new = _soft(x - 0.2 * gx, 0.05)
        distance = distance + np.abs(new - x)
        x, y = new, y - 0.2 * gy
        np.testing.assert_allclose(_numpy(variables[0]), x, atol=1e-6)
        np.testing.assert_allclose(_numpy(variables[1]), y, atol=1e-6)
        assert int(_numpy(optimizer.iterations)) == step + 1
    np.testing.assert_allclose(_numpy(optimizer.distance), distance, atol=1e-6)
    assert float(_numpy(optimizer.total)) == 3.0


def test_variables_are_its_own_and_the_inner_optimizers():
    """And none of the model's, though the wrapper keeps a list of these."""
    variables = _variables()
    optimizer = Shrink(keras.optimizers.SGD(0.1, momentum=0.9), 0.1)
    optimizer.build(variables)
    paths = [v.path.rpartition("/")[2] for v in optimizer.variables]
    assert paths == [
        "iteration",
        "total",
        "x_distance",
        "iteration",
        "learning_rate",
        "x_momentum",
        "y_momentum",
    ]
    weights = [_numpy(v) + 1 for v in optimizer.variables]
    optimizer.set_weights(weights)
    for variable, weight in zip(optimizer.variables, weights):
        np.testing.assert_array_equal(_numpy(variable), weight)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_and_accumulation(jit_compile):
    if keras.config.backend() == "torch":
        # torch.compile of Keras's whole step takes minutes.
        jit_compile = False
    model = _model()
    kernel, bias = (_numpy(v).astype("float64") for v in model.variables)
    optimizer = Shrink(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), 0.01
    )
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    x, y = zoo.normal(8, 7), zoo.normal(8, 3)
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for _ in range(2):
        error = 2 * (x @ kernel + bias - y) / 12
        kernel = _soft(kernel - 0.1 * x.T @ error, 0.01)
        bias = bias - 0.1 * error.sum(0)
    np.testing.assert_allclose(_numpy(model.variables[0]), kernel, atol=1e-6)
    np.testing.assert_allclose(_numpy(model.variables[1]), bias, atol=1e-6)
    assert int(_numpy(optimizer.iterations)) == 2
    # Steps 0, 0, 1, 1.
    assert float(_numpy(optimizer.total)) == 2.0


def test_nested_and_saved(tmp_path):
    x, y = zoo.normal(8, 7), zoo.normal(8, 3)

    def build():
        model = _model()
        inner = Shrink(keras.optimizers.Adam(0.1), 0.01)
        model.compile(Shrink(inner, 0.02), "mse")
        return model

    def fit(model, epochs):
        model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)

    straight, model = build(), build()
    fit(straight, 4)
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    fit(loaded, 2)
    for one, other in zip(
        straight.variables + straight.optimizer.variables,
        loaded.variables + loaded.optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(_numpy(one), _numpy(other))


def test_walk():
    sgd = keras.optimizers.SGD()
    inner = Shrink(sgd, 0.1)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    assert list(wrapper.walk(outer)) == [outer, inner, sgd]


class TestAttach:
    def test_only_what_is_asked_for(self):
        sgd = keras.optimizers.SGD()
        wrap = lambda o: Shrink(o, 0.1)  # noqa: E731
        other = lambda o: Shrink(o, 0.2)  # noqa: E731
        one = automatic.attach(sgd, [wrap])
        assert one.inner_optimizer is sgd and one.automatic
        assert automatic.attach(one, [wrap]) is one
        two = automatic.attach(one, [wrap, other])
        assert two.threshold == 0.2
        assert two.inner_optimizer.threshold == 0.1
        assert two.inner_optimizer.inner_optimizer is sgd
        assert automatic.attach(two, [other]).inner_optimizer is sgd
        assert automatic.attach(two, []) is sgd
        assert automatic.attach(two, [lambda o: o]) is sgd

    def test_wrappers_of_the_user_stay(self):
        mine = Shrink(keras.optimizers.SGD(), 0.1)
        assert automatic.attach(mine, []) is mine
        wrapped = automatic.attach(mine, [lambda o: Shrink(o, 0.1)])
        assert wrapped.inner_optimizer is mine
        again = Shrink.from_config(wrapped.get_config())
        assert again.automatic and not again.inner_optimizer.automatic
        assert not automatic.attach(again, []).automatic

    def test_inside_loss_scaling(self):
        mine = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(), dynamic_growth_steps=7, name="mine"
        )
        wrapped = automatic.attach(mine, [lambda o: Shrink(o, 0.1)])
        assert isinstance(wrapped, keras.optimizers.LossScaleOptimizer)
        assert (wrapped.dynamic_growth_steps, wrapped.name) == (7, "mine")
        assert wrapped.inner_optimizer.inner_optimizer is mine.inner_optimizer
        assert automatic.attach(mine, []) is mine
        bare = automatic.attach(wrapped, [])
        assert bare.inner_optimizer is mine.inner_optimizer


def test_moving_average_and_corrected_values():
    optimizer = Shrink(keras.optimizers.SGD(use_ema=True), 0.1)
    with pytest.raises(ValueError, match="`Shrink` corrects values after"):
        optimizer.apply(_gradients(), _variables())


def test_wrapping_by_an_adapter():
    """The hook by which an adapter has plain `fit` wrap the optimizer."""

    @keras.saving.register_keras_serializable(package="tests")
    class Shrinking(kra.LoRA):
        def wrap_optimizer(self, optimizer, name):
            return Shrink(optimizer, self.rank)

    model = _model()
    kra.inject(model, Shrinking(2), "one")
    model.compile("sgd", "mse")
    assert model.optimizer.threshold == 2
    kra.eject(model)
    assert not isinstance(model.optimizer, Shrink)
