"""SAID against dense maps written from the papers."""

import keras
import numpy as np
import pytest
from scipy import linalg

import keras_randadapt as kra
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend


def _built(view=(6, 9), dim=5, **arguments):
    adapter = kra.SAID(dim, seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def dense_map(adapter):
    """`(input * output, dim)`: H G Q H B, padded and cropped."""
    size = adapter.input_dim * adapter.output_dim
    order = 1 << (max(size, adapter.dim) - 1).bit_length()
    hadamard = linalg.hadamard(order).astype("float64")
    draw = (adapter.seed, f"SAID/{adapter.site.number}")
    b = np.diag(random.signs(draw[0], f"{draw[1]}/B", order).astype("float64"))
    g = random.normals(draw[0], f"{draw[1]}/G", order).astype("float64")
    q = np.eye(order)[random.permutation(draw[0], f"{draw[1]}/Q", order)]
    # The code's scale: 1 / (sqrt(order |G|^2) sqrt(size / order)).
    scale = 1 / np.sqrt(order * np.sum(g**2)) / np.sqrt(size / order)
    full = scale * hadamard @ np.diag(g) @ q @ hadamard @ b
    return full[:size, : adapter.dim]


class TestSAID:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view, dim", [((6, 9), 5), ((2, 3), 11)], ids=str)
    def test_against_dense_reference(self, view, dim):
        adapter = _built(view, dim)
        values = methods.randomize(adapter)
        dense = values["said_scale"] * dense_map(adapter) @ values["theta"]
        methods.check_products(adapter, dense.reshape(view))

    def test_the_map_is_linear_and_keeps_lengths(self):
        adapter = _built((40, 50), 300)
        tensor = keras.ops.convert_to_tensor
        u, v = zoo.normal(300), zoo.normal(300, seed=1)
        of_u, of_v, of_both = (
            methods.numpy(adapter.project(tensor(x))) for x in (u, v, 2 * u + v)
        )
        methods.close(of_both, 2 * of_u + of_v)
        assert 0.9 < np.linalg.norm(of_u) / np.linalg.norm(u) < 1.1

    @pytest.mark.every_backend
    def test_gradient_is_the_transposed_map(self):
        adapter = _built()
        weights = zoo.normal(5)
        upstream = zoo.normal(54, seed=4)
        (got,) = gradients.gradients(adapter.project, weights, [], upstream)
        methods.close(got, dense_map(adapter).T @ upstream)

    def test_all_sites_share_one_vector(self):
        model, x, _ = zoo.bert()
        report = kra.inject(model, kra.SAID(10), ["query", "value"])
        assert report.adapter_parameters == 10 + 4
        adapters = model._randadapt.adapters("default")
        assert len({id(a.theta.variable) for a in adapters.values()}) == 1
        names = [v.name for v in model.trainable_variables]
        assert names.count("theta") == 1
        # And have maps of their own.
        zoo.randomize(model)
        deltas = [
            methods.numpy(a.delta_kernel()) / methods.numpy(a.said_scale)
            for a in adapters.values()
        ]
        for i, one in enumerate(deltas):
            for other in deltas[:i]:
                assert np.abs(one - other).max() > 1e-2
        assert [a.site.number for a in adapters.values()] == [0, 1, 2, 3]
        for adapter in adapters.values():
            theta = methods.numpy(adapter.theta.variable)
            scale = methods.numpy(adapter.said_scale)
            dense = scale * dense_map(adapter) @ theta
            methods.close(adapter.delta_kernel(), dense.reshape(8, 8))

    def test_file_holds_the_vector_once(self, tmp_path):
        model, x, _ = zoo.bert()
        kra.inject(model, kra.SAID(1000), ["query", "value"])
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "file")
        assert (tmp_path / "file").stat().st_size < 4 * 1004 + 4 * 200 + 4096
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "file")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_file_of_a_task_in_its_backbone(self, tmp_path):
        model, x, _ = zoo.pretrained_classifier()
        kra.inject(model, kra.SAID(10), ["query", "value"])
        zoo.randomize(model)
        kra.save_adapter(model, tmp_path / "file")
        backbone, _, _ = zoo.bert()
        kra.load_adapter(backbone, tmp_path / "file")
        for one, two in zip(
            kra.sites(model).values(), kra.sites(backbone).values()
        ):
            np.testing.assert_array_equal(
                methods.numpy(one.adapter.get("default").delta_kernel()),
                methods.numpy(two.adapter.get("default").delta_kernel()),
            )

    @pytest.mark.every_backend
    def test_golden_digest(self):
        assert _built().basis_digest() == GOLDEN_DIGEST

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="`dim` must be at least 1"):
            kra.SAID(0)
        with pytest.raises(TypeError, match="`dim` must be an integer"):
            kra.SAID(1.5)

    def test_config_round_trip(self):
        config = kra.SAID(7, seed=2**63, dropout=0.1).get_config()
        assert kra.SAID.from_config(config).get_config() == config


GOLDEN_DIGEST = "cfa55fc7aaaf6007a1ce8a7e94057eada0be7c69a8e548c4"
