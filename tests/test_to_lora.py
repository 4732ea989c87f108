"""Adapters that become a LoRA, against dense updates in float64."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import methods
from tests import test_fourierft
from tests import test_loha
from tests import test_lokr
from tests import test_miss
from tests import test_randlora
from tests import test_rlora
from tests import test_said
from tests import test_vera
from tests import zoo

pytestmark = pytest.mark.one_backend

VIEW = (20, 12)
LARGER = pytest.mark.filterwarnings(
    "ignore:At .* the LoRA is larger:keras_randadapt.AdapterWarning"
)


def _values(adapter):
    return {
        weight.name: methods.numpy(weight).astype("float64")
        for weight in adapter.weights
        if weight.dtype in ("float32", "bfloat16")
    }


def _lora(adapter):
    v = _values(adapter)
    gate = v.get("gate", np.ones(adapter.rank))
    a, b = v["lora_a"] @ np.diag(gate), v["lora_b"]
    if "start_a" in v:
        return adapter.scaling * (a @ b - v["start_a"] @ v["start_b"])
    return adapter.scaling * a @ b


def _lorafa(adapter):
    a = adapter.basis_a.dense().T / np.sqrt(3 * adapter.input_dim)
    return adapter.scaling * a @ _values(adapter)["lora_b"]


def _miss(adapter):
    return test_miss.dense_delta(adapter, _values(adapter)["shard"])


def _nola(adapter):
    v = _values(adapter)
    rows, columns, k = adapter.input_dim, adapter.output_dim, adapter.num_bases
    a = adapter.bases_a.dense().astype("float64") / np.sqrt(k)
    b = adapter.bases_b.dense().astype("float64") / np.sqrt(k)
    a = (v["nola_alpha"] @ a).reshape(rows, adapter.rank)
    b = (v["nola_beta"] @ b).reshape(adapter.rank, columns)
    return adapter.scaling * (adapter.first_a.values() / np.sqrt(rows) + a) @ b


def _rlora(adapter):
    v = _values(adapter)
    view = adapter.input_dim, adapter.output_dim
    return test_rlora.dense_delta(adapter, view, v["alpha"], v["beta"])[0]


def _vera(adapter):
    v = _values(adapter)
    view = adapter.input_dim, adapter.output_dim
    return test_vera.dense_delta(adapter, view, v["vera_d"], v["vera_b"])


def _randlora(adapter):
    v = _values(adapter)
    view = adapter.input_dim, adapter.output_dim
    return test_randlora.dense_delta(
        adapter, view, v["randlora_lambda"], v["randlora_gamma"]
    )


def _said(adapter):
    v = _values(adapter)
    # All sites share it, and the first one owns it.
    theta = methods.numpy(adapter.theta.variable).astype("float64")
    delta = test_said.dense_map(adapter) @ theta * v["said_scale"]
    return delta.reshape(adapter.input_dim, adapter.output_dim)


def _fourierft(adapter):
    v = _values(adapter)
    return test_fourierft.dense_delta(adapter, v["coefficients"])


def _loha(adapter):
    return test_loha.dense_delta(adapter, _values(adapter))


def _lokr(adapter):
    c, second = test_lokr.two_factors(_values(adapter))
    return adapter.scaling * np.kron(c, second)


#: By name: the template, its dense update, and the rank in a `VIEW`.
METHODS = {
    "lora": (lambda: kra.LoRA(3, alpha=5), _lora, 3),
    "pissa": (lambda: kra.LoRA(3, initialization="pissa"), _lora, 6),
    "olora": (lambda: kra.LoRA(3, initialization="olora"), _lora, 6),
    "pissa_of_high_rank": (
        lambda: kra.LoRA(7, initialization="pissa", scaling=2.0),
        _lora,
        12,
    ),
    "orthogonal": (lambda: kra.LoRA(4, initialization="orthogonal"), _lora, 4),
    "rmlora": (lambda: kra.RMLoRA(3, alpha=5), _lora, 3),
    "adalora": (lambda: kra.AdaLoRA(3, alpha=5), _lora, 3),
    "sora": (lambda: kra.SoRA(3, alpha=5), _lora, 3),
    "dylora": (lambda: kra.DyLoRA(3, alpha=5), _lora, 3),
    "lorafa": (lambda: kra.LoRAFA(3, alpha=5), _lorafa, 3),
    "fourierft": (lambda: kra.FourierFT(40, scaling=50.0), _fourierft, 12),
    "loha": (lambda: kra.LoHa(3, scaling=2.0), _loha, 9),
    "loha_of_high_rank": (lambda: kra.LoHa(4), _loha, 12),
    "lokr": (lambda: kra.LoKr(1, scaling=2.0), _lokr, 3),
    "lokr_full": (lambda: kra.LoKr(9, scaling=2.0), _lokr, 12),
    "miss": (lambda: kra.MiSS(5, scaling=2.0), _miss, 5),
    "nola": (lambda: kra.NOLA(3, num_bases=5, alpha=5), _nola, 3),
    "rlora": (lambda: kra.RLoRA(5, scaling=2.0), _rlora, 5),
    "rlora_of_high_rank": (lambda: kra.RLoRA(40), _rlora, 12),
    "vera": (lambda: kra.VeRA(7, scaling=5.0), _vera, 7),
    "vera_hadamard": (lambda: kra.VeRA(7, basis="hadamard"), _vera, 7),
    "vera_of_high_rank": (lambda: kra.VeRA(40), _vera, 12),
    "randlora": (lambda: kra.RandLoRA(3), _randlora, 12),
    "randlora_half": (lambda: kra.RandLoRA(5, variant="half"), _randlora, 10),
    "randlora_averaged": (
        lambda: kra.RandLoRA(3, variant="averaged", basis="sparse"),
        _randlora,
        3,
    ),
    "said": (lambda: kra.SAID(9), _said, 12),
}


def _model(template, view=VIEW, **arguments):
    """A site `site` of a view, behind and before layers of its own."""
    inputs = keras.Input((7,))
    x = keras.layers.Dense(view[0], activation="tanh", name="first")(inputs)
    x = keras.layers.Dense(view[1], activation="tanh", name="site")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    zoo.set_weights(model)
    kra.inject(model, template, "site", **arguments)
    zoo.randomize(model)
    return model, zoo.normal(8, 7)


def _adapter(model, name="default"):
    (adapter,) = model._randadapt.adapters(name).values()
    return adapter


def _one(by_address):
    (value,) = by_address.values()
    return value


class TestExact:
    @LARGER
    @pytest.mark.every_backend
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, method):
        make, reference, rank = METHODS[method]
        model, x = _model(make())
        dense = reference(_adapter(model))
        before = zoo.outputs(model, x)
        report = kra.to_lora(model)
        adapter = _adapter(model)
        assert type(adapter) is kra.LoRA and adapter.scaling == 1
        assert adapter.rank == rank == _one(report.ranks)
        assert _one(report.energy_lost) < 1e-13
        methods.close(adapter.delta_kernel(), dense, 2e-6)
        methods.close(zoo.outputs(model, x), before, 1e-5)

    def test_a_lora_stays_bit_for_bit(self):
        model, x = _model(kra.LoRA(3, alpha=5))
        delta = methods.numpy(_adapter(model).delta_kernel())
        kra.to_lora(model)
        np.testing.assert_array_equal(
            methods.numpy(_adapter(model).delta_kernel()), delta
        )

    @pytest.mark.parametrize("initialization", ["pissa", "olora", "olora_v1"])
    def test_small_changes_of_factors_from_the_kernel(self, initialization):
        """The update is not lost in the rounding of what it started from."""
        model, x = _model(kra.LoRA(3, initialization=initialization))
        adapter = _adapter(model)
        for weight, start in (
            (adapter.lora_a, adapter.start_a),
            (adapter.lora_b, adapter.start_b),
        ):
            change = 1e-4 * zoo.normal(*weight.shape)
            weight.assign(methods.numpy(start) + change)
        dense = _lora(adapter)
        assert 0 < np.abs(dense).max() < 1e-2
        kra.to_lora(model)
        converted = _lora(_adapter(model))
        methods.close(converted, dense, 1e-5)

    def test_gates_that_are_closed(self):
        model, x = _model(kra.SoRA(4))
        gate = _adapter(model).gate
        gate.assign(methods.numpy(gate) * [1, 0, 1, 0])
        before = zoo.outputs(model, x)
        report = kra.to_lora(model)
        assert _one(report.ranks) == 2
        methods.close(zoo.outputs(model, x), before)

    def test_weights_of_16_bits(self):
        """The factors are products of these and have more digits."""
        model, x = _model(kra.SoRA(3, alpha=5, dtype="bfloat16"))
        dense = _lora(_adapter(model))
        kra.to_lora(model)
        methods.close(_adapter(model).delta_kernel(), dense, 1e-6)

    @pytest.mark.parametrize(
        "make, reference",
        [
            (lambda: kra.VeRA(4), _vera),
            (lambda: kra.RandLoRA(6, variant="half"), _randlora),
        ],
        ids=["vera", "randlora_half"],
    )
    def test_products_in_float16(self, make, reference):
        """Small factors would be rounded there, and large ones are not."""
        layer = keras.layers.Dense(12, dtype="mixed_float16", name="site")
        model = keras.Sequential([keras.Input((20,)), layer])
        kra.inject(model, make(), "site")
        adapter = _adapter(model)
        for weight in adapter.trainable_variables:
            weight.assign(1e-3 * zoo.normal(*weight.shape))
        dense = reference(adapter)
        kra.to_lora(model)
        adapter = _adapter(model)
        x = zoo.normal(8, 20).astype("float16")
        # The sum is in units of the smallest numbers of float16.
        tensor = keras.ops.convert_to_tensor(64 * x)
        found = methods.numpy(adapter.delta(tensor)).astype("float64") / 64
        expected = x.astype("float64") @ dense
        methods.close(found, expected, 1e-2)

    def test_a_method_of_ones_own(self):
        @keras.saving.register_keras_serializable(package="test_to_lora")
        class Rows(kra.Adapter):
            """`delta = g 1'`, which says nothing of its rank."""

            def build(self, site):
                self.g = self.add_trainable("g", (site.input_dim, 1), "zeros")

            def delta(self, x, training=None):
                return keras.ops.matmul(x, self.delta_kernel())

            def delta_kernel(self):
                return keras.ops.repeat(self.g, self.output_dim, axis=1)

        model, x = _model(Rows())
        dense = methods.numpy(_adapter(model).g) @ np.ones((1, VIEW[1]))
        before = zoo.outputs(model, x)
        report = kra.to_lora(model)
        assert _one(report.ranks) == 1
        methods.close(_adapter(model).delta_kernel(), dense)
        methods.close(zoo.outputs(model, x), before)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: kra.LoRA(2),
            lambda: kra.RLoRA(3),
            lambda: kra.RandLoRA(3),
            lambda: kra.LoRA(2, initialization="pissa"),
        ],
        ids=["lora", "rlora", "randlora", "pissa"],
    )
    def test_an_update_of_zero(self, make):
        """The site stays, and its LoRA can be trained."""
        model, x = _model(make())
        kra.eject(model)
        kra.inject(model, make(), "site")
        adapter = _adapter(model)
        if "rlora" in type(adapter).__name__.lower():
            adapter.beta.assign(np.zeros(VIEW[1]))
        base = zoo.outputs(model, x)
        report = kra.to_lora(model)
        assert _one(report.ranks) == 1 and _one(report.energy_lost) == 0
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
        zoo.fit(model, x)
        assert np.abs(zoo.outputs(model, x) - base).max() > 1e-4


@LARGER
@pytest.mark.every_backend
@pytest.mark.cpu_seconds(10, reason="TensorFlow compiles each model")
@pytest.mark.parametrize(
    "site",
    [
        "einsum_query",
        "einsum_gemma",
        "einsum_shared",
        "conv2d_grouped",
        "conv1d_causal",
        "embedding",
        "reversible_embedding",
        "dense_int8",
        "dense_int4",
        "einsum_int4",
        "embedding_int8",
        "reversible_embedding_int4",
    ],
)
def test_every_kind_of_site(site):
    for template in (kra.VeRA(3, scaling=5.0), kra.RandLoRA(3)):
        model, x, targets = zoo.ALL[site]()
        kernel = methods.numpy(model.get_layer("site").weights[0])
        kra.inject(model, template, targets)
        zoo.randomize(model)
        before = zoo.outputs(model, x)
        reference = _vera if type(template) is kra.VeRA else _randlora
        dense = reference(_adapter(model))
        kra.to_lora(model)
        methods.close(_adapter(model).delta_kernel(), dense, 2e-6)
        methods.close(zoo.outputs(model, x), before)
        kra.eject(model)
        np.testing.assert_array_equal(
            methods.numpy(model.get_layer("site").weights[0]), kernel
        )


class TestRankAndEnergy:
    @pytest.mark.parametrize("method", ["vera", "randlora", "said", "lora"])
    def test_rank(self, method):
        make, reference, own = METHODS[method]
        model, x = _model(make())
        dense = reference(_adapter(model))
        report = kra.to_lora(model, rank=2)
        u, s, v = np.linalg.svd(dense)
        methods.close(
            _adapter(model).delta_kernel(), (u[:, :2] * s[:2]) @ v[:2]
        )
        lost = np.sum(s[2:] ** 2) / np.sum(s**2)
        assert _one(report.energy_lost) == pytest.approx(lost, rel=1e-5)
        assert _one(report.ranks) == 2 < own
        assert _one(report.site_bytes) == 4 * 2 * sum(VIEW)

    @LARGER
    @pytest.mark.parametrize("energy", [0.5, 0.9, np.float32(0.99), 1, 1.0])
    def test_energy(self, energy):
        model, x = _model(kra.RandLoRA(3))
        dense = _randlora(_adapter(model))
        report = kra.to_lora(model, energy=energy)
        u, s, v = np.linalg.svd(dense)
        shares = np.cumsum(s**2) / np.sum(s**2)
        rank = int(np.argmax(shares >= min(float(energy), 1 - 1e-12))) + 1
        assert _one(report.ranks) == rank
        methods.close(
            _adapter(model).delta_kernel(), (u[:, :rank] * s[:rank]) @ v[:rank]
        )
        assert _one(report.energy_lost) == pytest.approx(
            1 - shares[rank - 1], rel=1e-4, abs=1e-12
        )

    def test_each_site_has_the_rank_that_it_needs(self):
        model, x, _ = zoo.sequential()
        kra.inject(model, kra.RLoRA(4), "all-linear")
        zoo.randomize(model)
        spectra = kra.analysis.singular_values(model)["singular_values"]
        report = kra.to_lora(model, energy=0.8)
        shares = [np.cumsum(s**2) / np.sum(s**2) for s in spectra]
        ranks = [int(np.argmax(share >= 0.8)) + 1 for share in shares]
        assert list(report.ranks.values()) == ranks and len(set(ranks)) > 1
        template = model._randadapt.records["default"].template
        assert template.rank == max(ranks)

    def test_a_rank_that_the_update_does_not_have(self):
        """The other ranks add nothing, and training uses them."""
        model, x = _model(kra.LoRA(2))
        before = zoo.outputs(model, x)
        report = kra.to_lora(model, rank=5)
        adapter = _adapter(model)
        assert adapter.rank == 5 and _one(report.ranks) == 5
        template = model._randadapt.records["default"].template
        assert template.rank == 5 and not template.site_ranks
        methods.close(zoo.outputs(model, x), before, 1e-6)
        zoo.fit(model, x)
        b = methods.numpy(adapter.lora_b)
        assert np.all(np.abs(b).max(axis=1) > 0)

    def test_larger_than_the_kernel(self):
        model, x = _model(kra.RandLoRA(3))
        with pytest.warns(kra.AdapterWarning, match="rank 12 at 'layers/dens"):
            kra.to_lora(model)
        kra.eject(model)
        kra.inject(model, kra.RandLoRA(3), "site")
        zoo.randomize(model)
        # 7 (20 + 12) < 20 * 12 < 8 (20 + 12)
        kra.to_lora(model, rank=7)

    def test_the_warning_leaves_the_model_alone(self):
        """It is an error in this suite, and may be one for users."""
        model, x = _model(kra.RandLoRA(3))
        before = zoo.outputs(model, x)
        with pytest.raises(kra.AdapterWarning):
            kra.to_lora(model)
        assert type(_adapter(model)) is kra.RandLoRA
        np.testing.assert_array_equal(zoo.outputs(model, x), before)


class TestInPlace:
    def test_all_but_the_method_stays(self, tmp_path):
        model, x = _model(
            kra.VeRA(5, seed=7, dropout=0.25), keep_trainable="head"
        )
        head = model.get_layer("head")
        head.kernel.assign(zoo.normal(12, 4))
        before = zoo.outputs(model, x)
        kra.to_lora(model)
        methods.close(zoo.outputs(model, x), before)
        record = model._randadapt.records["default"]
        assert [model._randadapt.layers[a] for a in record.kept] == [head]
        assert record.template.dropout == 0.25 and record.template.seed == 7
        np.testing.assert_array_equal(
            methods.numpy(head.kernel), zoo.normal(12, 4)
        )
        assert head.kernel.trainable
        kra.save_adapter(model, tmp_path / "lora.safetensors")
        after = zoo.outputs(model, x)
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "lora.safetensors")
        np.testing.assert_array_equal(zoo.outputs(model, x), after)

    @pytest.mark.every_backend
    def test_in_the_middle_of_training(self):
        model, x = _model(kra.SoRA(3))
        y = zoo.normal(8, 4, seed=1)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(x, y, verbose=0)
        model.predict(x, verbose=0)
        before = zoo.outputs(model, x)
        kra.to_lora(model)
        # Nothing that was compiled computes with the former adapter.
        methods.close(model.predict(x, verbose=0).ravel(), before)
        # The wrapper that closes gates is gone.
        assert isinstance(model.optimizer, keras.optimizers.Adam)
        loss = model.evaluate(x, y, verbose=0)
        model.fit(x, y, epochs=3, verbose=0)
        assert model.evaluate(x, y, verbose=0) < loss

    def test_an_inactive_one_of_two(self):
        model, x = _model(kra.LoRA(2), keep_trainable="head")
        kra.inject(
            model, kra.VeRA(5), "first", name="other", keep_trainable="head"
        )
        zoo.randomize(model, "other")
        kra.set_active(model, "other")
        model.get_layer("head").kernel.assign(zoo.normal(12, 4))
        other = zoo.outputs(model, x)
        kra.set_active(model, "default")
        before = zoo.outputs(model, x)
        with pytest.raises(ValueError, match="say which with `name`"):
            kra.to_lora(model)
        kra.to_lora(model, name="other")
        np.testing.assert_array_equal(zoo.outputs(model, x), before)
        kra.set_active(model, "other")
        methods.close(zoo.outputs(model, x), other)

    @pytest.mark.every_backend
    def test_weights_and_what_is_frozen(self):
        model, x = _model(kra.VeRA(5))
        kra.inject(model, kra.LoRA(2), "site", name="other")
        zoo.randomize(model, "other")
        kra.set_active(model, {"default": 0.5, "other": -2.0}, train=["other"])
        before = zoo.outputs(model, x)
        kra.to_lora(model, name="default")
        kra.to_lora(model, rank=2, name="other")
        methods.close(zoo.outputs(model, x), before)
        one, other = kra.status(model)
        assert (one.method, one.weight, one.trained) == ("LoRA", 0.5, False)
        assert (other.weight, other.trained) == (-2.0, True)
        kra.combine(model, {"default": 0.5, "other": -2.0}, "both")
        kra.set_active(model, "both")
        methods.close(zoo.outputs(model, x), before)

    def test_report(self):
        model, x = _model(kra.VeRA(5), keep_trainable="head")
        report = kra.to_lora(model, rank=2)
        text = str(report)
        assert report.method == "LoRA" and report.head_parameters == 12 * 4 + 4
        assert report.adapter_parameters == 2 * sum(VIEW)
        address = report.sites[0]
        row = next(line for line in text.splitlines() if address in line)
        lost = f"{100 * report.energy_lost[address]:.4g}"
        assert row.split() == [address, "2", f"{8 * sum(VIEW)}", lost, "%"]

    @pytest.mark.parametrize("verbose, shown", [(1, True), (0, False)])
    def test_progress(self, verbose, shown, capsys):
        model, x = _model(kra.VeRA(5))
        kra.to_lora(model, verbose=verbose)
        assert ("1/1" in capsys.readouterr().out) == shown

    def test_progress_of_long_work(self, capsys, monkeypatch):
        from keras_randadapt.model import progress

        for long, shown in ((1e6, False), (0.0, True)):
            monkeypatch.setattr(progress, "_LONG", long)
            model, x, _ = zoo.sequential()
            kra.inject(model, kra.VeRA(3), "all-linear")
            kra.to_lora(model)
            assert ("1/3" in capsys.readouterr().out) == shown


class TestRefusals:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: kra.DoRA(kra.LoRA(2)),
            lambda: kra.HiRA(2),
            lambda: kra.OFT(2),
            lambda: kra.Hydra(2),
            lambda: kra.IA3(),
            lambda: kra.BitFit(),
            lambda: kra.Bottleneck(2),
        ],
        ids=["DoRA", "HiRA", "OFT", "Hydra", "IA3", "BitFit", "Bottleneck"],
    )
    def test_methods_that_are_more_than_a_delta(self, make):
        model, x = _model(make())
        before = zoo.outputs(model, x)
        method = type(_adapter(model)).__name__
        with pytest.raises(ValueError, match=f"is a `{method}`") as error:
            kra.to_lora(model)
        assert "save_adapter" in str(error.value)
        # `merge` is named where it is possible.
        assert ("`merge`" in str(error.value)) == _adapter(model).mergeable
        np.testing.assert_array_equal(zoo.outputs(model, x), before)

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            (dict(rank=13), ValueError, "at most 12, the smaller dimension"),
            (dict(rank=0), ValueError, "`rank` must be at least 1"),
            (dict(rank=2.0), TypeError, "`rank` must be an integer"),
            (dict(rank=True), TypeError, "`rank` must be an integer"),
            (dict(rank=2, energy=0.5), ValueError, "give one of them"),
            (dict(energy=0), ValueError, "above 0 and at most 1"),
            (dict(energy=1.5), ValueError, "above 0 and at most 1"),
            (dict(energy=float("nan")), ValueError, "above 0 and at most 1"),
            (dict(energy="0.9"), ValueError, "above 0 and at most 1"),
            (dict(energy=True), ValueError, "above 0 and at most 1"),
            (dict(name="absent"), ValueError, "no adapter called 'absent'"),
            (dict(verbose=2), ValueError, "`verbose` must be one of"),
        ],
        ids=str,
    )
    def test_arguments(self, arguments, error, message):
        model, x = _model(kra.VeRA(5))
        before = zoo.outputs(model, x)
        with pytest.raises(error, match=message):
            kra.to_lora(model, **arguments)
        assert type(_adapter(model)) is kra.VeRA
        np.testing.assert_array_equal(zoo.outputs(model, x), before)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("make", [kra.VeRA, kra.RandLoRA, kra.LoRA])
    def test_updates_that_are_not_finite(self, make, value):
        model, x = _model(make(3))
        weight = _adapter(model).trainable_variables[1]
        weight.assign(np.full(weight.shape, value))
        for arguments in ({}, {"rank": 2}, {"energy": 0.5}):
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                kra.to_lora(model, **arguments)
        assert type(_adapter(model)) is make

    def test_models(self):
        model, x, _ = zoo.dense()
        with pytest.raises(ValueError, match="has no adapter attached"):
            kra.to_lora(model)
        with pytest.raises(TypeError, match="must be a `keras.Model`"):
            kra.to_lora("model")
        kra.inject(model, kra.VeRA(3), "site")
        with kra.disabled(model):
            with pytest.raises(ValueError, match="inside a `disabled` block"):
                kra.to_lora(model)

        def convert(batch, logs=None):
            with pytest.raises(ValueError, match="is being trained"):
                kra.to_lora(model)

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=convert)
        zoo.fit(model, x, steps=1, callbacks=[callback])
