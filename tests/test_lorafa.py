"""LoRA-FA against dense matrices written from the paper."""

import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import sparse
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend


def _built(view=(12, 20), rank=4, **arguments):
    adapter = kra.LoRAFA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _dense_a(adapter):
    """`A`, of variance 1 / (3 input_dim): LoRA's kaiming_uniform(sqrt(5))."""
    rows = adapter.input_dim
    key = (adapter.seed, "LoRAFA//A", (adapter.rank, rows))
    if adapter.basis == "gaussian":
        unit = random.normals(*key)
    elif adapter.basis == "uniform":
        unit = (2.0 * random.uniforms(*key) - 1) * np.sqrt(3)
    elif adapter.basis == "hadamard":
        unit = adapter.basis_a.dense() * np.sqrt(rows)
    elif adapter.basis.endswith("_v1"):
        # Drawn and filled up; the basis's own tests see to that.
        unit = adapter.basis_a.dense()
    else:
        smaller = min(adapter.site.kernel_view)
        sparsity = 3 if adapter.basis == "sparse" else np.sqrt(smaller)
        unit = sparse.unit(key[2], *key[:2], sparsity)
    return unit.T / np.sqrt(3 * rows)


class TestLoRAFA:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    @pytest.mark.parametrize(
        "basis", [*kra.bases.KINDS, "sparse_v1", "very_sparse_v1"]
    )
    def test_against_dense_reference(self, basis, view):
        adapter = _built(view, basis=basis, alpha=6)
        b = methods.randomize(adapter)["lora_b"]
        methods.check_products(adapter, 1.5 * _dense_a(adapter) @ b)

    def test_only_b_is_trained_and_stored(self):
        adapter = _built()
        (b,) = adapter.trainable_variables
        assert b.name == "lora_b" and b.shape == (4, 20)
        assert adapter.stored_weights() == [b]
        assert not methods.numpy(adapter.delta_kernel()).any()

    def test_a_keeps_its_values_in_training(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRAFA(2), targets)
        adapter = model.get_layer("site").adapter.get("default")
        before = methods.numpy(adapter.basis_a_values)
        zoo.fit(model, x)
        after = methods.numpy(adapter.basis_a_values)
        np.testing.assert_array_equal(before, after)

    def test_rows_of_the_delta_are_spanned_by_a(self):
        adapter = _built()
        methods.randomize(adapter)
        delta = methods.numpy(adapter.delta_kernel()).astype("float64")
        a = _dense_a(adapter)
        methods.close(a @ np.linalg.pinv(a) @ delta, delta)
        assert np.linalg.matrix_rank(delta, tol=1e-5) == 4

    @pytest.mark.every_backend
    @pytest.mark.parametrize("basis", ["uniform", "sparse", "hadamard"])
    @pytest.mark.parametrize("precondition", [False, True])
    def test_gradients(self, basis, precondition):
        view = (12, 20)
        adapter = _built(
            view, basis=basis, scaling=0.5, precondition=precondition
        )
        b = methods.randomize(adapter)["lora_b"]
        x, upstream = zoo.normal(6, 12), zoo.normal(6, 20, seed=4)
        a = _dense_a(adapter)
        of_x, of_b = gradients.gradients(
            lambda x: adapter.delta(x, True), x, [adapter.lora_b], upstream
        )
        methods.close(of_x, upstream @ (0.5 * a @ b).T, 2e-5)
        of_kernel = x.T.astype("float64") @ upstream
        expected = 0.5 * a.T @ of_kernel
        if precondition:
            expected = np.linalg.inv(a.T @ a) @ expected / 0.25
            # The delta's own step is the kernel's gradient, projected.
            methods.close(
                0.5 * a @ of_b, a @ np.linalg.pinv(a) @ of_kernel, 2e-5
            )
        methods.close(of_b, expected, 2e-5)

    @pytest.mark.every_backend
    def test_x_is_not_kept_for_the_backward_pass(self):
        adapter = _built((40, 60))
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(300, 40),
            [adapter.lora_b],
        )
        assert ((300, 40), "float32") not in kept

    def test_counts(self):
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.LoRAFA(3), ["query", "value"])
        assert report.adapter_parameters == 4 * 3 * 8

    def test_layers_of_one_name_share_a(self):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.LoRAFA(3), ["query", "value"])
        adapters = model._randadapt.adapters("default").values()
        assert len({id(a.basis_a_values) for a in adapters}) == 2

    @pytest.mark.every_backend
    def test_golden_digest(self):
        assert _built().basis_digest() == GOLDEN_DIGEST

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"basis": "haar"}, "`basis` must be one of"),
            ({"alpha": 1, "scaling": 1}, "say the same thing"),
            ({"scaling": 0, "precondition": True}, "must not be 0"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.LoRAFA(**arguments)

    def test_rank_above_the_dimensions(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 6"):
            kra.inject(model, kra.LoRAFA(7), targets)

    def test_config_round_trip(self):
        config = kra.LoRAFA(
            7, basis="sparse", alpha=14, precondition=True, dropout=0.1
        ).get_config()
        assert config["scaling"] == 2.0
        assert kra.LoRAFA.from_config(config).get_config() == config


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """Rank 8 on query and value: 24 sites of 8 * 768."""
        model = methods.roberta()
        report = kra.inject(model, kra.LoRAFA(8), ["query", "value"])
        assert report.adapter_parameters == 147_456


GOLDEN_DIGEST = "1960ab5695d69539"
