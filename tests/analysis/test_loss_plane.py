"""The plane through three models: its geometry, its losses, no traces."""

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_randadapt as kra
from keras_randadapt.analysis import plane as plane_lib
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


def _model(jit_compile=False):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse", metrics=["mae"], jit_compile=jit_compile)
    return zoo.set_weights(model)


X, Y = zoo.normal(8, 6), zoo.normal(8, 2)


def _numpy(x):
    return np.array(keras.ops.convert_to_numpy(x))


def _trained(model):
    return [_numpy(v) for v in model.trainable_variables]


def _three(model, snapshot, adapters=None):
    """Three points: adapters of these kinds with random weights."""
    points, losses = [], []
    for seed, adapter in enumerate(adapters or [kra.LoRA(2)] * 3):
        kra.inject(model, adapter, "hidden", keep_trainable="head")
        zoo.randomize(model, seed=seed)
        head = model.get_layer("head").kernel
        head.assign(zoo.normal(8, 2, seed=seed))
        points.append(snapshot(model))
        losses.append(model.evaluate(X, Y, verbose=0)[0])
        if adapters:
            kra.eject(model)
        elif seed < 2:
            kra.eject(model)
    return points, losses


class Unchanged:
    """Checks at its end that a model is bit for bit what it was."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.weights = [_numpy(w) for w in self.model.weights]
        self.optimizer = self.model.optimizer
        self.flags = [w.trainable for w in self.model.weights]
        self.out = zoo.outputs(self.model, X)

    def __exit__(self, *exc_info):
        for old, new in zip(self.weights, self.model.weights, strict=True):
            np.testing.assert_array_equal(old, _numpy(new))
        assert self.optimizer is self.model.optimizer
        assert self.flags == [w.trainable for w in self.model.weights]
        np.testing.assert_array_equal(zoo.outputs(self.model, X), self.out)


class TestPlane:
    def test_geometry(self):
        """Distances between the points are those of the whole vectors, and
        the basis is orthonormal."""
        points = [
            {"a": zoo.normal(3, 4, seed=s), "b": zoo.normal(5, seed=s)}
            for s in range(3)
        ]
        plane = plane_lib.Plane(points)
        flat = [np.concatenate([p["a"].ravel(), p["b"]]) for p in points]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            np.testing.assert_allclose(
                np.linalg.norm(plane.points[i] - plane.points[j]),
                np.linalg.norm(flat[i] - flat[j]),
                rtol=1e-6,
            )
        assert plane.points[1, 1] == 0 and plane.points[2, 1] > 0
        for point, (a, b) in zip(points, plane.points):
            at = plane.at(a, b)
            for key in point:
                np.testing.assert_allclose(at[key], point[key], atol=1e-6)
        u = np.concatenate([plane.u["a"].ravel(), plane.u["b"]])
        v = np.concatenate([plane.v["a"].ravel(), plane.v["b"]])
        np.testing.assert_allclose([u @ u, v @ v, u @ v], [1, 1, 0], atol=1e-6)
        x, y = plane.grid((5, 4), 0.5)
        low, high = plane.points.min(0), plane.points.max(0)
        np.testing.assert_allclose(
            [x[0], x[-1]], [1.5 * low[0] - 0.5 * high[0],
                            1.5 * high[0] - 0.5 * low[0]]
        )  # fmt: skip
        assert (len(x), len(y)) == (5, 4)

    def test_coordinates_of_figure_4(self):
        points = [{"a": zoo.normal(3, 4, seed=s)} for s in range(3)]
        plane = plane_lib.Plane(points, "triangle")
        np.testing.assert_array_equal(plane.points, [[0, 0], [1, 0], [0.5, 1]])
        for x, y in [*plane.points, (0.3, -0.2), (2.0, 0.7)]:
            # The coefficients solve the paper's equations.
            corners = np.array([[0, 1, 0.5], [0, 0, 1], [1, 1, 1]])
            weights = np.linalg.solve(corners, [x, y, 1])
            right = sum(w * p["a"] for w, p in zip(weights, points))
            np.testing.assert_allclose(plane.at(x, y)["a"], right, atol=1e-5)

    def test_degenerate(self):
        a, b = {"a": zoo.normal(4, seed=0)}, {"a": zoo.normal(4, seed=1)}
        middle = {"a": (a["a"] + b["a"]) / 2}
        with pytest.raises(ValueError, match="lie on one line"):
            plane_lib.Plane([a, b, middle])
        for points in ([a, a, b], [a, b, a], [a, b, b]):
            with pytest.raises(ValueError, match="equal|one line"):
                plane_lib.Plane(points)


class TestTrainables:
    def test_corners_and_grid(self):
        model = _model()
        points, losses = _three(model, _trained)
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=(3, 2), margin=0.0
            )
        np.testing.assert_array_equal(plane.point_losses, losses)
        assert plane.loss.shape == plane.metrics["mae"].shape == (2, 3)
        # A grid point off the points, by hand.
        u = [b - a for a, b in zip(*points[:2])]
        w = [b - a for a, b in zip(points[0], points[2])]
        dot = sum(np.sum(a * b) for a, b in zip(w, u))
        squared = sum(np.sum(a * a) for a in u)
        v = [a - dot / squared * b for a, b in zip(w, u)]
        length = np.sqrt(sum(np.sum(a * a) for a in v))
        x, y = plane.x[1] / np.sqrt(squared), plane.y[1] / length
        before = _trained(model)
        for variable, start, a, b in zip(
            model.trainable_variables, points[0], u, v
        ):
            variable.assign(start + x * a + y * b)
        expected = model.evaluate(X, Y, verbose=0)
        np.testing.assert_allclose(plane.loss[1, 1], expected[0], rtol=1e-4)
        np.testing.assert_allclose(
            plane.metrics["mae"][1, 1], expected[1], rtol=1e-4
        )
        for variable, value in zip(model.trainable_variables, before):
            variable.assign(value)

    # On PyTorch, the compiler alone takes 15 CPU seconds to start.
    @pytest.mark.one_backend("jax")
    def test_compiled(self):
        """What jit_compile compiled sees every new value."""
        inputs = keras.Input((6,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
        model.compile("sgd", "mse", jit_compile=True)
        points = [[zoo.normal(6, 2, seed=s), np.zeros(2)] for s in range(3)]
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2
            )
        expected = [np.mean((X @ kernel - Y) ** 2) for kernel, _ in points]
        np.testing.assert_allclose(plane.point_losses, expected, rtol=1e-5)

    def test_adapter_files(self, tmp_path):
        def save(model):
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
            kra.save_adapter(model, path)
            return path

        model = _model()
        points, losses = _three(model, save)
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2
            )
        np.testing.assert_array_equal(plane.point_losses, losses)
        # A file of another adapter is refused.
        kra.eject(model)
        kra.inject(model, kra.LoRA(3), "hidden", keep_trainable="head")
        with Unchanged(model), pytest.raises(ValueError, match="differs"):
            kra.analysis.mode_connectivity(model, points, X, Y)

    def test_a_plain_model(self):
        model = _model()
        points = [
            [zoo.normal(*v.shape, seed=s) for v in model.trainable_variables]
            for s in range(3)
        ]
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2
            )
        for variable, value in zip(model.trainable_variables, points[1]):
            variable.assign(value)
        assert plane.point_losses[1] == model.evaluate(X, Y, verbose=0)[0]


class TestKernels:
    ADAPTERS = [kra.LoRA(2), kra.RLoRA(7), kra.LoRA(5, seed=1)]

    def test_are_those_of_a_merge(self):
        for builder in (zoo.dense, zoo.einsum_gemma, zoo.conv2d_grouped):
            model, x, targets = builder()
            kra.inject(model, kra.RLoRA(5), targets)
            zoo.randomize(model)
            ((address, layer),) = kra.sites(model).items()
            copies = kra.analysis.kernels(model)
            assert list(copies) == [address]
            view = layer.kernel_view
            assert copies[address].shape == tuple(view)
            kra.merge(model)
            again = kra.analysis.kernels(model, copies)
            np.testing.assert_allclose(
                again[address], copies[address], rtol=1e-6, atol=1e-7
            )

    def test_keys(self):
        model = _model()
        kra.inject(model, kra.LoRA(2), "hidden", keep_trainable="head")
        copies = kra.analysis.kernels(model)
        head = "layers/dense_1"
        assert list(copies) == ["layers/dense", f"{head}#0", f"{head}#1"]
        np.testing.assert_array_equal(
            copies[f"{head}#0"], _numpy(model.get_layer("head").kernel)
        )
        norm = "layers/batch_normalization#1"
        (beta,) = kra.analysis.kernels(model, [norm]).values()
        np.testing.assert_array_equal(
            beta, _numpy(model.get_layer("norm").beta)
        )

    @pytest.mark.parametrize(
        "adapter, keys",
        [
            (kra.Hydra(2), ["layers/dense", "layers/dense#bias"]),
            (kra.BitFit(), ["layers/dense", "layers/dense#bias"]),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of_adapted_biases(self, adapter, keys):
        model = _model()
        model.get_layer("hidden").bias.assign(zoo.normal(8, seed=3))
        points, losses = [], []
        for seed in range(3):
            kra.inject(model, adapter, "hidden")
            zoo.randomize(model, seed=seed)
            points.append(kra.analysis.kernels(model))
            losses.append(model.evaluate(X, Y, verbose=0)[0])
            if seed < 2:
                kra.eject(model)
        assert list(points[0]) == keys
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2
            )
        np.testing.assert_allclose(plane.point_losses, losses, rtol=1e-5)
        kra.merge(model)
        again = kra.analysis.kernels(model, points[2])
        for key in keys:
            np.testing.assert_allclose(again[key], points[2][key], rtol=1e-6)

    def test_of_a_normalization(self):
        """It has a bias and no kernel."""
        model = _model()
        kra.inject(model, kra.BitFit(), "norm")
        (key,) = kra.analysis.kernels(model)
        assert key == "layers/batch_normalization#bias"

    def test_layer_without_a_bias(self):
        model = keras.Sequential([keras.layers.Dense(2, use_bias=False)])
        model.build((None, 3))
        with pytest.raises(ValueError, match="'layers/dense' has no bias"):
            kra.analysis.kernels(model, ["layers/dense#bias"])

    @pytest.mark.parametrize("adapted", [False, True])
    def test_of_different_methods(self, adapted):
        model = _model()
        points, losses = _three(model, kra.analysis.kernels, self.ADAPTERS)
        if adapted:
            kra.inject(model, kra.LoRA(3), "hidden", keep_trainable="head")
            zoo.randomize(model, seed=7)
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2, labels=["a", "b", "c"]
            )
        np.testing.assert_allclose(plane.point_losses, losses, rtol=1e-5)
        assert np.ptp(losses) > 1e-2
        model.fit(X, Y, verbose=0)

    def test_of_a_convolution_and_full_training(self):
        model, x, targets = zoo.conv2d_strided()
        model.compile("sgd", "mse")
        y = zoo.normal(*model.output_shape[1:], seed=1)[None].repeat(8, 0)
        kra.inject(model, kra.LoRA(2), targets)
        points = []
        for seed in range(2):
            zoo.randomize(model, seed=seed)
            points.append(kra.analysis.kernels(model))
        kra.eject(model)
        model.fit(x, y, verbose=0)
        points.append(kra.analysis.kernels(model, points[0]))
        loss = model.evaluate(x, y, verbose=0)
        bias = _numpy(model.get_layer("site").bias)
        plane = kra.analysis.mode_connectivity(
            model, points, x, y, resolution=2
        )
        np.testing.assert_allclose(plane.point_losses[2], loss, rtol=1e-5)
        np.testing.assert_array_equal(
            bias, _numpy(model.get_layer("site").bias)
        )

    def test_in_bfloat16(self):
        """Kernels round the points as a merge does, and come back exactly."""
        inputs = keras.Input((6,))
        layer = keras.layers.Dense(2, dtype="bfloat16", name="site")
        model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
        model.compile("sgd", "mse")
        points = []
        for seed in range(3):
            kra.inject(model, kra.LoRA(2), "site")
            zoo.randomize(model, seed=seed, scale=1.0)
            points.append(kra.analysis.kernels(model))
            kra.eject(model)
        with Unchanged(model):
            plane = kra.analysis.mode_connectivity(
                model, points, X, Y, resolution=2
            )
        bias = _numpy(layer.bias).astype("float32")
        expected = [
            np.mean((X @ point["layers/dense"] + bias - Y) ** 2)
            for point in points
        ]
        np.testing.assert_allclose(plane.point_losses, expected, rtol=2e-2)

    def test_errors(self):
        model = _model()
        kernels = kra.analysis.kernels
        with pytest.raises(ValueError, match="has no adapter attached"):
            kernels(model)
        for key, message in (
            ("layers/dense_9", "no layer at 'layers/dense_9'"),
            ("layers/dense#2", "means no weight"),
            ("layers/dense#x", "means no weight"),
            ("layers/batch_normalization", "has no kernel view"),
        ):
            with pytest.raises(ValueError, match=message):
                kernels(model, [key])
        quantized, _, _ = zoo.dense_int8()
        with pytest.raises(ValueError, match="quantized to 'int8'"):
            kernels(quantized, ["layers/dense"])


class TestAnError:
    """Of the model, in the middle of an evaluation."""

    @pytest.mark.parametrize("snapshot", [_trained, kra.analysis.kernels])
    def test_leaves_the_weights(self, snapshot):
        model = _model()
        points, _ = _three(model, snapshot)
        good = [np.copy(X[:4]), np.copy(X[:4, :5])]

        class Broken(keras.utils.PyDataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                # The first batch is evaluated, the second does not fit.
                return good[i], Y[:4]

        with Unchanged(model), pytest.raises(Exception):
            kra.analysis.mode_connectivity(model, points, Broken())
        # Nothing of the broken evaluation comes back later.
        with Unchanged(model):
            model.evaluate(X, Y, verbose=0)


class TestArguments:
    def _call(self, points=None, model=None, x=X, **kwargs):
        model = model or _model()
        if points is None:
            points = [
                [
                    zoo.normal(*v.shape, seed=s)
                    for v in model.trainable_variables
                ]
                for s in range(3)
            ]
        with Unchanged(model):
            kra.analysis.mode_connectivity(model, points, x, Y, **kwargs)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"points": [[], []]}, ValueError, "a list of three points"),
            ({"points": "three"}, ValueError, "a list of three points"),
            ({"points": [1, 2, 3]}, TypeError, "must all be dicts"),
            ({"points": [[]] * 3}, ValueError, "a value for each"),
            ({"x": (a for a in X)}, TypeError, "a generator can be"),
            ({"resolution": 1}, ValueError, "`resolution` must be"),
            ({"resolution": (3, 2.5)}, ValueError, "`resolution` must be"),
            ({"margin": -0.1}, ValueError, "`margin` must not be negative"),
            ({"margin": "a"}, ValueError, "`margin` must be a finite number"),
            ({"labels": "ab"}, ValueError, "`labels` must name three"),
            ({"labels": None}, ValueError, "`labels` must name three"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            self._call(**arguments)

    def test_bad_kernels(self):
        model = _model()
        points, _ = _three(model, kra.analysis.kernels)
        other = {"layers/dense": points[1]["layers/dense"]}
        with pytest.raises(ValueError, match="must have the same keys"):
            self._call([points[0], other, points[2]], model)
        lost = {**points[1], "layers/dense": points[1]["layers/dense"] * np.nan}
        with pytest.raises(ValueError, match=r"`points\[1\]` holds NaN.*dense"):
            self._call([points[0], lost, points[2]], model)
        shape = {**points[1], "layers/dense": zoo.normal(8, 6)}
        with pytest.raises(ValueError, match="must have shape"):
            self._call([points[0], shape, points[2]], model)
        with pytest.raises(TypeError, match="must all be dicts"):
            self._call([*points[:2], _trained(model)], model)
        with kra.merged(model):
            with pytest.raises(ValueError, match="inside a `merged` block"):
                kra.analysis.mode_connectivity(model, points, X, Y)

    def test_model(self):
        model = _model()
        plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
        with pytest.raises(ValueError, match="is not compiled"):
            kra.analysis.mode_connectivity(plain, [[]] * 3, X, Y)
        points, _ = _three(model, kra.analysis.kernels)
        kra.set_active(model, [])
        with pytest.raises(ValueError, match="one active adapter"):
            kra.analysis.mode_connectivity(model, ["a", "b", "c"], X, Y)
        quantized, x, targets = zoo.dense_int8()
        kra.inject(quantized, kra.LoRA(2), targets)
        quantized.compile("sgd", "mse")
        point = kra.analysis.kernels(quantized)
        with pytest.raises(ValueError, match="Use a float model"):
            kra.analysis.mode_connectivity(quantized, [point] * 3, x, x)


def test_results():
    model = _model()
    points, _ = _three(model, _trained)
    plane = kra.analysis.mode_connectivity(
        model, points, X, Y, resolution=(4, 3), labels=("p", "q", "r")
    )
    table = plane.table()
    assert len(table) == 12
    np.testing.assert_array_equal(table["x"][:4], plane.x)
    np.testing.assert_array_equal(table["loss"], plane.loss.ravel())
    assert repr(plane).splitlines()[1].startswith("p")
    axis = Figure().subplots()
    assert plane.plot(axis, metric="mae") is axis
    assert [text.get_text() for text in axis.texts] == ["p", "q", "r"]
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), plane.points[:, 0])
    with pytest.raises(ValueError, match="must be an axis in 3-D"):
        plane.plot_surface(axis)
    axis = Figure().add_subplot(projection="3d")
    assert plane.plot_surface(axis) is axis
    assert len(axis.collections) == 4 and len(axis.texts) == 3
