"""LoRA against its formula."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import methods
from tests import zoo
from tests.methods import site_of


def _built(view=(7, 5), **arguments):
    adapter = kra.LoRA(3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


class TestLoRA:
    def test_delta_is_scaled_product(self):
        adapter = _built(alpha=6)
        a, b = zoo.normal(7, 3, seed=1), zoo.normal(3, 5, seed=2)
        adapter.lora_a.assign(a)
        adapter.lora_b.assign(b)
        x, z = zoo.normal(2, 4, 7), zoo.normal(2, 4, 5)
        dense = 2.0 * a.astype("float64") @ b.astype("float64")
        ids = zoo.integers(4, high=7)
        for got, expected in (
            (adapter.delta_kernel(), dense),
            (adapter.delta(keras.ops.convert_to_tensor(x)), x @ dense),
            (
                adapter.delta_transpose(keras.ops.convert_to_tensor(z)),
                z @ dense.T,
            ),
            (
                adapter.lookup(keras.ops.convert_to_tensor(ids), "float32"),
                dense[ids],
            ),
        ):
            np.testing.assert_allclose(
                _numpy(got), expected, rtol=1e-5, atol=1e-5
            )

    def test_first_values(self):
        a = _numpy(_built(seed=5).lora_a)
        assert np.abs(a).max() <= 1 / np.sqrt(7)
        assert np.abs(a).max() > 0.5 / np.sqrt(7)
        assert not np.any(_numpy(_built().lora_b))
        np.testing.assert_array_equal(a, _numpy(_built(seed=5).lora_a))
        assert np.any(a != _numpy(_built(seed=6).lora_a))
        # The same on every backend, for ever: experiments repeat.
        np.testing.assert_allclose(
            _numpy(_built(seed=5).lora_a)[0], GOLDEN_A, rtol=1e-6
        )

    def test_counts(self):
        adapter = _built()
        assert sum(np.prod(w.shape) for w in adapter.weights) == 3 * (7 + 5)

    @pytest.mark.parametrize(
        "initializer",
        ["zeros", {"name": "normal", "stddev": 0.5}, "he_normal"],
        ids=str,
    )
    def test_initializers(self, initializer):
        adapter = _built(b_initializer=initializer)
        config = adapter.get_config()
        again = kra.LoRA.from_config(config)
        assert again.get_config() == config
        b = _numpy(adapter.lora_b)
        assert (np.abs(b).max() == 0) == (initializer == "zeros")

    def test_rslora(self):
        """Divided by the root of the rank."""
        assert kra.LoRA(16, alpha=8, rslora=True).scaling == 2.0
        assert kra.LoRA(16, alpha=8).scaling == 0.5
        with pytest.raises(ValueError, match="so give `alpha`"):
            kra.LoRA(16, rslora=True)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"rank": 2.5}, "`rank` must be an integer"),
            ({"rank": True}, "`rank` must be an integer"),
            ({"alpha": 1, "scaling": 1}, "give one of them"),
            ({"scaling": float("nan")}, "`scaling` must be a finite number"),
            ({"alpha": "much"}, "`alpha` must be a finite number"),
            ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
            ({"dropout": "0.1"}, "`dropout` must be a finite number"),
            ({"dropout": None}, "`dropout` must be a finite number"),
            ({"dtype": "int32"}, "`dtype` must be a floating-point dtype"),
            ({"initialization": ["default"]}, "`initialization` must be one"),
            (
                {"b_initializer": {"name": "normal", "stddev": "a"}},
                r"`b_initializer\['stddev'\]` must be a finite number",
            ),
            ({"seed": -1}, "`seed`"),
            ({"a_initializer": "no_such"}, "`a_initializer` must be one of"),
            # Keras would start with an update.
            ({"b_initializer": None}, "`b_initializer` must be one of"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            kra.LoRA(**arguments)

    def test_rank_above_the_kernel(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 6") as e:
            kra.inject(model, kra.LoRA(7), targets)
        assert "At 'layers/site'" in str(e.value)

    def test_dropout_only_in_training(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2, dropout=0.5), targets)
        zoo.randomize(model)
        calm = zoo.outputs(model, x)
        np.testing.assert_array_equal(zoo.outputs(model, x), calm)
        noisy = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - calm).max() > 1e-3
        again = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - again).max() > 1e-3
        zoo.fit(model, x)

    def test_dropout_of_each_site_is_its_own(self):
        model, x, _ = zoo.bert()
        kra.inject(model, kra.LoRA(2, dropout=0.5), ["query", "value"])
        ones = keras.ops.ones((16, 8))
        masks = [
            _numpy(adapter.drop(ones, True))
            for adapter in model._randadapt.adapters("default").values()
        ]
        for i, one in enumerate(masks):
            assert set(np.unique(one)) == {0.0, 2.0}
            for other in masks[:i]:
                assert 0.2 < np.mean(one != other) < 0.8

    def test_dropout_in_a_convolution(self):
        model, x, targets = zoo.conv2d_grouped()
        kra.inject(model, kra.LoRA(2, dropout=0.5), targets)
        zoo.randomize(model)
        calm = zoo.outputs(model, x)
        noisy = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - calm).max() > 1e-3
        with kra.disabled(model):
            base = zoo.outputs(model, x)
            np.testing.assert_allclose(
                _numpy(model(x, training=True)).ravel(), base, atol=1e-6
            )


GOLDEN_A = [-0.33777719736099243, -0.17645853757858276, 0.07897330075502396]


def _dense_model(view=(12, 20), template=None):
    inputs = keras.Input((view[0],))
    site = keras.layers.Dense(view[1], use_bias=False, name="site")
    model = zoo.set_weights(keras.Model(inputs, site(inputs)))
    kernel = _numpy(site.kernel).astype("float64")
    kra.inject(model, template, "site")
    return model, site.adapter.get("default"), kernel


class TestInitializations:
    def test_gaussian(self):
        adapter = kra.LoRA(8, initialization="gaussian")
        adapter.build_at(site_of((300, 20)))
        assert abs(_numpy(adapter.lora_a).std() * 8 - 1) < 0.1
        assert not _numpy(adapter.lora_b).any()

    def test_orthogonal(self):
        """Both are nonzero, of all of the rank, and their product is not."""
        adapter = kra.LoRA(8, initialization="orthogonal", alpha=16)
        adapter.build_at(site_of((30, 20)))
        a, b = _numpy(adapter.lora_a), _numpy(adapter.lora_b)
        for factor in (a, b):
            assert np.linalg.matrix_rank(factor) == 4
        assert np.abs(a @ b).max() < 1e-6 * np.abs(a).max() * np.abs(b).max()
        again = kra.LoRA(8, initialization="orthogonal", alpha=16)
        again.build_at(site_of((30, 20)))
        np.testing.assert_array_equal(a, _numpy(again.lora_a))

    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    def test_pissa(self, view):
        """A B is the best approximation of the kernel: what is left of it
        has the other singular values."""
        template = kra.LoRA(3, initialization="pissa", alpha=6)
        model, adapter, kernel = _dense_model(view, template)
        values = np.linalg.svd(kernel, compute_uv=False)
        a, b = (_numpy(v).astype("float64") for v in adapter.weights[:2])
        left = np.linalg.svd(kernel - 2.0 * a @ b, compute_uv=False)
        np.testing.assert_allclose(left[: len(values) - 3], values[3:], 1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5
        )
        self._check_delta(model, adapter, kernel, 2.0)

    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    def test_olora(self, view):
        """Algorithm 1, of the weight `(output_dim, input_dim)`.

        Q's leading columns are B and R's leading rows are A: orthonormal
        columns, by Gram and Schmidt, whose product with A is the projection of
        the weight on them.
        """
        template = kra.LoRA(3, initialization="olora")
        model, adapter, kernel = _dense_model(view, template)
        a, b = (_numpy(v).astype("float64") for v in adapter.weights[:2])
        weight = kernel.astype("float64").T
        columns = []
        for column in weight.T[:3]:
            for other in columns:
                column = column - other * (other @ column)
            columns.append(column / np.linalg.norm(column))
        q = np.stack(columns, axis=1)
        signs = np.sign(np.sum(q * b.T, axis=0))
        np.testing.assert_allclose(b.T, q * signs, atol=1e-5)
        np.testing.assert_allclose(a.T, (q * signs).T @ weight, atol=1e-5)
        self._check_delta(model, adapter, kernel, 1.0)

    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    def test_olora_of_earlier_versions(self, view):
        """Files name it "olora"; A's columns are orthonormal in it."""
        template = kra.LoRA(3, initialization="olora_v1")
        assert template.get_config()["initialization"] == "olora"
        again = kra.LoRA.from_config(template.get_config())
        assert again.initialization == "olora_v1"
        new = kra.LoRA(3, initialization="olora")
        assert kra.LoRA.from_config(new.get_config()).initialization == "olora"
        model, adapter, kernel = _dense_model(view, template)
        a, b = (_numpy(v).astype("float64") for v in adapter.weights[:2])
        np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(a.T @ kernel, b, atol=1e-5)
        self._check_delta(model, adapter, kernel, 1.0)

    def _check_delta(self, model, adapter, kernel, scaling):
        first = [_numpy(v).astype("float64") for v in adapter.weights[:2]]
        assert not _numpy(adapter.delta_kernel()).any()
        x = zoo.normal(5, kernel.shape[0])
        np.testing.assert_array_equal(
            _numpy(adapter.delta(keras.ops.convert_to_tensor(x))), 0
        )
        values = methods.randomize(adapter)
        dense = scaling * (
            values["lora_a"] @ values["lora_b"] - first[0] @ first[1]
        )
        methods.check_products(adapter, dense, 2e-5)
        methods.close(model(x), x @ (kernel + dense), 2e-5)

    @pytest.mark.parametrize("initialization", ["pissa", "olora"])
    def test_files(self, initialization, tmp_path):
        """Adapter files hold what is trained; the rest is made anew."""
        template = kra.LoRA(3, initialization=initialization)
        model, adapter, _ = _dense_model(template=template)
        zoo.randomize(model)
        x = zoo.normal(5, 12)
        out = zoo.outputs(model, x)
        assert len(adapter.stored_weights()) == 2
        kra.save_adapter(model, tmp_path / "file")
        model.save(tmp_path / "model.keras")
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "file")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(zoo.outputs(loaded, x), out, rtol=1e-6)

    def test_what_other_methods_take(self):
        rmlora = kra.RMLoRA(4, initialization="pissa")
        assert rmlora.get_config()["initialization"] == "pissa"
        for method in (kra.DyLoRA, kra.SoRA, kra.AdaLoRA):
            with pytest.raises(ValueError, match="`initialization` must be"):
                method(4, initialization="pissa")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"initialization": "svd"}, "`initialization` must be one of"),
            (
                {"rank": 3, "initialization": "orthogonal"},
                "needs even ranks",
            ),
            ({"initialization": "pissa", "scaling": 0}, "must not be 0"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.LoRA(**arguments)
