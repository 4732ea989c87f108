"""MiSS against dense matrices written from the paper."""

import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend

#: The rank divides the inputs of the first, and no dimension of the others.
VIEWS = [(12, 20), (11, 9), (3, 8)]


def _built(view=(12, 20), rank=3, **arguments):
    adapter = kra.MiSS(rank, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def dense_delta(adapter, shard):
    """Row `i` is row `i mod rank` of the shard, written entry by entry."""
    rows, columns = adapter.input_dim, adapter.output_dim
    delta = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            delta[i, j] = shard[i % shard.shape[0], j % shard.shape[1]]
    return adapter.scaling * delta


class TestMiSS:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("output_rank", [None, 4])
    def test_against_dense_reference(self, view, output_rank):
        adapter = _built(view, output_rank=output_rank, scaling=1.5)
        shard = methods.randomize(adapter)["shard"]
        assert shard.shape == (3, output_rank or view[1])
        methods.check_products(adapter, dense_delta(adapter, shard))

    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("output_rank", [None, 4])
    def test_gradients(self, view, output_rank):
        adapter = _built(view, output_rank=output_rank, scaling=0.5)
        shard = methods.randomize(adapter)["shard"]
        x, upstream = zoo.normal(6, view[0]), zoo.normal(6, view[1], seed=4)
        of_x, of_shard = gradients.gradients(
            lambda x: adapter.delta(x, True), x, [adapter.shard], upstream
        )
        delta = dense_delta(adapter, shard)
        methods.close(of_x, upstream @ delta.T, 2e-5)
        of_kernel = x.T.astype("float64") @ upstream
        expected = np.zeros_like(shard)
        for i in range(view[0]):
            for j in range(view[1]):
                place = i % shard.shape[0], j % shard.shape[1]
                expected[place] += 0.5 * of_kernel[i, j]
        methods.close(of_shard, expected, 2e-5)

    def test_start(self):
        adapter = _built()
        (shard,) = adapter.trainable_variables
        assert adapter.stored_weights() == [shard] == adapter.weights
        assert not methods.numpy(adapter.delta_kernel()).any()

    @pytest.mark.every_backend
    def test_only_the_folded_input_is_kept_for_the_backward_pass(self):
        adapter = _built((40, 60), rank=4)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(300, 40),
            [adapter.shard],
        )
        assert ((300, 40), "float32") not in kept
        assert all(np.prod(shape) <= 300 * 4 for shape, _ in kept)

    def test_counts(self):
        model, _, _ = zoo.bert()
        targets = ["query", "value"]
        report = kra.inject(model, kra.MiSS(6), targets)
        of_lora = kra.inject(model, kra.LoRA(3), targets, name="lora")
        assert report.adapter_parameters == of_lora.adapter_parameters
        kra.eject(model, "default")
        report = kra.inject(model, kra.MiSS(6, output_rank=4), targets)
        assert report.adapter_parameters == 4 * 6 * 4

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": 1.5}, TypeError, "`rank` must be an integer"),
            ({"output_rank": 0}, ValueError, "`output_rank` must be at least"),
            ({"output_rank": True}, TypeError, "`output_rank` must be an int"),
            ({"scaling": float("nan")}, ValueError, "`scaling` must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.MiSS(**arguments)

    @pytest.mark.parametrize(
        "template, message",
        [
            (kra.MiSS(99), r"`rank` must be at most \d+, the number of in"),
            (kra.MiSS(2, output_rank=7), "`output_rank` must be at most 6"),
        ],
    )
    def test_ranks_above_the_dimensions(self, template, message):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match=message):
            kra.inject(model, template, targets)
        assert kra.sites(model) == {}

    def test_config_round_trip(self):
        for template in (kra.MiSS(7), kra.MiSS(7, output_rank=3, scaling=2.0)):
            config = template.get_config()
            assert kra.MiSS.from_config(config).get_config() == config
        assert config["output_rank"] == 3
