"""LoKr against dense matrices written from the papers."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.adapters import lokr
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend

#: The last has a prime dimension, which has no parts.
VIEWS = [(12, 20), (16, 9), (11, 8)]

#: Every form of the two factors: low-rank, full, and both low-rank.
FORMS = {
    "low_rank": {"rank": 1},
    "full": {"rank": 9},
    "factor": {"rank": 1, "factor": 2},
    "both": {"rank": 1, "factor": 4, "decompose_both": True},
}


def _built(view=(12, 20), facts=None, **arguments):
    adapter = kra.LoKr(**{"rank": 2, **arguments})
    adapter.build_at(site_of(view, **(facts or {})))
    return adapter


def two_factors(values):
    """`C` and the second matrix, from the trained values."""
    c = values.get("lokr_c")
    if c is None:
        c = values["lokr_c_a"] @ values["lokr_c_b"]
    second = values.get("lokr_ab")
    if second is None:
        second = values["lokr_a"] @ values["lokr_b"]
    return c, second


class TestLoKr:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_against_dense_reference(self, view, form):
        adapter = _built(view, scaling=1.5, **FORMS[form])
        c, second = two_factors(methods.randomize(adapter))
        methods.check_products(adapter, 1.5 * np.kron(c, second), 2e-5)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("form", ["low_rank", "full"])
    def test_gradients(self, form):
        adapter = _built(scaling=0.5, **FORMS[form])
        values = methods.randomize(adapter)
        c, second = two_factors(values)
        names = list(values)
        x, upstream = zoo.normal(6, 12), zoo.normal(6, 20, seed=4)
        of_x, *found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [getattr(adapter, name) for name in names],
            upstream,
        )
        methods.close(of_x, 0.5 * upstream @ np.kron(c, second).T, 3e-5)
        of_kernel = 0.5 * x.T.astype("float64") @ upstream
        blocks = of_kernel.reshape(c.shape[0], -1, c.shape[1], second.shape[1])
        of_second = np.einsum("mnkl,mk->nl", blocks, c)
        expected = {
            "lokr_c": np.einsum("mnkl,nl->mk", blocks, second),
            "lokr_ab": of_second,
        }
        if form == "low_rank":
            expected["lokr_a"] = of_second @ values["lokr_b"].T
            expected["lokr_b"] = values["lokr_a"].T @ of_second
        for name, gradient in zip(names, found):
            methods.close(gradient, expected[name], 3e-5)

    @pytest.mark.parametrize(
        "dim, factor, expected",
        [
            (768, None, (24, 32)),
            (1024, None, (32, 32)),
            (3072, None, (48, 64)),
            (7, None, (1, 7)),
            (1, None, (1, 1)),
            (768, 8, (8, 96)),
            (768, 96, (96, 8)),
            (60, 13, (6, 10)),
            (60, 7, (6, 10)),
            (10, 4, (2, 5)),
        ],
    )
    def test_parts_of_a_dimension(self, dim, factor, expected):
        assert lokr.parts(dim, factor) == expected

    def test_counts_of_the_docstring(self):
        adapter = _built((1024, 1024), rank=9)
        assert sum(np.prod(w.shape) for w in adapter.weights) == 1600
        # Half of 32 is not below 16, so the second matrix is full.
        adapter = _built((1024, 1024), rank=16)
        assert {w.name for w in adapter.weights} == {"lokr_c", "lokr_ab"}

    @pytest.mark.parametrize("form", FORMS)
    def test_start(self, form):
        adapter = _built((16, 36), **FORMS[form])
        assert not methods.numpy(adapter.delta_kernel()).any()
        zeros = [
            w.name
            for w in adapter.trainable_variables
            if not methods.numpy(w).any()
        ]
        assert zeros == ["lokr_c_b" if form == "both" else "lokr_c"]

    @pytest.mark.every_backend
    @pytest.mark.parametrize("tucker", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_windows(self, tucker, transposed):
        """Each position has its own second matrix, and `C` is one."""
        view, facts = (6 * 10, 12), {"input_channels": 10}
        if transposed:
            view, facts = (10, 6 * 12), {"output_channels": 12}
        adapter = _built(view, facts, rank=1, tucker=tucker, scaling=2.0)
        values = methods.randomize(adapter)
        if tucker:
            second = np.einsum(
                "na,pab,bl->pnl",
                values["lokr_a"],
                values["lokr_d"],
                values["lokr_b"],
            )
        else:
            flat = values["lokr_a"] @ values["lokr_b"]
            second = (
                np.stack(np.split(flat, 6, axis=1))
                if transposed
                else flat.reshape(6, 5, 4)
            )
        assert second.shape == (6, 5, 4)
        kernels = [2 * np.kron(values["lokr_c"], one) for one in second]
        dense = np.concatenate(kernels, axis=1 if transposed else 0)
        methods.check_products(adapter, dense, 2e-5)

    @pytest.mark.every_backend
    def test_a_convolution_is_convolved_with_the_delta(self):
        layer = keras.layers.Conv2D(6, 3, name="site")
        model = keras.Sequential([keras.Input((5, 5, 4)), layer])
        zoo.set_weights(model)
        kernel = methods.numpy(layer.kernel).astype("float64")
        report = kra.inject(model, kra.LoKr(1, tucker=True), "site")
        # 4 = 2 * 2 and 6 = 2 * 3.
        assert report.adapter_parameters == 2 * 2 + 2 + 9 + 3
        values = methods.randomize(layer.adapter.get("default"))
        second = np.einsum(
            "na,pab,bl->pnl",
            values["lokr_a"],
            values["lokr_d"],
            values["lokr_b"],
        )
        change = np.stack([np.kron(values["lokr_c"], s) for s in second])
        whole = kernel + change.reshape(3, 3, 4, 6)
        x = zoo.normal(1, 5, 5, 4)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        y = np.einsum("nhwcij,ijcf->nhwf", windows, whole)
        methods.close(model(x), y + methods.numpy(layer.bias), 2e-5)

    def test_no_matrix_of_the_kernel_s_size_is_kept(self):
        adapter = _built((48, 60), rank=2)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 48),
            adapter.trainable_variables,
        )
        assert all(np.prod(shape) < 48 * 60 for shape, _ in kept)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": "a"}, TypeError, "`rank` must be an integer"),
            ({"factor": 0}, ValueError, "`factor` must be at least 1"),
            ({"factor": 2.5}, TypeError, "`factor` must be an integer"),
            ({"scaling": None}, ValueError, "`scaling` must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.LoKr(**arguments)

    def test_config_round_trip(self):
        template = kra.LoKr(3, factor=8, decompose_both=True, tucker=True)
        for one in (kra.LoKr(7, scaling=2.0), template):
            config = one.get_config()
            assert kra.LoKr.from_config(config).get_config() == config
        assert config["factor"] == 8
