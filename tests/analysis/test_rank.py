"""Ranks and spectra against an SVD, and cases that are known by hand."""

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_randadapt as kra
from keras_randadapt.analysis import deltas
from tests import test_matrix
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


@keras.saving.register_keras_serializable(package="tests")
class Scaled(kra.LoRA):
    """An adapter that is not additive: it doubles the kernel's first row."""

    def merged(self, kernel, base, training=False):
        scale = np.ones((self.input_dim, 1), "float32")
        scale[0] = 2
        return kernel * scale


def _dense(input_dim=12, output_dim=10, adapter=None):
    """A model of one Dense site, and the adapter on it."""
    inputs = keras.Input((input_dim,))
    layer = keras.layers.Dense(output_dim, name="site")
    model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
    kra.inject(model, adapter or kra.LoRA(3), "site")
    return model, layer.adapter.get("default")


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


def _kernel(layer):
    """The kernel that the site computes with, read off its products."""
    x = np.eye(int(layer._kernel.shape[0]), dtype="float32")
    bias = _numpy(layer(np.zeros_like(x)))
    return _numpy(layer(x)).astype("float64") - bias


def _orthonormal(rows, columns, seed=0):
    return np.linalg.qr(zoo.normal(rows, columns, seed=seed))[0]


class TestSingularValues:
    @pytest.mark.parametrize(
        "adapter",
        [kra.LoRA(3, scaling=0.5), kra.LoRA(10), kra.RLoRA(7), kra.RLoRA(30)],
        ids=repr,
    )
    @pytest.mark.parametrize("view", [(12, 10), (10, 12)], ids=str)
    def test_against_svd_of_the_output(self, adapter, view):
        model, _ = _dense(*view, adapter)
        layer = model.get_layer("site")
        with kra.disabled(model):
            base = _kernel(layer)
        zoo.randomize(model)
        expected = np.linalg.svd(_kernel(layer) - base)[1]
        table = kra.analysis.singular_values(model)
        assert table["layer"].tolist() == ["site"]
        (values,) = table["singular_values"]
        assert values.shape == (10,)
        np.testing.assert_allclose(values, expected, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("method", test_matrix.METHODS)
    def test_of_every_method(self, method):
        template = test_matrix.METHODS[method](0)
        model, _ = _dense(12, 10, template)
        if not (template.mergeable and template.adapts_kernel):
            with pytest.raises(ValueError, match="adds no delta to a kernel"):
                kra.analysis.singular_values(model)
            return
        layer = model.get_layer("site")
        with kra.disabled(model):
            base = _kernel(layer)
        zoo.randomize(model)
        expected = np.linalg.svd(_kernel(layer) - base)[1]
        (values,) = kra.analysis.singular_values(model)["singular_values"]
        np.testing.assert_allclose(
            values, expected, rtol=1e-4, atol=2e-6 * max(1, expected[0])
        )

    @pytest.mark.parametrize("view", [(48, 40), (40, 48)], ids=str)
    def test_of_rlora_are_alpha(self, view):
        # Orthonormal rows of A and columns of B: the derivation's invariant.
        model, adapter = _dense(*view, kra.RLoRA(33))
        alpha = zoo.normal(33, seed=4)
        alpha[5] = 0
        adapter.alpha.assign(alpha)
        adapter.beta.assign(np.ones(view[1]))
        (values,) = kra.analysis.singular_values(model)["singular_values"]
        np.testing.assert_allclose(
            values[:33], np.sort(np.abs(alpha))[::-1], atol=1e-6
        )
        np.testing.assert_allclose(values[33:], 0, atol=1e-6)
        (rank,) = kra.analysis.intrinsic_rank(model)["rank"]
        assert rank == 32

    def test_every_class_of_site(self):
        for builder in (zoo.einsum_query, zoo.conv2d_grouped, zoo.embedding):
            model, _, targets = builder()
            kra.inject(model, kra.RLoRA(5), targets)
            zoo.randomize(model)
            ((address, layer),) = kra.sites(model).items()
            delta = layer.adapter.get("default").delta_kernel()
            expected = np.linalg.svd(_numpy(delta))[1]
            table = kra.analysis.singular_values(model)
            assert table["site"].tolist() == [address]
            (values,) = table["singular_values"]
            np.testing.assert_allclose(values, expected, atol=1e-6)

    def test_of_several_adapters(self):
        model, first = _dense(adapter=kra.LoRA(2))
        kra.inject(model, kra.LoRA(3, seed=1), "site", name="second")
        second = model.get_layer("site").adapter.get("second")
        zoo.randomize(model, "default")
        zoo.randomize(model, "second", seed=1)

        def values(name=None):
            table = kra.analysis.singular_values(model, name)
            return table["singular_values"][0]

        one, two = _numpy(first.delta_kernel()), _numpy(second.delta_kernel())
        for got, delta in (
            (values(), one),
            (values("second"), two),
            (values("default"), one),
        ):
            np.testing.assert_allclose(got, np.linalg.svd(delta)[1], atol=1e-6)
        kra.set_active(model, ["default", "second"])
        both = np.linalg.svd(one + two)[1]
        np.testing.assert_allclose(values(), both, atol=1e-6)
        assert kra.analysis.intrinsic_rank(model)["rank"].tolist() == [5]

    def test_of_an_adapter_that_is_not_additive(self):
        model, _ = _dense(adapter=Scaled(3))
        kernel = _numpy(model.get_layer("site")._kernel)
        (values,) = kra.analysis.singular_values(model)["singular_values"]
        expected = [np.linalg.norm(kernel[0]), *[0] * 9]
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)
        assert kra.analysis.intrinsic_rank(model)["rank"].tolist() == [1]

    def test_rounding_of_a_difference_is_no_rank(self):
        # Merging a delta of 1e-6 of the kernel rounds each element.
        @keras.saving.register_keras_serializable(package="tests")
        class Small(kra.LoRA):
            def merged(self, kernel, base, training=False):
                return kernel + self.delta_kernel()

        model, adapter = _dense(40, 30, Small(2))
        adapter.lora_a.assign(_orthonormal(40, 2))
        adapter.lora_b.assign(1e-4 * _orthonormal(30, 2).T)
        assert kra.analysis.intrinsic_rank(model)["rank"].tolist() == [2]
        (values,) = kra.analysis.singular_values(model)["singular_values"]
        # NumPy's rule alone would count the rounding.
        assert values[2] > 40 * 2**-23 * values[0]

    def test_forms_no_delta_of_lora(self, monkeypatch):
        model, _ = _dense(adapter=kra.LoRA(2))
        zoo.randomize(model)
        shapes = []
        form = deltas._gram_of_matrix
        monkeypatch.setattr(
            deltas,
            "_gram_of_matrix",
            lambda matrix: shapes.append(matrix.shape) or form(matrix),
        )
        kra.analysis.singular_values(model)
        assert not shapes

    def test_quantized(self):
        model, _, targets = zoo.dense_int8()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        assert kra.analysis.intrinsic_rank(model)["rank"].tolist() == [2]
        kra.eject(model)
        kra.inject(model, Scaled(2), targets)
        assert kra.analysis.intrinsic_rank(model)["rank"].tolist() == [1]


