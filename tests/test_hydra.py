"""Hydra against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import supported
from tests import gradients
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend

VIEW = (7, 9)
NAMES = ["lora_a", "lora_b", "hydra_c", "hydra_d"]


def dense_output(kernel, bias, scaling, x, lora_a, lora_b, hydra_c, hydra_d):
    """Equation 8, transposed to rows of inputs."""
    y = x @ kernel + bias
    return y + scaling * (x @ lora_a @ lora_b + y @ hydra_c @ hydra_d)


def _model(**arguments):
    inputs = keras.Input((VIEW[0],))
    site = keras.layers.Dense(VIEW[1], name="site")
    model = zoo.set_weights(keras.Model(inputs, site(inputs)))
    kernel = methods.numpy(site.kernel).astype("float64")
    bias = methods.numpy(site.bias).astype("float64")
    kra.inject(
        model, kra.Hydra(2, sequential_rank=3, scaling=1.5, **arguments), "site"
    )
    return model, site.adapter.get("default"), kernel, bias


class TestHydra:
    @pytest.mark.every_backend
    def test_against_dense_reference(self):
        model, adapter, kernel, bias = _model()
        values = methods.randomize(adapter)
        x = zoo.normal(5, 7)
        expected = dense_output(kernel, bias, 1.5, x, **values)
        methods.close(model(x), expected)
        with kra.merged(model):
            methods.close(model(x), expected)
            merged = methods.numpy(model.get_layer("site").bias)
        sequential = values["hydra_c"] @ values["hydra_d"]
        methods.close(merged, bias + 1.5 * bias @ sequential)
        base = supported.bias_variable(model.get_layer("site"))
        np.testing.assert_array_equal(
            methods.numpy(base), bias.astype("float32")
        )
        kra.merge(model)
        methods.close(model(x), expected)

    @pytest.mark.every_backend
    def test_gradients(self):
        model, adapter, kernel, bias = _model()
        values = methods.randomize(adapter)
        x, upstream = zoo.normal(6, 7), zoo.normal(6, 9, seed=4)
        found = gradients.gradients(
            lambda x: model(x, training=True),
            x,
            [getattr(adapter, name) for name in NAMES],
            upstream,
        )
        for name, got in zip(NAMES, found[1:]):
            expected = gradients.numeric_gradient(
                lambda v, name=name: np.sum(
                    upstream
                    * dense_output(kernel, bias, 1.5, x, **{**values, name: v})
                ),
                values[name],
            )
            methods.close(got, expected, 5e-5)

    def test_rank_of_the_update(self):
        model, adapter, kernel, _ = _model()
        methods.randomize(adapter)
        update = methods.numpy(model.get_layer("site").kernel) - kernel
        assert np.linalg.matrix_rank(update, tol=1e-4) == 2 + 3

    def test_without_the_sequential_branch_it_is_lora(self):
        model, adapter, kernel, bias = _model()
        values = methods.randomize(adapter)
        adapter.hydra_d.assign(np.zeros((3, 9)))
        x = zoo.normal(5, 7)
        lora = 1.5 * values["lora_a"] @ values["lora_b"]
        methods.close(model(x), x @ (kernel + lora) + bias)

    def test_bias_of_several_axes(self):
        """The columns of the bias are those of the kernel view."""
        for builder in (zoo.einsum_query, zoo.einsum_output):
            model, x, targets = builder()
            kra.inject(model, kra.Hydra(2), targets)
            zoo.randomize(model)
            before = zoo.outputs(model, x)
            kra.merge(model)
            methods.close(zoo.outputs(model, x), before)

    def test_beside_another_adapter(self):
        model, adapter, kernel, bias = _model()
        values = methods.randomize(adapter)
        kra.inject(model, kra.LoRA(2, seed=9), "site", name="other")
        zoo.randomize(model, "other")
        other = model.get_layer("site").adapter.get("other")
        x = zoo.normal(5, 7)
        expected = dense_output(kernel, bias, 1.5, x, **values)
        expected = expected + x @ methods.numpy(other.delta_kernel())
        for order in (["default", "other"], ["other", "default"]):
            kra.set_active(model, order)
            methods.close(model(x), expected)

    def test_no_sequential_branch_is_lora(self, tmp_path):
        outputs = []
        for template in (kra.Hydra(2, sequential_rank=0), kra.LoRA(2)):
            model, x, targets = zoo.dense()
            report = kra.inject(model, template, targets)
            assert report.adapter_parameters == 2 * (10 + 6)
            zoo.randomize(model)
            kra.save_adapter(model, tmp_path / "file")
            outputs.append(zoo.outputs(model, x))
            kra.merge(model)
            methods.close(zoo.outputs(model, x), outputs[0])
        methods.close(*outputs)
        plain, x, _ = zoo.dense()
        assert not np.allclose(zoo.outputs(plain, x), outputs[0], atol=1e-2)

    def test_counts(self):
        """r_a (in + out) + 2 r_b out."""
        _, adapter, _, _ = _model()
        count = sum(np.prod(w.shape) for w in adapter.trainable_variables)
        assert count == 2 * (7 + 9) + 2 * 3 * 9

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"sequential_rank": -1}, "`sequential_rank` must be at least 0"),
            ({"scaling": "x"}, "`scaling` must be a finite number"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.Hydra(**arguments)

    def test_ranks_above_the_dimensions(self):
        model, _, targets = zoo.dense()
        for ranks, message in (
            ((7, 1), "`rank` must be at most 6"),
            ((1, 7), "`sequential_rank` must be at most 6"),
        ):
            template = kra.Hydra(ranks[0], sequential_rank=ranks[1])
            with pytest.raises(ValueError, match=message):
                kra.inject(model, template, targets)

    def test_a_bias_of_another_size(self):
        """Shared by the heads: the sequential branch would not share it."""
        inputs = keras.Input((3, 6))
        site = keras.layers.EinsumDense(
            "abc,cde->abde", (None, 2, 4), bias_axes="e", name="site"
        )
        model = zoo.set_weights(keras.Model(inputs, site(inputs)))
        with pytest.raises(ValueError, match="bias of 4 numbers.*8 outputs"):
            kra.inject(model, kra.Hydra(2), "site")
        assert kra.sites(model) == {}

    def test_config_round_trip(self):
        config = kra.Hydra(7, sequential_rank=2, dropout=0.1).get_config()
        assert kra.Hydra.from_config(config).get_config() == config


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """Parallel 4 and sequential 8 on each second feed-forward layer."""
        model = methods.roberta(intermediate_dim=3072)
        report = kra.inject(
            model,
            kra.Hydra(4, sequential_rank=8),
            "feedforward_output_dense",
        )
        assert report.adapter_parameters == 331_776
