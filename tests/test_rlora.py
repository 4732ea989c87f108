"""RLoRA against dense matrices written from the paper.

The reference below is made of explicit sign, Hadamard, selection and
permutation matrices in float64; it shares with the library only the random
draws and the Hadamard matrices, which have tests of their own.
"""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import hadamard
from keras_randadapt import random
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of


def dense_basis(dim, rank, seed, role, stages, rows, padded):
    """Equation 4: `S H B_k ... H B_1 P`, normalized a stage, in blocks."""
    order = 1 << (dim - 1).bit_length() if padded else dim
    h = hadamard.hadamard(order).astype("float64")
    np.testing.assert_allclose(h @ h.T, np.eye(order), atol=1e-12)
    blocks = []
    for block in range(-(-rank // order)):
        size = min(order, rank - block * order)
        name = f"RLoRA/{role}/{block}"
        signs = random.signs(seed, f"{name}/signs", (stages, order))
        transform = np.eye(order)
        for stage in range(stages):
            transform = h @ np.diag(signs[stage]) @ transform
        chosen = np.arange(size)
        if rows == "random":
            chosen = random.permutation(seed, f"{name}/rows", order)
            chosen = np.sort(chosen[:size])
        select = np.eye(order)[chosen]
        blocks.append((select, transform))
    return blocks, order


def dense_delta(adapter, view, alpha, beta):
    """Equation 3, transposed to a Keras kernel: `(input_dim, output_dim)`."""
    arguments = (adapter.seed,)
    options = (adapter.stages, adapter.rows, adapter.hadamard == "pad")
    role = adapter.site.role
    a_blocks, order = dense_basis(
        view[0], adapter.rank, *arguments, f"{role}/A", *options
    )
    pad = np.eye(order)[:, : view[0]]
    a = np.concatenate([s @ t @ pad for s, t in a_blocks])
    b_blocks, order = dense_basis(
        view[1], adapter.rank, *arguments, f"{role}/B", *options
    )
    crop = np.eye(order)[: view[1]]
    b = np.concatenate([crop @ t @ s.T for s, t in b_blocks], axis=1)
    weight = adapter.scaling * np.diag(beta) @ b @ np.diag(alpha) @ a
    return weight.T, a, b


VARIANTS = [
    dict(rank=5),
    dict(rank=5, stages=1),
    dict(rank=5, stages=3, rows="leading"),
    dict(rank=5, rows="leading", hadamard="pad"),
    dict(rank=7, hadamard="pad", stages=3),
    dict(rank=12, scaling=0.5),
    dict(rank=30),
    dict(rank=29, rows="leading", hadamard="pad"),
]


#: The last one differs in its numbers alone.
VIEWS = [
    (12, 20),
    (20, 12),
    pytest.param((7, 16), marks=pytest.mark.one_backend("torch")),
]


def _built(view, **arguments):
    adapter = kra.RLoRA(seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _random(view, **arguments):
    """An adapter with random weights, and these."""
    adapter = _built(view, **arguments)
    alpha = zoo.normal(adapter.rank, seed=1).astype("float64")
    beta = zoo.normal(view[1], seed=2).astype("float64")
    adapter.alpha.assign(alpha)
    adapter.beta.assign(beta)
    return adapter, alpha, beta


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


class TestRLoRA:
    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("arguments", VARIANTS, ids=str)
    def test_against_dense_reference(self, view, arguments):
        adapter, alpha, beta = _random(view, **arguments)
        dense, _, _ = dense_delta(adapter, view, alpha, beta)
        x, z = zoo.normal(3, 2, view[0]), zoo.normal(3, 2, view[1])
        ids = zoo.integers(5, high=view[0])
        tensor = keras.ops.convert_to_tensor
        for got, expected in (
            (adapter.delta_kernel(), dense),
            (adapter.delta(tensor(x)), x @ dense),
            (adapter.delta_transpose(tensor(z)), z @ dense.T),
            (adapter.lookup(tensor(ids), "float32"), dense[ids]),
        ):
            np.testing.assert_allclose(
                _numpy(got), expected, rtol=1e-5, atol=2e-5
            )
        if adapter.rank < min(view):
            methods.check_factors(adapter, dense)
        else:
            assert adapter.factors() is None

    @pytest.mark.parametrize("view", [(12, 20), (20, 12)], ids=str)
    def test_bases_are_orthonormal(self, view):
        adapter = _built(view, rank=11)
        a, b = adapter.basis_a.dense(), adapter.basis_b.dense()
        np.testing.assert_allclose(a @ a.T, np.eye(11), atol=1e-12)
        np.testing.assert_allclose(b.T @ b, np.eye(11), atol=1e-12)

    @pytest.mark.parametrize("view", [(48, 40), (40, 48)], ids=str)
    def test_singular_values_are_alpha(self, view):
        # Section 1.2 of the derivation: A has orthonormal rows, B columns.
        adapter = _built(view, rank=33, scaling=1.0)
        alpha = zoo.normal(33, seed=4)
        adapter.alpha.assign(alpha)
        adapter.beta.assign(np.ones(view[1]))
        values = np.linalg.svd(_numpy(adapter.delta_kernel()))[1]
        np.testing.assert_allclose(
            values[:33], np.sort(np.abs(alpha))[::-1], atol=1e-5
        )
        np.testing.assert_allclose(values[33:], 0, atol=1e-5)

    @pytest.mark.parametrize("arguments", VARIANTS[:4], ids=str)
    def test_gradients_against_dense(self, arguments):
        """One SGD step of a real `fit` moves alpha and beta by the dense
        formula's gradient."""
        inputs = keras.Input((12,))
        layer = keras.layers.Dense(20, use_bias=False, name="site")
        model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
        kra.inject(model, kra.RLoRA(seed=3, **arguments), "site")
        (adapter,) = model._randadapt.adapters("default").values()
        rank = adapter.rank
        alpha = zoo.normal(rank, seed=1).astype("float64")
        beta = zoo.normal(20, seed=2).astype("float64")
        adapter.alpha.assign(alpha)
        adapter.beta.assign(beta)
        x, y = zoo.normal(8, 12), zoo.normal(8, 20, seed=9)
        kernel = _numpy(layer._kernel).astype("float64")

        def loss(alpha, beta):
            delta, _, _ = dense_delta(adapter, (12, 20), alpha, beta)
            return np.mean((x @ (kernel + delta) - y) ** 2)

        eps = 1e-6
        expected = []
        for which, size in ((0, rank), (1, 20)):
            gradient = np.zeros(size)
            for i in range(size):
                step = eps * np.eye(size)[i]
                plus = [alpha, beta]
                minus = [alpha, beta]
                plus[which] = plus[which] + step
                minus[which] = minus[which] - step
                gradient[i] = (loss(*plus) - loss(*minus)) / (2 * eps)
            expected.append(gradient)
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.fit(x, y, batch_size=8, verbose=0)
        for variable, before, gradient in (
            (adapter.alpha, alpha, expected[0]),
            (adapter.beta, beta, expected[1]),
        ):
            moved = before - _numpy(variable)
            np.testing.assert_allclose(moved, gradient, rtol=1e-3, atol=2e-5)
        # Euler's identity: both are <delta, dl / d delta>.
        np.testing.assert_allclose(
            alpha @ (alpha - _numpy(adapter.alpha)),
            beta @ (beta - _numpy(adapter.beta)),
            rtol=1e-3,
        )

    @pytest.mark.parametrize("view", VIEWS, ids=str)
    @pytest.mark.parametrize("arguments", VARIANTS, ids=str)
    def test_gradients_of_inputs_against_dense(self, view, arguments):
        """Those that the layers below train by, and with stacked bases."""
        adapter, alpha, beta = _random(view, **arguments)
        dense, a, b = dense_delta(adapter, view, alpha, beta)
        x, upstream = zoo.normal(3, 2, view[0]), zoo.normal(3, 2, view[1])
        found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [adapter.alpha, adapter.beta],
            upstream,
        )
        z = x @ a.T
        pulled = upstream * beta @ b
        expected = (
            upstream @ dense.T,
            adapter.scaling * np.sum(pulled * z, (0, 1)),
            adapter.scaling * np.sum(upstream * (z * alpha @ b.T), (0, 1)),
        )
        for got, gradient in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-4)

    def test_keeps_rank_numbers_a_token(self):
        """Neither the inputs nor anything of their size."""
        adapter = _built((48, 40), rank=8)
        methods.randomize(adapter)
        kept = gradients.kept_for_backward(
            lambda x: adapter.delta(x, True),
            zoo.normal(64, 48),
            [adapter.alpha, adapter.beta],
        )
        assert (64, 8) in [shape for shape, _ in kept]
        assert max(np.prod(shape) for shape, _ in kept) == 64 * 8

    @pytest.mark.needs_optimizer
    @pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="XLA tells JAX how much memory a program takes",
    )
    @pytest.mark.parametrize("rows", [512, 16384])
    def test_compiled_memory_of_deep_models(self, rows):
        """The layer's own activation and the rank's. Without `fence` also the
        features that beta multiplies; and of so many rows that transforms go
        through them in blocks no results that are made before their turn."""
        dim = 128
        layer = gradients.compiled_bytes_a_layer(kra.RLoRA(16), dim, rows)
        assert layer < 1.5 * 4 * rows * dim

    def test_literal_padding_is_rank_deficient(self):
        # What the paper's letter gives for 768: two stages, leading rows.
        padded = _built((192, 192), rank=128, rows="leading", hadamard="pad")
        a = padded.basis_a.dense()
        assert np.linalg.matrix_rank(a) < 128
        exact = _built((192, 192), rank=128).basis_a.dense()
        np.testing.assert_allclose(np.linalg.svd(exact)[1], 1, atol=1e-10)

    def test_blocks_of_other_seeds_and_sites_differ(self):
        def basis(seed, address):
            adapter = kra.RLoRA(6, seed=seed)
            adapter.build_at(site_of((12, 12), address))
            return adapter.basis_a.dense(), adapter.basis_digest()

        a, digest = basis(0, "block_0/query")
        for other in ((1, "block_0/query"), (0, "block_0/value")):
            assert np.abs(basis(*other)[0] - a).max() > 0.1
            assert basis(*other)[1] != digest
        # The layers of a deep model share them (the paper's section 3.2).
        same, same_digest = basis(0, "block_5/query")
        np.testing.assert_array_equal(same, a)
        assert same_digest == digest

    def test_golden_digest(self):
        adapter = kra.RLoRA(6, seed=0)
        adapter.build_at(site_of((12, 20), "x/query"))
        assert adapter.basis_digest() == GOLDEN_DIGEST

    def test_a_vocabulary_with_a_large_prime(self):
        # 5087 is prime, and too large for a dense core: 30522 is BERT's.
        adapter = _built((2 * 5087, 6), rank=4)
        rows = keras.ops.eye(4)
        a = _numpy(adapter.basis_a.adjoint(rows))
        assert a.shape == (4, 2 * 5087)
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-5)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": -1}, "`rank` must be at least 1"),
            ({"stages": 4}, "`stages` must be one of \\(1, 2, 3\\)"),
            ({"rows": "first"}, "`rows` must be one of"),
            ({"hadamard": "crop"}, "`hadamard` must be one of"),
            ({"beta_initializer": 3}, "`beta_initializer` must be one of"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kra.RLoRA(**arguments)

    def test_config_round_trip(self):
        config = kra.RLoRA(7, seed=2**63, stages=3, dropout=0.1).get_config()
        assert kra.RLoRA.from_config(config).get_config() == config


class TestPaperCounts:
    """Table 2: the trainables of the papers' models, heads excluded."""

    def test_roberta_base(self):
        model = methods.roberta()
        report = kra.inject(model, kra.RLoRA(512), ["query", "value"])
        assert report.adapter_parameters == 30_720
        assert len(report.sites) == 24
        kra.eject(model)
        report = kra.inject(model, kra.LoRA(8), ["query", "value"])
        assert report.adapter_parameters == 294_912

    @pytest.mark.slow
    def test_roberta_large(self):
        model = methods.roberta(24, 1024, 16)
        report = kra.inject(model, kra.RLoRA(256), ["query", "value"])
        assert report.adapter_parameters == 61_440

    @pytest.mark.slow
    def test_gpt2_medium(self):
        import keras_hub

        model = keras_hub.models.GPT2Backbone(
            vocabulary_size=50,
            num_layers=24,
            num_heads=16,
            hidden_dim=1024,
            intermediate_dim=64,
            max_sequence_length=8,
        )
        report = kra.inject(model, kra.RLoRA(1024), ["query", "value"])
        assert report.adapter_parameters == 98_304


GOLDEN_DIGEST = "6af26c33ed4db45221400c8221a9cc4e"