class TestRanks:
    def _with_spectrum(self, spectrum, view=(20, 16)):
        """A model whose LoRA delta has these singular values."""
        rank = len(spectrum)
        model, adapter = _dense(*view, kra.LoRA(rank))
        left = _orthonormal(view[0], rank, seed=1)
        right = _orthonormal(view[1], rank, seed=2)
        adapter.lora_a.assign(left * np.array(spectrum, "float32"))
        adapter.lora_b.assign(right.T)
        return model

    def test_tolerance(self):
        model = self._with_spectrum([10, 1, 0.2, 1e-3])
        for tolerance, rank in (
            (None, 4),
            (0.05, 2),
            (0.01, 3),
            (0.5, 1),
        ):
            table = kra.analysis.intrinsic_rank(model, tolerance=tolerance)
            assert table["rank"].tolist() == [rank]
            assert table["input_dim"].tolist() == [20]
            assert table["output_dim"].tolist() == [16]

    def test_effective_rank(self):
        # Four equal values, then the entropy of (1/2, 1/4, 1/4) by hand.
        model = self._with_spectrum([3, 3, 3, 3])
        table = kra.analysis.effective_rank(model)
        np.testing.assert_allclose(table["effective_rank"], [4], rtol=1e-5)
        np.testing.assert_allclose(table["stable_rank"], [4], rtol=1e-5)
        model = self._with_spectrum([2, 1, 1])
        table = kra.analysis.effective_rank(model)
        np.testing.assert_allclose(table["effective_rank"], [2**1.5], rtol=1e-5)
        np.testing.assert_allclose(table["stable_rank"], [6 / 4], rtol=1e-5)

    def test_zero_delta(self):
        model, _ = _dense()
        row = kra.analysis.delta_statistics(model).rows()[0]
        assert row["rank"] == row["effective_rank"] == row["stable_rank"] == 0
        assert row["orthogonality_loss"] == 10

    @pytest.mark.parametrize(
        "adapter", [kra.DoRA(kra.LoRA(2)), kra.DoRA(kra.VeRA(4)), kra.Hydra(2)]
    )
    def test_zero_delta_of_a_difference(self, adapter):
        """Which is not quite zero, and noise has a rank."""
        model, _, targets = zoo.sequential()
        kra.inject(model, adapter, targets)
        for row in kra.analysis.delta_statistics(model).rows():
            assert row["rank"] == 0
            assert row["effective_rank"] == row["stable_rank"] == 0

    @pytest.mark.parametrize("view", [(20, 16), (16, 20)], ids=str)
    def test_orthogonality_of_orthonormal_factors(self, view):
        model = self._with_spectrum([1, 1, 1, 1, 1], view)
        table = kra.analysis.orthogonality_loss(model)
        np.testing.assert_allclose(
            table["orthogonality_loss"], [view[1] - 5], rtol=1e-5
        )
        assert table["floor"].tolist() == [view[1] - 5]

    @pytest.mark.parametrize("rank", [32, 64, 80])
    def test_floor_of_the_papers_table(self, rank):
        # 100 classes: 68, 36 and 20 for ranks 32, 64 and 80.
        model, adapter = _dense(128, 100, kra.RLoRA(rank))
        adapter.alpha.assign(np.ones(rank))
        adapter.beta.assign(np.ones(100))
        (loss,) = kra.analysis.orthogonality_loss(model)["orthogonality_loss"]
        assert abs(loss - (100 - rank)) < 1e-3

    @pytest.mark.parametrize("view", [(12, 10), (10, 12)], ids=str)
    def test_orthogonality_against_dense(self, view):
        for adapter in (kra.LoRA(4), kra.RLoRA(9)):
            model, built = _dense(*view, adapter)
            zoo.randomize(model, scale=1.0)
            delta = _numpy(built.delta_kernel()).astype("float64").T
            expected = np.sum((delta @ delta.T - np.eye(view[1])) ** 2)
            table = kra.analysis.orthogonality_loss(model)
            np.testing.assert_allclose(
                table["orthogonality_loss"], [expected], rtol=1e-5
            )

    def test_statistics_of_attention(self):
        model, _, targets = zoo.functional()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        table = kra.analysis.delta_statistics(model)
        assert table["site"].tolist() == list(kra.sites(model))
        assert table["rank"].tolist() == [2] * len(table)
        np.testing.assert_allclose(
            table["frobenius_norm"] ** 2 / table["spectral_norm"] ** 2,
            table["stable_rank"],
        )
        assert (table["effective_rank"] <= 2 + 1e-6).all()

    def test_plots(self):
        model = self._with_spectrum([2, 1, 1])
        axis = Figure().subplots()
        assert kra.analysis.intrinsic_rank(model).plot(axis) is axis
        assert axis.patches[0].get_width() == 3
        assert axis.get_xlabel() == "rank"
        axis = kra.analysis.effective_rank(model).plot(
            Figure().subplots(), column="stable_rank"
        )
        assert axis.patches[0].get_width() == pytest.approx(1.5)
        axis = kra.analysis.singular_values(model).plot(
            Figure().subplots(), relative=True
        )
        np.testing.assert_allclose(
            axis.lines[0].get_ydata()[:3], [1, 0.5, 0.5], rtol=1e-5
        )
        # The thirteen zeros are not drawn, rounding may leave a few.
        assert axis.get_yscale() == "log"

    def test_a_new_axis(self):
        from matplotlib import pyplot

        pyplot.switch_backend("agg")
        model = self._with_spectrum([2, 1])
        axis = kra.analysis.intrinsic_rank(model).plot()
        assert len(axis.patches) == 1
        pyplot.close(axis.figure)

    def test_no_matplotlib(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        table = kra.analysis.intrinsic_rank(self._with_spectrum([2, 1]))
        with pytest.raises(ImportError, match="pip install matplotlib"):
            table.plot()


class TestErrors:
    FUNCTIONS = (
        kra.analysis.singular_values,
        kra.analysis.intrinsic_rank,
        kra.analysis.effective_rank,
        kra.analysis.orthogonality_loss,
        kra.analysis.delta_statistics,
    )

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_of_the_model(self, function):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="has no adapter attached"):
            function(model)
        with pytest.raises(TypeError, match="`model` must be a"):
            function("model")
        kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(ValueError, match="no adapter called 'other'"):
            function(model, "other")
        with kra.merged(model):
            with pytest.raises(ValueError, match="inside a `merged` block"):
                function(model)
        with kra.disabled(model):
            with pytest.raises(ValueError, match="No adapter of model"):
                function(model)
            # An adapter that is named need not be active.
            assert len(function(model, "default")) == 1

    @pytest.mark.parametrize(
        "tolerance", [-0.1, 1, "much", "0.1", float("nan")]
    )
    def test_tolerance(self, tolerance):
        model, _ = _dense()
        with pytest.raises(ValueError, match="`tolerance` must be at least"):
            kra.analysis.intrinsic_rank(model, tolerance=tolerance)

    def test_diverged(self):
        model, adapter = _dense()
        adapter.lora_b.assign(np.full((3, 10), np.nan))
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            kra.analysis.intrinsic_rank(model)

    def test_nothing_changes(self):
        model, x, targets = zoo.functional()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        before, out = zoo.snapshot(model), zoo.outputs(model, x)
        for function in self.FUNCTIONS:
            function(model)
        for (_, old), (_, new) in zip(
            before.values(), zoo.snapshot(model).values(), strict=True
        ):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
