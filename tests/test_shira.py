"""SHiRA against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import adapter_files
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend

VIEWS = [(12, 20), (9, 7)]


def _built(view=(12, 20), rank=2, kernel=None, **arguments):
    adapter = kra.SHiRA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    adapter.start_from(zoo.normal(*view, seed=8) if kernel is None else kernel)
    return adapter


def _mask(adapter, kernel):
    """Where entries are trained, from the definition of each mask."""
    view = rows, columns = adapter.input_dim, adapter.output_dim
    count = adapter.rank * (rows + columns)
    mask = np.zeros(view, bool)
    if adapter.mask == "structured":
        lines = adapter.rank - 1
        for k in range(lines):
            mask[k * rows // lines] = True
            mask[:, k * columns // lines] = True
        for i in range(min(view)):
            mask[i, i] = True
        return mask
    if adapter.mask == "random":
        role = f"SHiRA//{rows}x{columns}"
        for place in random.permutation(3, role, rows * columns)[:count]:
            mask[divmod(int(place), columns)] = True
        return mask
    for place in np.argsort(np.abs(kernel), axis=None)[-count:]:
        mask[divmod(int(place), columns)] = True
    return mask


def dense_delta(adapter, values, kernel=None):
    """The values, row by row, where the mask is."""
    delta = np.zeros((adapter.input_dim, adapter.output_dim))
    delta[_mask(adapter, kernel)] = values
    return adapter.scaling * delta


class TestSHiRA:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("mask", ["random", "magnitude", "structured"])
    def test_against_dense_reference(self, mask, view):
        kernel = zoo.normal(*view, seed=8)
        adapter = _built(view, mask=mask, scaling=1.5)
        values = methods.randomize(adapter)["shira_values"]
        delta = dense_delta(adapter, values, kernel)
        methods.check_products(adapter, delta)
        assert np.count_nonzero(delta) == len(values)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("mask", ["random", "structured"])
    def test_gradients(self, mask):
        adapter = _built(mask=mask, scaling=0.5)
        values = methods.randomize(adapter)["shira_values"]
        x, upstream = zoo.normal(2, 3, 12), zoo.normal(2, 3, 20, seed=4)
        of_x, of_values = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [adapter.shira_values],
            upstream,
        )
        methods.close(of_x, upstream @ dense_delta(adapter, values).T, 2e-5)
        of_kernel = np.einsum("abi,abj->ij", x.astype("float64"), upstream)
        expected = 0.5 * of_kernel[_mask(adapter, None)]
        methods.close(of_values, expected, 2e-5)

    @pytest.mark.every_backend
    def test_a_formed_kernel_is_not_kept_for_the_backward_pass(self):
        adapter = _built((40, 60))
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 40),
            [adapter.shira_values],
        )
        assert all(np.prod(shape) < 40 * 60 for shape, _ in kept)

    def test_the_rank_of_the_delta_is_full(self):
        adapter = _built((20, 20), rank=3)
        methods.randomize(adapter)
        delta = methods.numpy(adapter.delta_kernel())
        assert np.linalg.matrix_rank(delta) == 20

    @pytest.mark.parametrize("mask", ["random", "structured"])
    def test_layers_of_one_name_share_places(self, mask):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.SHiRA(2, mask=mask), ["query", "value"])
        adapters = model._randadapt.adapters("default")
        places = {
            address.rpartition("/")[2]: adapter.places_values
            for address, adapter in adapters.items()
        }
        for address, adapter in adapters.items():
            role = address.rpartition("/")[2]
            assert adapter.places_values is places[role]
        query, value = (methods.numpy(one) for one in places.values())
        assert np.array_equal(query, value) == (mask == "structured")

    def test_counts(self):
        model, _, _ = zoo.bert()
        of_lora = kra.inject(model, kra.LoRA(2), ["query", "value"], name="b")
        report = kra.inject(model, kra.SHiRA(2), ["query", "value"])
        assert report.adapter_parameters == of_lora.adapter_parameters

    def test_golden_places(self):
        """Files rely on them, so they are the same for ever."""
        adapter = _built((9, 7), rank=1)
        np.testing.assert_array_equal(adapter.places_values, GOLDEN)
        assert adapter.basis_digest() == GOLDEN_DIGEST

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": 1.5}, TypeError, "`rank` must be an integer"),
            ({"mask": "snip"}, ValueError, "`mask` must be one of"),
            ({"scaling": "a"}, ValueError, "`scaling` must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.SHiRA(**arguments)

    def test_more_entries_than_the_kernel_has(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 3 for"):
            kra.inject(model, kra.SHiRA(4), targets)
        assert kra.sites(model) == {}

    def test_config_round_trip(self):
        config = kra.SHiRA(7, mask="magnitude", scaling=2.0).get_config()
        assert kra.SHiRA.from_config(config).get_config() == config


class TestMagnitude:
    def _model(self, kernel):
        layer = keras.layers.Dense(7, name="site")
        model = keras.Sequential([keras.Input((9,)), layer])
        layer.kernel.assign(kernel)
        return model

    def _saved(self, kernel, path, wrap=lambda one: one):
        model = self._model(kernel)
        template = wrap(kra.SHiRA(1, mask="magnitude"))
        kra.inject(model, template, "site")
        zoo.randomize(model)
        kra.save_adapter(model, path)
        return model

    @pytest.mark.every_backend
    @pytest.mark.parametrize("wrap", [lambda one: one, kra.DoRA])
    def test_file(self, tmp_path, wrap):
        kernel, x = zoo.normal(9, 7), zoo.normal(4, 9)
        trained = self._saved(kernel, tmp_path / "a", wrap)
        out = zoo.outputs(trained, x)
        tensors, metadata = adapter_files.read(tmp_path / "a")
        assert "chosen" in metadata
        # The file has the values alone, and DoRA's magnitudes.
        (site,) = kra.sites(trained)
        assert tensors[site].size in (16, 16 + 7)
        same = self._model(kernel)
        kra.load_adapter(same, tmp_path / "a")
        np.testing.assert_array_equal(zoo.outputs(same, x), out)
        # A file of another adapter in place is checked too.
        kra.load_adapter(same, tmp_path / "a")
        np.testing.assert_array_equal(zoo.outputs(same, x), out)

    def test_another_base_is_refused(self, tmp_path):
        self._saved(zoo.normal(9, 7), tmp_path / "a")
        other = self._model(zoo.normal(9, 7, seed=5))
        with pytest.raises(ValueError, match="other base weights"):
            kra.load_adapter(other, tmp_path / "a")
        # The values belong to other entries, whoever waives the warning.
        with pytest.raises(ValueError, match="these kernels give others"):
            kra.load_adapter(other, tmp_path / "a", check_base="ignore")
        assert kra.sites(other) == {}

    def test_rounding_that_changes_the_choice_is_refused(self, tmp_path):
        kernel = np.ones((9, 7), "float32")
        kernel += 1e-4 * zoo.normal(9, 7)
        self._saved(kernel, tmp_path / "a")
        layer = keras.layers.Dense(7, name="site", dtype="bfloat16")
        other = keras.Sequential([keras.Input((9,)), layer])
        layer.kernel.assign(kernel)
        with pytest.raises(ValueError, match="in the same precision"):
            kra.load_adapter(other, tmp_path / "a")
        assert kra.sites(other) == {}

    def test_whole_model_files(self, tmp_path):
        model = self._saved(zoo.normal(9, 7), tmp_path / "a")
        x = zoo.normal(4, 9)
        out = zoo.outputs(model, x)
        model.save(tmp_path / "a.keras")
        loaded = keras.models.load_model(tmp_path / "a.keras")
        np.testing.assert_array_equal(zoo.outputs(loaded, x), out)

    def test_it_starts_from_the_base_kernel_beside_others(self):
        """And not from the kernel that shows another adapter's update."""
        kernel = zoo.normal(9, 7)
        model = self._model(kernel)
        kra.inject(model, kra.LoRA(2), "site", name="first")
        zoo.randomize(model, "first")
        kra.inject(model, kra.SHiRA(1, mask="magnitude"), "site", name="b")
        places = model.get_layer("site").adapter.get("b").places
        expected = np.sort(np.argsort(np.abs(kernel), axis=None)[-16:])
        np.testing.assert_array_equal(methods.numpy(places), expected)


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """Rank 8 on query and value: 24 sites of 8 * (768 + 768), 2.1 %."""
        model = methods.roberta()
        report = kra.inject(model, kra.SHiRA(8), ["query", "value"])
        assert report.adapter_parameters == 24 * 8 * 1536


GOLDEN = [4, 10, 16, 20, 27, 29, 30, 33, 34, 35, 36, 44, 54, 55, 58, 59]
GOLDEN_DIGEST = "f277778cf6c6dc50"
