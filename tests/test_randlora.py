"""RandLoRA against the paper's formula, in dense float64 matrices.

The reference shares with the library only the random draws (and, for the
Hadamard basis, the Hadamard matrices), which have tests of their own.
"""

import copy
import pickle

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import hadamard
from keras_randadapt import random
from keras_randadapt.adapters import randlora
from tests import gradients
from tests import methods
from tests import sparse
from tests import zoo
from tests.methods import site_of


def _bases(kind, small, large, rank, terms, seed):
    """`A` and `[B_1 ... B_n]` with unit variance, from the draws."""
    a, b = (rank, small), (large, terms * rank)
    roles = "RandLoRA/A", "RandLoRA/B"
    if kind == "gaussian":
        return [random.normals(seed, r, s) for r, s in zip(roles, (a, b))]
    if kind == "uniform":
        return [
            (2.0 * random.uniforms(seed, r, s) - 1) * np.sqrt(3)
            for r, s in zip(roles, (a, b))
        ]
    if kind == "hadamard":
        return [
            _hadamard(small, rank, seed, roles[0], 1, expand=False),
            _hadamard(large, terms * rank, seed, roles[1], 2, expand=True),
        ]
    sparsity = 3 if kind.startswith("sparse") else np.sqrt(small)
    if not kind.endswith("_v1"):
        return [
            sparse.unit(shape, seed, role, sparsity)
            for role, shape in zip(roles, (a, b))
        ]
    a, b = [
        random.ternaries(seed, r, s, sparsity) for r, s in zip(roles, (a, b))
    ]
    # Columns lean on rows, those with few entries first; see SparseTernary.
    load = [0] * rank
    signs = random.signs(seed, "RandLoRA/A/fill", small)
    for i in sorted(range(small), key=lambda i: (np.sum(a[:, i] != 0), i)):
        rows = [
            k for k in range(rank) if a[k, i] and load[k] < -(-small // rank)
        ]
        k = min(rows or range(rank), key=lambda k: load[k])
        a[k, i] = a[k, i] or signs[i]
        load[k] += 1
    return a * np.sqrt(sparsity), b * np.sqrt(sparsity)


def _hadamard(dim, rank, seed, role, stages, expand):
    """Sign flips and transforms, and which rows or columns are kept."""
    h = hadamard.hadamard(dim).astype("float64")
    blocks = []
    for block, start in enumerate(range(0, rank, dim)):
        size = min(dim, rank - start)
        name = f"{role}/{block}"
        transform = np.eye(dim)
        for flips in random.signs(seed, f"{name}/signs", (stages, dim)):
            transform = h @ np.diag(flips) @ transform
        chosen = np.arange(dim)
        if size < dim:
            chosen = random.permutation(seed, f"{name}/rows", dim)[:size]
            chosen = np.sort(chosen)
        blocks.append(transform[:, chosen] if expand else transform[chosen])
    return np.concatenate(blocks, int(expand)) * np.sqrt(dim)


def dense_delta(adapter, view, lambdas, gamma):
    """Equation 4, as an update of the kernel view."""
    small, large = sorted(view)
    rank, terms = adapter.rank, len(lambdas)
    a, b = _bases(adapter.basis, small, large, rank, terms, adapter.seed)
    b = [b[:, j * rank : (j + 1) * rank] for j in range(terms)]
    if adapter.variant == "averaged":
        left = sum(b[j] @ np.diag(lambdas[j]) for j in range(terms))
        update = left @ sum(a @ np.diag(g) for g in gamma)
    else:
        update = sum(
            b[j] @ np.diag(lambdas[j]) @ a @ np.diag(gamma[j])
            for j in range(terms)
        )
    scale = adapter.alpha / rank
    if adapter.rescale == "sqrt":
        scale /= np.sqrt(terms)
    # The paper's weight is (output, input), A on the smaller side.
    return scale * (update.T if view[0] <= view[1] else update)


def _built(view, rank=3, seed=3, **arguments):
    adapter = kra.RandLoRA(rank, seed=seed, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _randomize(adapter):
    lambdas = zoo.normal(*adapter.randlora_lambda.shape, seed=1)
    gamma = zoo.normal(*adapter.randlora_gamma.shape, seed=2)
    adapter.randlora_lambda.assign(lambdas)
    adapter.randlora_gamma.assign(gamma)
    return lambdas.astype("float64"), gamma.astype("float64")


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


class _Linear:
    """The product with a kernel, as a float32 site gives it."""

    def __init__(self, kernel):
        self.variable = keras.Variable(kernel, trainable=False)

    def __call__(self, x):
        return keras.ops.matmul(x, self.variable)

    def kernel(self):
        return keras.ops.convert_to_tensor(self.variable)


def _dense_model(view, adapter, policy="float32", kernel=None):
    inputs = keras.Input((view[0],))
    layer = keras.layers.Dense(
        view[1], use_bias=False, name="site", dtype=policy
    )
    model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
    if kernel is not None:
        layer.kernel.assign(kernel)
    kra.inject(model, adapter, "site")
    (adapter,) = model._randadapt.adapters("default").values()
    return model, layer, adapter


# It takes half a minute to compile each.
SLOW_ON_TORCH = [pytest.mark.slow] if keras.config.backend() == "torch" else []
VIEWS = [(8, 12), (12, 8), (8, 8), (20, 6)]
ARGUMENTS = [
    dict(basis="gaussian"),
    dict(basis="uniform", alpha=5.0, rescale="none"),
    dict(basis="sparse", variant="half"),
    dict(basis="very_sparse"),
    dict(basis="sparse_v1"),
    dict(basis="very_sparse_v1"),
    dict(basis="hadamard"),
    dict(basis="uniform", variant="averaged"),
    # One term, and a rank above the dimensions.
    dict(basis="gaussian", rank=14),
    dict(basis="hadamard", rank=14),
]


class TestFormula:
    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    def test_against_dense_reference(self, arguments, compute):
        for view in VIEWS:
            adapter = _built(view, compute=compute, **arguments)
            assert _numpy(adapter.delta_kernel()).any() == 0
            dense = dense_delta(adapter, view, *_randomize(adapter))
            x, z = zoo.normal(3, 2, view[0]), zoo.normal(3, 2, view[1])
            ids = zoo.integers(2, 5, high=view[0])
            kernel = zoo.normal(*view, seed=5)
            tensor = keras.ops.convert_to_tensor
            for got, expected in (
                (adapter.delta_kernel(), dense),
                (adapter.delta(tensor(x)), x @ dense),
                (adapter.delta_transpose(tensor(z)), z @ dense.T),
                (adapter.lookup(tensor(ids), "float32"), dense[ids]),
                (
                    adapter.adapt(tensor(x), _Linear(kernel)),
                    x @ (kernel + dense),
                ),
            ):
                np.testing.assert_allclose(
                    _numpy(got),
                    expected,
                    rtol=1e-5,
                    atol=1e-5 * np.abs(expected).max(),
                )

    @pytest.mark.parametrize("basis", kra.bases.KINDS)
    @pytest.mark.parametrize(
        "variant, rank", [("half", 5), ("averaged", 4)], ids=str
    )
    def test_factors_of_a_known_rank(self, variant, rank, basis):
        for view in ((12, 17), (17, 12)):
            adapter = _built(view, rank, variant=variant, basis=basis)
            dense = dense_delta(adapter, view, *_randomize(adapter))
            methods.check_factors(adapter, dense)
        # These have the full rank.
        for arguments in (dict(rank=12, variant="half"), dict(rank=3)):
            assert _built((12, 17), **arguments).factors() is None

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("view", [(6, 9), (9, 6)], ids=str)
    @pytest.mark.parametrize(
        "arguments", [ARGUMENTS[i] for i in (0, 2, 4, 5)], ids=str
    )
    def test_gradients_against_dense(self, view, arguments, compute):
        adapter = _built(view, compute=compute, **arguments)
        lambdas, gamma = _randomize(adapter)
        x, upstream = zoo.normal(7, view[0]), zoo.normal(7, view[1], seed=4)
        kernel = zoo.normal(*view, seed=5)
        linear = _Linear(kernel)

        def loss(lambdas, gamma):
            delta = dense_delta(adapter, view, lambdas, gamma)
            return np.sum(upstream * (x @ (kernel + delta)))

        found = gradients.gradients(
            lambda x: adapter.adapt(x, linear, True),
            x,
            [adapter.randlora_lambda, adapter.randlora_gamma],
            upstream,
        )
        delta = dense_delta(adapter, view, lambdas, gamma)
        expected = (
            upstream @ (kernel + delta).T,
            gradients.numeric_gradient(lambda v: loss(v, gamma), lambdas),
            gradients.numeric_gradient(lambda v: loss(lambdas, v), gamma),
        )
        for got, want in zip(found, expected):
            np.testing.assert_allclose(
                got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max()
            )

    @pytest.mark.parametrize("view", [(24, 40), (40, 24), (32, 32)], ids=str)
    @pytest.mark.parametrize("basis", kra.bases.KINDS)
    def test_rank(self, basis, view):
        small = min(view)
        for variant, rank in (
            ("full", small),
            ("averaged", 5),
            ("half", 5 * -(-(-(-small // 5)) // 2)),
        ):
            for seed in range(3):
                adapter = _built(
                    view, 5, seed=seed, basis=basis, variant=variant
                )
                _randomize(adapter)
                delta = _numpy(adapter.delta_kernel()).astype("float64")
                values = np.linalg.svd(delta)[1]
                # Rounding is at 1e-7.
                assert np.sum(values > 1e-6 * values[0]) == rank

    @pytest.mark.one_backend
    @pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
    @pytest.mark.parametrize(
        "view, rank, seeds",
        [
            ((8, 8), 4, 60),
            ((8, 8), 3, 60),
            ((16, 16), 4, 60),
            ((16, 16), 5, 30),
            ((9, 40), 2, 30),
            ((40, 9), 20, 30),
            ((5, 6), 1, 30),
            ((64, 64), 8, 3),
        ],
        ids=str,
    )
    def test_sparse_bases_reach_full_rank_for_every_seed(
        self, basis, view, rank, seeds
    ):
        """In exact arithmetic, with integers for the vectors."""
        small, large = sorted(view)
        terms = -(-small // rank)
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            lambdas = generator.integers(1, 2**30, size=(terms, rank))
            gamma = generator.integers(1, 2**30, size=(terms, small))
            adapter = _built(view, rank, seed=seed, basis=basis)
            a, b = adapter.basis_a.values(), adapter.basis_b.values()
            mixing = [
                sparse.times(np.diag(lambdas[j]), a, np.diag(gamma[j]))
                for j in range(terms)
            ]
            delta = sparse.times(b, np.concatenate(mixing))
            assert delta.shape == (large, small)
            assert sparse.rank_of(delta) == small

    def test_thin_sparse_bases_have_the_size_of_others(self):
        """All scales 1: the update is as large as that of dense bases."""
        sizes = {}
        for basis in ("uniform", "sparse", "very_sparse", "very_sparse_v1"):
            adapter = _built((256, 256), 4, basis=basis)
            for weight in adapter.trainable_weights:
                weight.assign(np.ones(weight.shape))
            sizes[basis] = _numpy(adapter.delta_kernel()).std()
        for basis in ("sparse", "very_sparse"):
            assert 0.8 < sizes[basis] / sizes["uniform"] < 1.25
        # Earlier versions filled without scaling.
        assert sizes["very_sparse_v1"] / sizes["uniform"] > 1.5

    @pytest.mark.parametrize("view", [(10, 14), (14, 10)], ids=str)
    def test_one_term_is_vera(self, view):
        """n = 1 and rank = d_min: two vectors around two matrices."""
        adapter = _built(view, 10, alpha=10.0)
        lambdas, gamma = _randomize(adapter)
        a, b = _bases("uniform", 10, 14, 10, 1, adapter.seed)
        # VeRA's weight, (output, input): diag(b) B diag(d) A.
        if view[0] < view[1]:
            # Its vector on the input side is folded into A.
            weight = b @ np.diag(lambdas[0]) @ (a * gamma[0])
        else:
            weight = np.diag(gamma[0]) @ a.T @ np.diag(lambdas[0]) @ b.T
        np.testing.assert_allclose(
            _numpy(adapter.delta_kernel()), weight.T, rtol=1e-4, atol=1e-4
        )

    def test_linear_in_lambda(self):
        adapter = _built((8, 12))
        one, _ = _randomize(adapter)
        other = zoo.normal(*one.shape, seed=9)
        deltas = []
        for value in (one, other, 2 * one - 3 * other):
            adapter.randlora_lambda.assign(value)
            deltas.append(_numpy(adapter.delta_kernel()))
        np.testing.assert_allclose(
            deltas[2], 2 * deltas[0] - 3 * deltas[1], rtol=1e-4, atol=1e-4
        )

    def test_zero_lambda_is_the_identity(self):
        model, layer, adapter = _dense_model((8, 12), kra.RandLoRA(3))
        x = zoo.normal(4, 8)
        base = x @ _numpy(layer._kernel)
        _randomize(adapter)
        adapter.randlora_lambda.assign(np.zeros((3, 3)))
        np.testing.assert_allclose(_numpy(model(x)), base, atol=1e-6)

    @pytest.mark.parametrize(
        "view, arguments, count",
        [
            ((768, 768), dict(rank=32), 19_200),
            ((768, 3072), dict(rank=32), 24 * (32 + 768)),
            ((3072, 768), dict(rank=64, variant="averaged"), 12 * (64 + 768)),
            ((768, 768), dict(rank=32, variant="half"), 9_600),
            ((8, 12), dict(rank=3), 33),
        ],
        ids=str,
    )
    def test_counts(self, view, arguments, count):
        # Of the basis that keeps nothing, so that building is quick.
        adapter = _built(view, basis="hadamard", **arguments)
        stored = adapter.stored_weights()
        assert sum(np.prod(w.shape) for w in stored) == count

    def test_initial_values(self):
        adapter = _built((8, 12))
        assert not _numpy(adapter.randlora_lambda).any()
        np.testing.assert_allclose(_numpy(adapter.randlora_gamma), 1 / 8)
        assert adapter.scaling == pytest.approx(2 / np.sqrt(3))
        assert _built((8, 12), alpha=640, rescale="none").scaling == 640 / 3


class TestFrozenBases:
    def _model(self, adapter):
        inputs = keras.Input((8,))
        x = inputs
        for width in (8, 8, 12):
            x = keras.layers.Dense(width, activation="tanh")(x)
        model = zoo.set_weights(keras.Model(inputs, x))
        report = kra.inject(model, adapter, "all-linear")
        adapters = model._randadapt.adapters("default").values()
        return model, list(adapters), report

    @pytest.mark.parametrize(
        "basis, dtype",
        [
            ("gaussian", "float32"),
            ("uniform", "float32"),
            ("sparse", "int8"),
            ("very_sparse", "int8"),
        ],
    )
    def test_sites_of_one_shape_share_one_variable(self, basis, dtype):
        model, (a, b, c), report = self._model(kra.RandLoRA(3, basis=basis))
        for name in ("basis_a_values", "basis_b_values"):
            assert getattr(a, name) is getattr(b, name)
            assert getattr(a, name).dtype == dtype
            assert not getattr(a, name).trainable
        assert c.basis_b_values is not a.basis_b_values
        # The shape of A is the same, so it is the same matrix.
        assert c.basis_a_values is a.basis_a_values
        frozen = [v for v in model.variables if v.name.endswith("_values")]
        assert len(frozen) == 3
        assert report.adapter_parameters == 3 * 3 * (3 + 8)
        # A twin has its own: JAX donates variables to one model at a time.
        _, (twin, *_), _ = self._model(kra.RandLoRA(3, basis=basis))
        assert twin.basis_a_values is not a.basis_a_values
        np.testing.assert_array_equal(
            _numpy(twin.basis_a_values), _numpy(a.basis_a_values)
        )
        kra.eject(model)
        assert not any(v.name.endswith("_values") for v in model.variables)

    def test_hadamard_keeps_nothing(self):
        model, adapters, _ = self._model(kra.RandLoRA(3, basis="hadamard"))
        assert sum(len(a.frozen_weights()) for a in adapters) == 0
        assert len(model.non_trainable_variables) == 6

    def test_values_do_not_depend_on_other_sites(self):
        _, (_, _, c), _ = self._model(kra.RandLoRA(3))
        alone = _built((8, 12), seed=0)
        np.testing.assert_array_equal(
            _numpy(c.basis_b_values), _numpy(alone.basis_b_values)
        )

    def test_files_hold_no_basis(self, tmp_path):
        """A basis of 64 KB and more; the files grow by the trainables."""
        inputs = keras.Input((64,))
        layer = keras.layers.Dense(256, name="site", use_bias=False)
        model = zoo.set_weights(keras.Model(inputs, layer(inputs)))

        def size(save, name):
            save(tmp_path / name)
            return (tmp_path / name).stat().st_size

        before = {
            "a.weights.h5": size(model.save_weights, "a.weights.h5"),
            "a.keras": size(model.save, "a.keras"),
        }
        kra.inject(model, kra.RandLoRA(16), "site")
        trained = 4 * 4 * (16 + 64)
        x = zoo.normal(3, 64)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        for name, save in (
            ("a.weights.h5", model.save_weights),
            ("a.keras", model.save),
        ):
            assert size(save, name) - before[name] < trained + 16_000
        kra.save_adapter(model, tmp_path / "a")
        assert (tmp_path / "a").stat().st_size < trained + 4_000
        loaded = keras.models.load_model(tmp_path / "a.keras")
        np.testing.assert_allclose(zoo.outputs(loaded, x), out, rtol=1e-5)
        zoo.randomize(model, seed=4)
        model.load_weights(tmp_path / "a.weights.h5")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    @pytest.mark.parametrize("basis", ["sparse", "hadamard"])
    @pytest.mark.parametrize(
        "copier",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies_have_bases_of_their_own(self, basis, copier):
        model, x, _ = zoo.bert()
        kra.inject(model, kra.RandLoRA(3, basis=basis))
        zoo.randomize(model)
        twin = copier(model)
        np.testing.assert_allclose(
            zoo.outputs(twin, x), zoo.outputs(model, x), atol=1e-6
        )
        mine, theirs = (
            {id(v) for v in m.variables if v.name.endswith("_values")}
            for m in (model, twin)
        )
        # Of query and value in both layers: one pair.
        assert len(mine) == len(theirs) == (0 if basis == "hadamard" else 2)
        assert not mine & theirs

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("basis", ["sparse", "hadamard"])
    def test_export(self, basis, compute, tmp_path):
        """To what the backend exports: a SavedModel, or torch's program."""
        model, x, targets = zoo.einsum_query()
        kra.inject(
            model, kra.RandLoRA(3, basis=basis, compute=compute), targets
        )
        zoo.randomize(model)
        if keras.config.backend() == "torch":
            import torch

            x = torch.from_numpy(x)
            program = torch.export.export(model, (x,), strict=False)
            got = program.module()(x)
        else:
            import tensorflow as tf

            model.export(str(tmp_path / "saved"), verbose=False)
            # Held on to: its functions do not keep its variables alive.
            loaded = tf.saved_model.load(str(tmp_path / "saved"))
            got = loaded.serve(x)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(got).ravel(),
            zoo.outputs(model, x),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_weights_of_another_adapter_do_not_load(self, tmp_path):
        model, _, _ = _dense_model((8, 12), kra.RandLoRA(3, dropout=0.5))
        model.save_weights(tmp_path / "x.weights.h5")
        other, _, _ = _dense_model((8, 12), _OneWeight())
        with pytest.raises(ValueError, match="other adapters than this model"):
            other.load_weights(tmp_path / "x.weights.h5")

    def test_digest_covers_both_bases(self):
        digests = {
            _built((8, 12), seed=seed, basis=basis).basis_digest()
            for seed in (0, 1)
            for basis in kra.bases.KINDS
        }
        assert len(digests) == 10
        assert _built((8, 12), seed=0).basis_digest() == GOLDEN_DIGEST


@keras.saving.register_keras_serializable(package="tests")
class _OneWeight(kra.Adapter):
    def build(self, site):
        self.scale = self.add_trainable("scale", site.kernel_view, "zeros")

    def delta(self, x, training=None):
        return keras.ops.matmul(x, self.scale)

    def delta_kernel(self):
        return keras.ops.convert_to_tensor(self.scale)


class TestCompute:
    @pytest.mark.parametrize("view", [(40, 56), (56, 40)], ids=str)
    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("basis", ["sparse", "uniform", "hadamard"])
    def test_nothing_large_is_kept_for_the_backward_pass(
        self, basis, compute, view
    ):
        """No delta, no mixing matrix, no float copy of an int8 basis: the
        kernel and the basis, as they are, and what goes with inputs."""
        # B is (56, 42), the mixing matrix (40, 42), both unlike the kernel.
        adapter = _built(view, 7, basis=basis, compute=compute)
        _randomize(adapter)
        linear = _Linear(zoo.normal(*view))
        kept = gradients.kept_for_backward(
            lambda x: adapter.adapt(x, linear, True),
            zoo.normal(3, view[0]),
            [adapter.randlora_lambda, adapter.randlora_gamma],
        )
        large = sorted(k for k in kept if np.prod(k[0]) >= 40 * 40)
        expected = [(view, "float32")]
        if basis != "hadamard":
            expected.append(((56, 42), adapter.basis_b.dtype))
        assert set(large) <= set(expected)
        assert len(large) <= len(expected)

    @pytest.mark.needs_optimizer
    @pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="XLA tells JAX how much memory a program takes",
    )
    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("basis", ["uniform", "sparse", "hadamard"])
    def test_compiled_memory_of_deep_models(self, basis, compute):
        """Of a layer more, a trifle: nothing that is formed in the forward pass
        waits for the backward pass, and nothing is formed before its turn.
        Without `fence` it is three deltas.
        """
        dim = 256
        layer = gradients.compiled_bytes_a_layer(
            kra.RandLoRA(32, basis=basis, compute=compute), dim, rows=4
        )
        assert layer < 0.1 * 4 * dim * dim

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    def test_inference_waits_for_no_input(self, compute, monkeypatch):
        """So that a loop over tokens forms the delta once, before it."""
        waits = []

        def fence(awaited, *tensors):
            waits.append(awaited)
            return tensors

        monkeypatch.setattr(randlora, "fence", fence)
        adapter = _built((16, 8), compute=compute)
        x = keras.ops.convert_to_tensor(zoo.normal(3, 16))
        for training, expected in ((False, False), (None, False), (True, True)):
            waits.clear()
            adapter.delta(x, training)
            assert bool(waits) == expected

    @pytest.mark.parametrize(
        "basis, compiled",
        [
            pytest.param("sparse", ["materialized"], marks=SLOW_ON_TORCH),
            pytest.param("sparse", ["factored"], marks=pytest.mark.slow),
            pytest.param("hadamard", ["materialized"], marks=pytest.mark.slow),
            ("sparse", []),
            ("hadamard", []),
        ],
    )
    def test_all_ways_train_alike(self, basis, compiled):
        """Computed in either way, with `jit_compile` and without."""
        weights = []
        for compute in ["factored", "materialized", "auto", *compiled]:
            jit_compile = len(weights) == 3
            model, x, targets = zoo.einsum_gemma()
            kra.inject(
                model, kra.RandLoRA(3, basis=basis, compute=compute), targets
            )
            zoo.randomize(model)
            zoo.fit(
                model,
                x,
                optimizer=keras.optimizers.SGD(0.05),
                jit_compile=jit_compile,
            )
            weights.append([_numpy(v) for v in model.trainable_variables])
        for other in weights[1:]:
            for a, b in zip(other, weights[0]):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    def test_16_bits_keep_a_small_delta(self, compute):
        """A delta of 1/1000 of the kernel is below bfloat16's steps."""
        view = (16, 16)
        model, layer, adapter = _dense_model(
            view,
            kra.RandLoRA(4, compute=compute),
            "mixed_bfloat16",
            kernel=np.ones(view),
        )
        lambdas, gamma = _randomize(adapter)
        delta = dense_delta(adapter, view, lambdas, gamma)
        scale = 1e-3 / np.abs(delta).max()
        adapter.randlora_lambda.assign(lambdas * scale)
        # The base product of these is exactly zero.
        x = np.tile([1.0, -1.0], 8)[None].astype("float32")
        x = x * np.repeat([1, 2, 3, 4, 5, 6, 7, 8], 2)
        for training in (False, True):
            got = _numpy(keras.ops.cast(model(x, training=training), "float32"))
            want = x @ (delta * scale)
            np.testing.assert_allclose(
                got, want, rtol=0.05, atol=0.03 * np.abs(want).max()
            )

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    @pytest.mark.parametrize("view", [(16, 8), (8, 16)], ids=str)
    def test_float16_keeps_first_values(self, view, compute):
        """lambda times gamma is below what float16 can hold."""
        model, layer, adapter = _dense_model(
            view,
            kra.RandLoRA(4, compute=compute),
            "mixed_float16",
            kernel=np.zeros(view),
        )
        lambdas, gamma = _randomize(adapter)
        adapter.randlora_lambda.assign(1e-4 * lambdas)
        adapter.randlora_gamma.assign(1e-5 * gamma)
        delta = dense_delta(adapter, view, 1e-4 * lambdas, 1e-5 * gamma)
        # Half of the smallest positive number is rounded to zero.
        assert np.abs(delta).max() < 2.0**-25
        for product, matrix in (
            (adapter.delta, delta),
            (adapter.delta_transpose, delta.T),
        ):
            x = np.full((1, matrix.shape[0]), 6e4, "float16")
            got = product(keras.ops.convert_to_tensor(x))
            assert keras.backend.standardize_dtype(got.dtype) == "float16"
            want = x.astype("float64") @ matrix
            assert np.abs(want).max() > 1e-5
            np.testing.assert_allclose(
                _numpy(keras.ops.cast(got, "float32")),
                want,
                rtol=2e-3,
                atol=1e-7,
            )

    @pytest.mark.parametrize("compute", ["factored", "materialized"])
    def test_dropout_leaves_the_base_product_alone(self, compute):
        model, layer, adapter = _dense_model(
            (64, 8), kra.RandLoRA(4, compute=compute, dropout=0.5, seed=1)
        )
        _randomize(adapter)
        x = zoo.normal(6, 64)
        base = x @ _numpy(layer._kernel)
        delta = _numpy(adapter.delta_kernel())
        dropped = _numpy(model(x, training=True)) - base
        assert np.abs(dropped - x @ delta).max() > 0.1
        # The inputs that were dropped explain it: x masked and doubled.
        solution, *_ = np.linalg.lstsq(delta.T, dropped.T, rcond=None)
        np.testing.assert_allclose(
            solution.T @ delta, dropped, rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            _numpy(model(x, training=False)), base + x @ delta, atol=1e-4
        )

    @pytest.mark.parametrize("basis", ["uniform", "hadamard"])
    def test_auto_counts_multiply_adds(self, basis):
        """Few inputs: factored. Many: materialized. Once in between."""
        adapter = _built((64, 64), 8, basis=basis)
        for training in (False, True):
            for into_kernel in (False, True):
                choices = [
                    adapter._materializes(
                        np.zeros((t, 64)), training, into_kernel
                    )
                    for t in (1, 4, 16, 32, 64, 128, 1024, 4096)
                ]
                assert choices[0] is False and choices[-1] is True
                assert choices == sorted(choices)
        # By the counts in the rule: half and three quarters of the dimension.
        if basis == "uniform":
            for training, turn in ((False, 32), (True, 48)):
                for t, expected in ((turn - 1, False), (turn, True)):
                    x = np.zeros((t, 64))
                    assert adapter._materializes(x, training, True) is expected

    def test_auto_with_an_unknown_batch(self):
        adapter = _built((8, 8))
        x = keras.KerasTensor((None, 4, 8))
        assert adapter._materializes(x, True, True) is True
        assert adapter._materializes(x, False, True) is False
        adapter = _built((8, 8), compute="materialized")
        assert adapter._materializes(x, False, True) is True

    def test_gradients_of_single_examples(self):
        """`vmap` of the gradient, which JAX and PyTorch have."""
        backend = keras.config.backend()
        for compute in ("factored", "materialized"):
            adapter = _built((8, 12), basis="sparse", compute=compute)
            _randomize(adapter)
            linear = _Linear(zoo.normal(8, 12))
            variables = [adapter.randlora_lambda, adapter.randlora_gamma]
            x = zoo.normal(5, 4, 8)
            single = [
                gradients.gradients(
                    lambda x: adapter.adapt(x, linear, True),
                    one,
                    variables,
                    np.ones((4, 12), "float32"),
                )[1:]
                for one in x
            ]

            def loss(values, x):
                with keras.StatelessScope(
                    state_mapping=list(zip(variables, values))
                ):
                    return keras.ops.sum(adapter.adapt(x, linear, True))

            values = [keras.ops.copy(v.value) for v in variables]
            if backend == "jax":
                import jax

                found = jax.vmap(jax.grad(loss), (None, 0))(values, x)
            elif backend == "torch":
                import torch

                values = [v.detach() for v in values]
                found = torch.func.vmap(torch.func.grad(loss), (None, 0))(
                    values, torch.tensor(x)
                )
            else:
                import tensorflow as tf

                def gradient(x):
                    with tf.GradientTape() as tape:
                        y = keras.ops.sum(adapter.adapt(x, linear, True))
                    return tape.gradient(y, [v.value for v in variables])

                found = tf.vectorized_map(gradient, tf.constant(x))
            for i, got in enumerate(found):
                want = np.stack([g[i] for g in single])
                np.testing.assert_allclose(
                    _numpy(got), want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
                )

    def test_beside_another_adapter(self):
        """What is below in the stack has no kernel to add to."""
        outs = {}
        for compute in ("factored", "materialized"):
            model, x, targets = zoo.dense()
            kra.inject(model, kra.LoRA(2), targets, name="a")
            kra.inject(
                model, kra.RandLoRA(3, compute=compute), targets, name="b"
            )
            for name in "ab":
                zoo.randomize(model, name)
            kra.set_active(model, ["a", "b"])
            outs[compute] = zoo.outputs(model, x)
            with kra.merged(model):
                merged = zoo.outputs(model, x)
            np.testing.assert_allclose(outs[compute], merged, atol=1e-5)
        np.testing.assert_allclose(*outs.values(), rtol=1e-5, atol=1e-5)

    def test_a_site_that_is_trained_itself(self):
        """The kernel's own gradient is not lost in the materialized form."""
        found = []
        for compute in ("factored", "materialized"):
            model, layer, adapter = _dense_model(
                (8, 12), kra.RandLoRA(3, compute=compute)
            )
            _randomize(adapter)
            layer._kernel.trainable = True
            layer._trainable = True
            before = _numpy(layer._kernel).copy()
            model.compile(keras.optimizers.SGD(0.1), "mse")
            model.fit(zoo.normal(6, 8), zoo.normal(6, 12, seed=3), verbose=0)
            found.append(_numpy(layer._kernel) - before)
            assert np.abs(found[-1]).max() > 1e-4
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"basis": "normal"}, "`basis` must be one of"),
            ({"variant": "third"}, "`variant` must be one of"),
            ({"compute": "fast"}, "`compute` must be one of"),
            ({"rescale": "n"}, "`rescale` must be one of"),
            ({"alpha": float("nan")}, "`alpha` must be a finite number"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.RandLoRA(**arguments)

    def test_config_round_trip(self):
        adapter = kra.RandLoRA(
            7,
            basis="sparse",
            variant="half",
            alpha=3,
            rescale="none",
            compute="factored",
            seed=2**63,
            dropout=0.1,
        )
        config = adapter.get_config()
        assert config["alpha"] == 3
        assert kra.RandLoRA.from_config(config).get_config() == config


GOLDEN_DIGEST = "ec7d0ac05b729cfd49024051485052be"


@pytest.mark.one_backend
@pytest.mark.parametrize("method", [kra.RandLoRA, kra.VeRA, kra.LoRAFA])
@pytest.mark.parametrize("basis", ["sparse", "very_sparse"])
def test_versions_of_sparse_bases_in_configs(method, basis):
    """Configs of before mean the bases of before."""
    new, before = method(3, basis=basis), method(3, basis=f"{basis}_v1")
    assert new.get_config()["basis"] == f"{basis}_v2"
    assert before.get_config()["basis"] == basis
    for adapter in (new, before):
        again = method.from_config(adapter.get_config())
        assert again.basis == adapter.basis
    with pytest.raises(ValueError, match="`basis` must be one of"):
        method(3, basis=f"{basis}_v2")


@pytest.mark.one_backend
def test_a_file_of_a_new_sparse_basis_gives_the_same_values(tmp_path):
    model, _, adapter = _dense_model((8, 12), kra.RandLoRA(3, basis="sparse"))
    _randomize(adapter)
    x = zoo.normal(4, 8)
    expected = _numpy(model(x))
    kra.save_adapter(model, tmp_path / "a.safetensors")
    kra.eject(model)
    kra.load_adapter(model, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(_numpy(model(x)), expected)
