"""VeRA against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import sparse
from tests import zoo
from tests.methods import site_of


def dense_matrices(adapter, view):
    """`A` and `B` of variance 2 / input_dim and 2 / rank."""
    shapes = {"A": (adapter.rank, view[0]), "B": (view[1], adapter.rank)}
    fan_in = {"A": view[0], "B": adapter.rank}
    matrices = []
    for side, shape in shapes.items():
        key = (adapter.seed, f"VeRA/{side}", shape)
        if adapter.basis == "gaussian":
            unit = random.normals(*key)
        elif adapter.basis == "uniform":
            unit = (2.0 * random.uniforms(*key) - 1) * np.sqrt(3)
        elif adapter.basis == "hadamard":
            # An independent one is in test_rlora: the same transforms.
            basis = getattr(adapter, f"basis_{side.lower()}")
            unit = basis.dense() * np.sqrt(view[side == "B"])
        else:
            sparsity = 3
            if adapter.basis.startswith("very_sparse"):
                sparsity = np.sqrt(min(view))
            if adapter.basis.endswith("_v1"):
                unit = random.ternaries(*key, sparsity) * np.sqrt(sparsity)
            else:
                unit = sparse.unit(shape, *key[:2], sparsity)
        matrices.append(unit * np.sqrt(2 / fan_in[side]))
    return matrices


def dense_delta(adapter, view, d, b):
    a_matrix, b_matrix = dense_matrices(adapter, view)
    weight = np.diag(b) @ b_matrix @ np.diag(d) @ a_matrix
    return adapter.scaling * weight.T


def _built(view, rank=5, **arguments):
    adapter = kra.VeRA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _randomize(adapter):
    d = zoo.normal(*adapter.vera_d.shape, seed=1)
    b = zoo.normal(*adapter.vera_b.shape, seed=2)
    adapter.vera_d.assign(d)
    adapter.vera_b.assign(b)
    return d.astype("float64"), b.astype("float64")


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


class TestVeRA:
    @pytest.mark.parametrize("view", [(12, 20), (20, 12), (9, 9)], ids=str)
    @pytest.mark.parametrize(
        "basis", [*kra.bases.KINDS, "sparse_v1", "very_sparse_v1"]
    )
    def test_against_dense_reference(self, basis, view):
        # A rank above the dimensions too.
        for rank, scaling in ((5, 1.0), (30, 0.5)):
            adapter = _built(view, rank, basis=basis, scaling=scaling)
            dense = dense_delta(adapter, view, *_randomize(adapter))
            x, z = zoo.normal(3, 2, view[0]), zoo.normal(3, 2, view[1])
            ids = zoo.integers(2, 5, high=view[0])
            tensor = keras.ops.convert_to_tensor
            for got, expected in (
                (adapter.delta_kernel(), dense),
                (adapter.delta(tensor(x)), x @ dense),
                (adapter.delta_transpose(tensor(z)), z @ dense.T),
                (adapter.lookup(tensor(ids), "float32"), dense[ids]),
            ):
                np.testing.assert_allclose(
                    _numpy(got),
                    expected,
                    rtol=1e-5,
                    atol=1e-5 * np.abs(expected).max(),
                )
            if rank < min(view):
                methods.check_factors(adapter, dense)
            else:
                assert adapter.factors() is None
            rank_of_delta = np.linalg.matrix_rank(dense)
            assert rank_of_delta <= min(rank, *view)

    @pytest.mark.one_backend
    @pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
    @pytest.mark.parametrize(
        "view, rank", [((8, 8), 4), ((12, 20), 30), ((20, 12), 15), ((6, 9), 7)]
    )
    def test_sparse_bases_reach_full_rank_for_every_seed(
        self, basis, view, rank
    ):
        """In exact arithmetic, with integers for `d`."""
        for seed in range(40):
            adapter = kra.VeRA(rank, basis=basis, seed=seed)
            adapter.build_at(site_of(view))
            generator = np.random.default_rng(seed)
            d = generator.integers(1, 2**30, size=rank)
            a, b = adapter.basis_a.values(), adapter.basis_b.values()
            delta = sparse.times(b, np.diag(d), a)
            assert sparse.rank_of(delta) == min(rank, *view)
            assert a.any(axis=0).all() and b.any(axis=1).all()

    def test_uniform_is_kaiming_uniform(self):
        """Bound sqrt(6 / fan_in): fan_in is input_dim for A, rank for B."""
        adapter = _built((40, 60), 50)
        a, b = dense_matrices(adapter, (40, 60))
        for matrix, fan_in in ((a, 40), (b, 50)):
            bound = np.sqrt(6 / fan_in)
            assert 0.99 * bound < np.abs(matrix).max() <= bound

    def test_initial_values(self):
        adapter = _built((6, 8), d_initial=0.2)
        np.testing.assert_allclose(_numpy(adapter.vera_d), 0.2)
        assert not _numpy(adapter.vera_b).any()
        assert not _numpy(adapter.delta_kernel()).any()
        np.testing.assert_allclose(_numpy(_built((6, 8)).vera_d), 0.1)

    @pytest.mark.parametrize("basis", ["uniform", "sparse", "hadamard"])
    def test_gradients_and_eulers_identity(self, basis):
        view = (7, 9)
        adapter = _built(view, basis=basis)
        d, b = _randomize(adapter)
        x, upstream = zoo.normal(6, 7), zoo.normal(6, 9, seed=4)

        def loss(d, b):
            return np.sum(upstream * (x @ dense_delta(adapter, view, d, b)))

        of_x, of_d, of_b = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [adapter.vera_d, adapter.vera_b],
            upstream,
        )
        for got, want in (
            (of_x, upstream @ dense_delta(adapter, view, d, b).T),
            (of_d, gradients.numeric_gradient(lambda v: loss(v, b), d)),
            (of_b, gradients.numeric_gradient(lambda v: loss(d, v), b)),
        ):
            np.testing.assert_allclose(
                got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max()
            )
        # Both are <delta, dl / d delta>, which is the loss here.
        np.testing.assert_allclose(d @ of_d, loss(d, b), rtol=1e-4)
        np.testing.assert_allclose(b @ of_b, loss(d, b), rtol=1e-4)

    def test_no_gradient_reaches_d_at_first(self):
        adapter = _built((7, 9))
        _, of_d, of_b = gradients.gradients(
            lambda x: adapter.delta(x, True),
            zoo.normal(6, 7),
            [adapter.vera_d, adapter.vera_b],
            zoo.normal(6, 9),
        )
        assert not of_d.any()
        assert of_b.all()

    @pytest.mark.parametrize("basis", ["uniform", "sparse"])
    def test_no_float_copy_of_a_basis_is_kept(self, basis):
        adapter = _built((40, 60), 50, basis=basis)
        _randomize(adapter)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(3, 40),
            [adapter.vera_d, adapter.vera_b],
        )
        dtype = adapter.basis_a.dtype
        large = {k for k in kept if np.prod(k[0]) > 3 * 60}
        assert large <= {((50, 40), dtype), ((60, 50), dtype)}

    def test_layers_of_one_shape_share_the_bases(self):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.VeRA(5), ["query", "value"])
        adapters = list(model._randadapt.adapters("default").values())
        assert len(adapters) == 4
        for adapter in adapters:
            assert adapter.basis_a_values is adapters[0].basis_a_values
            assert adapter.basis_b_values is adapters[0].basis_b_values

    def test_counts(self):
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.VeRA(5), ["query", "value"])
        assert report.adapter_parameters == 4 * (8 + 5)

    def test_golden_digest(self):
        assert _built((12, 20)).basis_digest() == GOLDEN_DIGEST

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": -1}, "`rank` must be at least 1"),
            ({"basis": "haar"}, "`basis` must be one of"),
            ({"d_initial": "x"}, "`d_initial` must be a finite number"),
            ({"scaling": np.inf}, "`scaling` must be a finite number"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.VeRA(**arguments)

    def test_config_round_trip(self):
        config = kra.VeRA(
            7, basis="sparse", d_initial=1.0, seed=2**63, dropout=0.1
        ).get_config()
        assert config["d_initial"] == 1.0
        assert kra.VeRA.from_config(config).get_config() == config


def _two_sites(seed=0):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(9, activation="tanh", name="wide")(inputs)
    outputs = keras.layers.Dense(4, name="thin")(hidden)
    return zoo.set_weights(keras.Model(inputs, outputs), seed)


class TestShared:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("basis", ["uniform", "gaussian", "sparse"])
    def test_slices_of_one_pair(self, basis):
        """`A[:, :input_dim]` and `B[:output_dim]` of the largest size."""
        model = _two_sites()
        kra.inject(
            model,
            kra.VeRA(5, basis=basis, shared=True, seed=3),
            ["wide", "thin"],
        )
        adapters = model._randadapt.adapters("default").values()
        whole = dense_matrices(kra.VeRA(5, basis=basis, seed=3), (9, 9))
        for adapter, (rows, columns) in zip(adapters, [(6, 9), (9, 4)]):
            assert adapter.shared == (9, 9)
            d, b = _randomize(adapter)
            dense = np.diag(b) @ whole[1][:columns] @ np.diag(d)
            dense = dense @ whole[0][:, :rows]
            methods.check_products(adapter, dense.T)
        frozen = [w for a in adapters for w in a.non_trainable_variables]
        values = {id(w): w for w in frozen if "basis" in w.path}
        assert sorted(tuple(v.shape) for v in values.values()) == [
            (5, 9),
            (9, 5),
        ]

    def test_files_and_merging(self, tmp_path):
        model = _two_sites()
        x = zoo.normal(3, 6)
        kra.inject(model, kra.VeRA(5, shared=True), ["wide", "thin"])
        zoo.randomize(model)
        expected = zoo.outputs(model, x)
        path = tmp_path / "shared.safetensors"
        kra.save_adapter(model, path)
        other = _two_sites()
        kra.load_adapter(other, path)
        np.testing.assert_array_equal(zoo.outputs(other, x), expected)
        model.save(tmp_path / "whole.keras")
        whole = keras.models.load_model(tmp_path / "whole.keras")
        np.testing.assert_array_equal(zoo.outputs(whole, x), expected)
        kra.merge(model)
        methods.close(zoo.outputs(model, x), expected)

    def test_inside_dora(self):
        model = _two_sites()
        template = kra.DoRA(kra.VeRA(5, shared=True))
        kra.inject(model, template, ["wide", "thin"])
        (first, _) = model._randadapt.adapters("default").values()
        assert first.inner.shared == (9, 9)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"shared": (3,)}, ValueError, "must be a bool or"),
            ({"shared": "all"}, TypeError, "must be a bool or"),
            ({"shared": (3, 0)}, ValueError, "`shared`"),
            ({"shared": True, "basis": "hadamard"}, ValueError, "Hadamard"),
        ],
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.VeRA(4, **arguments)

    def test_a_site_that_is_too_large_changes_nothing(self):
        model = _two_sites()
        with pytest.raises(ValueError, match="at least the size of every"):
            kra.inject(model, kra.VeRA(5, shared=(8, 9)), ["wide", "thin"])
        assert kra.sites(model) == {}

    def test_config(self):
        adapter = kra.VeRA(4, shared=(8, 9))
        assert kra.VeRA.from_config(adapter.get_config()).shared == (8, 9)
        assert "shared" not in kra.VeRA(4).get_config()


class TestPaperCounts:
    """VeRA's tables 2 and 4: the trainables, heads excluded."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "family, layers, dim, heads, rank, count",
        [
            ("RobertaBackbone", 12, 768, 12, 1024, 43_008),
            ("RobertaBackbone", 24, 1024, 16, 256, 61_440),
            ("GPT2Backbone", 24, 1024, 16, 1024, 98_304),
        ],
    )
    def test_counts(self, family, layers, dim, heads, rank, count):
        import keras_hub

        model = getattr(keras_hub.models, family)(
            vocabulary_size=50,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=dim,
            intermediate_dim=64,
            max_sequence_length=8,
        )
        report = kra.inject(model, kra.VeRA(rank), ["query", "value"])
        assert report.adapter_parameters == count
        assert len(report.sites) == 2 * layers


GOLDEN_DIGEST = "0230a473a1f6fe3b91bbaa882f96c9b8"
