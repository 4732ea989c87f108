"""Experts: one adapter each, computed as the layer computes them."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.model import file_conversion
from keras_randadapt.sites import lanes
from tests import methods
from tests import zoo

EXPERTS, TOKENS, DIM, HIDDEN = 3, 5, 6, 8

#: Every method that takes experts, with ranks that fit.
METHODS = {
    "lora": lambda **k: kra.LoRA(2, alpha=3, **k),
    "lora_pissa": lambda: kra.LoRA(2, initialization="pissa"),
    "lora_orthogonal": lambda: kra.LoRA(2, initialization="orthogonal"),
    "rmlora": lambda: kra.RMLoRA(2, alpha=3),
    "rlora": lambda: kra.RLoRA(5, scaling=2.0),
    "randlora": lambda: kra.RandLoRA(3),
    "randlora_hadamard": lambda: kra.RandLoRA(
        3, basis="hadamard", compute="materialized"
    ),
    "adalora": lambda: kra.AdaLoRA(2, alpha=3),
    "sora": lambda: kra.SoRA(2),
    "dylora": lambda: kra.DyLoRA(2),
    "lorafa": lambda: kra.LoRAFA(2),
    "nola": lambda: kra.NOLA(2, num_bases=3),
    "said": lambda: kra.SAID(20),
    "vera": lambda: kra.VeRA(5),
    "hydra": lambda: kra.Hydra(2, sequential_rank=3),
    "ia3": lambda: kra.IA3(),
    "miss": lambda: kra.MiSS(2),
    "shira": lambda: kra.SHiRA(2),
    "shira_magnitude": lambda: kra.SHiRA(2, mask="magnitude"),
    "fourierft": lambda: kra.FourierFT(7, scaling=20.0),
    "hira": lambda: kra.HiRA(2),
    "loha": lambda: kra.LoHa(2),
    "lokr": lambda: kra.LoKr(1),
    "oft": lambda: kra.OFT(4),
    "dora": lambda: kra.DoRA(kra.LoRA(2, alpha=3)),
    "dvora": lambda: kra.DoRA(kra.VeRA(5)),
}

_ADDITIVE = [
    name
    for name in METHODS
    if name not in ("hydra", "ia3", "hira", "oft", "dora", "dvora")
]
#: One of each way to compute runs on every backend.
_HEART = ("lora", "rlora", "randlora_hadamard", "dora", "dylora")


def _methods(names):
    for name in names:
        marks = [] if name in _HEART else [pytest.mark.one_backend]
        if name == "nola":
            reason = "TensorFlow traces the bases of every expert"
            marks.append(pytest.mark.cpu_seconds(25, reason=reason))
        yield pytest.param(name, marks=marks)


Bank = zoo.Experts


def make(bank=Bank, seed=0, **kwargs):
    inputs = keras.Input((DIM,))
    y = bank(name="experts", **kwargs)(inputs)
    y = keras.layers.Dense(2, name="out")(zoo.Mean()(y))
    model = keras.Model(inputs, y)
    for i, variable in enumerate(model.variables):
        variable.assign(0.5 * zoo.normal(*variable.shape, seed=seed + i))
    return model


def adapted(method="lora", targets="experts", **kwargs):
    model = make(**kwargs)
    kra.inject(model, METHODS[method](), targets)
    train(model)
    return model


def train(model, seed=5):
    for i, weight in enumerate(model.trainable_variables):
        value = np.array(keras.ops.convert_to_numpy(weight))
        weight.assign(value + 0.3 * zoo.normal(*weight.shape, seed=seed + i))


def inputs(seed=9):
    return zoo.normal(TOKENS, DIM, seed=seed)


def outputs(model, x=None):
    return methods.numpy(model(inputs() if x is None else x))


def bank_of(model):
    return model.get_layer("experts")


def kernels(model):
    bank = bank_of(model)
    return {
        "expert_up": methods.numpy(bank._expert_up),
        "down": methods.numpy(bank.down),
    }


def dense_outputs(model, merged):
    """What NumPy computes with the kernels `merged`, expert by expert."""
    kernels = merged["expert_up"], merged["down"]
    return zoo.experts_outputs(model, inputs(), *kernels)


class TestComputation:
    @pytest.mark.parametrize("method", _methods(_ADDITIVE))
    def test_each_expert_has_an_update_of_its_own(self, method):
        model = adapted(method)
        merged, deltas = kernels(model), {}
        for name in merged:
            adapter = bank_of(model).adapter[name].get("default")
            found = [
                methods.numpy(lane.delta_kernel())
                for lane in lanes.each(adapter)
            ]
            deltas[name] = np.stack(found)
            merged[name] = merged[name].astype("float64") + deltas[name]
        methods.close(outputs(model), dense_outputs(model, merged))
        for delta in deltas.values():
            assert np.abs(delta[0]).max() > 1e-6
            assert np.abs(delta[0] - delta[1]).max() > 1e-6

    def test_lora_from_its_own_weights(self):
        """The reference reads the weights and knows nothing of lanes."""
        model = adapted("lora")
        merged = kernels(model)
        for name in merged:
            adapter = bank_of(model).adapter[name].get("default")
            a, b = methods.numpy(adapter.lora_a), methods.numpy(adapter.lora_b)
            assert a.shape == (EXPERTS, merged[name].shape[1], 2)
            assert b.shape == (EXPERTS, 2, merged[name].shape[2])
            delta = 1.5 * np.einsum("eir,ero->eio", a, b)
            merged[name] = merged[name].astype("float64") + delta
        methods.close(outputs(model), dense_outputs(model, merged))

    def test_dora_from_its_own_weights(self):
        model = adapted("dora")
        merged = kernels(model)
        for name in merged:
            adapter = bank_of(model).adapter[name].get("default")
            inner = adapter.inner
            a, b = methods.numpy(inner.lora_a), methods.numpy(inner.lora_b)
            whole = merged[name].astype("float64") + 1.5 * np.einsum(
                "eir,ero->eio", a, b
            )
            norm = np.linalg.norm(whole, axis=1, keepdims=True)
            size = methods.numpy(adapter.magnitude)[:, None, :]
            merged[name] = size * whole / norm
        methods.close(outputs(model), dense_outputs(model, merged), 1e-4)

    @pytest.mark.parametrize("method", _HEART)
    def test_gradients(self, method):
        """A step of gradient descent moves weights by their derivatives."""
        model = adapted(method)
        weights = model.trainable_variables
        before = [methods.numpy(w) for w in weights]
        y = np.ones((TOKENS, 2), "float32")

        def loss():
            out = methods.numpy(model(inputs(), training=True))
            return np.mean((out.astype("float64") - y) ** 2)

        step = 1e-2
        model.compile(keras.optimizers.SGD(step), "mse")
        model.fit(inputs(), y, batch_size=TOKENS, verbose=0)
        found = [
            (old - methods.numpy(w)) / step for w, old in zip(weights, before)
        ]
        for weight, old, gradient in zip(weights, before, found):
            if method == "dora" or method == "dylora":
                # They define a gradient that is not that of the loss.
                assert np.all(np.abs(gradient).reshape(EXPERTS, -1).max(1) > 0)
                continue
            for other, value in zip(weights, before):
                other.assign(value)
            way = np.sign(gradient) + (gradient == 0)
            sides = []
            for size in (3e-3, -3e-3):
                weight.assign(old + size * way)
                sides.append(loss())
            slope = (sides[0] - sides[1]) / 6e-3
            np.testing.assert_allclose(
                np.sum(gradient * way), slope, rtol=2e-2, atol=1e-4
            )

    @pytest.mark.parametrize("method", _methods(METHODS))
    def test_life_of_an_adapter(self, method):
        """Equal at first, a step trains, blocks, and out bit for bit."""
        model = make()
        before = [methods.numpy(v) for v in model.variables]
        base = outputs(model)
        kra.inject(model, METHODS[method](), "experts")
        methods.close(outputs(model), base)
        model.compile(keras.optimizers.Adam(0.05), "mse")
        model.fit(inputs(), np.ones((TOKENS, 2)), epochs=2, verbose=0)
        trained = model.predict(inputs(), verbose=0)
        assert np.abs(trained - base).max() > 1e-5
        with kra.merged(model):
            methods.close(outputs(model), trained, 1e-4)
        with kra.disabled(model):
            np.testing.assert_array_equal(outputs(model), base)
        methods.close(outputs(model), trained)
        assert type(bank_of(model)) is not Bank
        kra.eject(model)
        assert type(bank_of(model)) is Bank
        assert not hasattr(bank_of(model), "adapter")
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(methods.numpy(variable), value)

    def test_a_product_that_is_not_known_uses_the_merged_kernel(self):
        model = adapted(bank=Unusual)
        trained = outputs(model)
        assert np.abs(trained - outputs(make(bank=Unusual))).max() > 1e-2
        with kra.merged(model):
            methods.close(outputs(model), trained, 1e-5)

    @pytest.mark.one_backend
    def test_dropout_needs_a_product_that_is_known(self):
        model = make(bank=Unusual)
        kra.inject(model, kra.LoRA(2, dropout=0.5), "experts")
        outputs(model)
        with pytest.raises(ValueError, match="`dropout` would be missed"):
            model(inputs(), training=True)

    def test_dropout(self):
        model = make()
        kra.inject(model, kra.LoRA(2, dropout=0.5), "experts")
        train(model)
        first = methods.numpy(model(inputs(), training=True))
        second = methods.numpy(model(inputs(), training=True))
        assert np.abs(first - second).max() > 1e-4
        np.testing.assert_array_equal(outputs(model), outputs(model))

    def test_16_bits(self):
        model = adapted()
        expected = outputs(model)
        half = make(dtype="bfloat16")
        kra.inject(half, METHODS["lora"](), "experts")
        train(half)
        assert np.abs(outputs(half).astype("float32") - expected).max() < 0.2

    def test_weights_of_adapters(self):
        model = adapted()
        base = outputs(make())
        whole = outputs(model)
        kra.set_active(model, {"default": 0.0})
        methods.close(outputs(model), base)
        kra.set_active(model, {"default": 1.0})
        methods.close(outputs(model), whole)


@keras.saving.register_keras_serializable(package="test_experts")
class Unusual(Bank):
    """The same, by products that are no einsum with the kernel."""

    def call(self, x):
        up = [x @ self._expert_up[e] for e in range(self.num_experts)]
        up = keras.activations.silu(keras.ops.stack(up))
        down = keras.ops.transpose(self.down, (0, 2, 1))
        y = keras.ops.einsum("eti,eoi->eto", up, down)
        return y + self.down_bias[:, None, :]


@keras.saving.register_keras_serializable(package="test_experts")
class Quantizable(Bank):
    """A bank that has a quantized form of its own."""

    def quantize(self, mode=None, type_check=True, config=None):
        kernel = methods.numpy(self.down)
        scale = np.abs(kernel).max(axis=1, keepdims=True) / 127
        self.down = self.add_weight(
            shape=kernel.shape, dtype="int8", name="down", trainable=False
        )
        self.down.assign(np.round(kernel / scale))
        self.scale = self.add_weight(
            shape=scale.shape, name="scale", trainable=False
        )
        self.scale.assign(scale)
        self._is_quantized = True
        self.dtype_policy = keras.dtype_policies.get(f"{mode}_from_float32")

    def quantized_call(self, x):
        up = keras.ops.einsum("th,ehm->etm", x, self._expert_up)
        down = keras.ops.cast(self.down, "float32")
        y = keras.ops.einsum("eti,eio->eto", keras.activations.silu(up), down)
        return y * self.scale + self.down_bias[:, None, :]


class TestSites:
    @pytest.mark.one_backend
    @pytest.mark.parametrize("targets", ["experts", "down", "all-linear"])
    def test_a_bank_that_is_quantized_is_refused(self, targets):
        """Its kernels are integers, which know nothing of their scale."""
        model = make(bank=Quantizable)
        before = outputs(model)
        model.quantize("int8", filters="experts")
        quantized = outputs(model)
        assert 0 < np.abs(quantized - before).max() < 0.1
        experts = {"experts": True} if targets == "all-linear" else {}
        with pytest.raises(ValueError, match="quantized to 'int8'.*`filters`"):
            kra.inject(model, kra.LoRA(2), targets, **experts)
        assert kra.sites(model) == {}
        np.testing.assert_array_equal(outputs(model), quantized)

    def test_addresses_are_those_of_the_kernels(self):
        model = make()
        report = kra.inject(model, METHODS["lora"](), "experts")
        addresses = ["layers/experts/expert_up", "layers/experts/down"]
        assert report.sites == addresses
        assert kra.sites(model) == dict.fromkeys(addresses, bank_of(model))
        each = 2 * (DIM + HIDDEN)
        assert report.adapter_parameters == 2 * EXPERTS * each

    @pytest.mark.one_backend
    @pytest.mark.parametrize(
        "targets, expected",
        [
            ("experts", ["expert_up", "down"]),
            ("down", ["down"]),
            ("experts/down", ["down"]),
            ("layers/experts/expert_up", ["expert_up"]),
            (lambda layer: isinstance(layer, Bank), ["expert_up", "down"]),
        ],
    )
    def test_targets(self, targets, expected):
        model = make()
        kra.inject(model, METHODS["lora"](), targets)
        assert list(bank_of(model).adapter) == expected
        methods.close(outputs(model), outputs(make()))

    @pytest.mark.one_backend
    def test_all_linear_takes_experts_if_asked(self):
        model = make()
        with pytest.warns(kra.AdapterWarning, match="leaves out"):
            report = kra.inject(model, kra.LoRA(2), "all-linear")
        assert report.sites == ["layers/dense"]
        assert report.left_out == {"layers/experts": 2 * EXPERTS * DIM * HIDDEN}
        model = make()
        report = kra.inject(model, kra.LoRA(2), "all-linear", experts=True)
        assert len(report.sites) == 3 and report.left_out == {}
        model = make()
        report = kra.inject(
            model, kra.LoRA(2), "all-linear", experts=True, exclude="down"
        )
        assert report.sites == ["layers/experts/expert_up", "layers/dense"]

    @pytest.mark.one_backend
    @pytest.mark.parametrize(
        "kwargs, error, match",
        [
            (dict(targets="experts", experts=True), ValueError, "all-linear"),
            (dict(targets="all-linear", experts=1), TypeError, "bool"),
            (dict(targets="out", keep_trainable="down"), ValueError, "kernels"),
            (dict(targets="experts", adapter=kra.BitFit()), ValueError, "bias"),
            (
                dict(targets="experts", adapter=kra.Bottleneck(2)),
                ValueError,
                "experts.* is none",
            ),
            (
                dict(targets="experts", adapter=kra.LoRA(7)),
                ValueError,
                "rank",
            ),
            (
                dict(
                    targets="experts",
                    adapter=kra.DoRA(kra.LoRA(2, dropout=0.1)),
                ),
                ValueError,
                "dropout",
            ),
        ],
    )
    def test_bad_inputs(self, kwargs, error, match):
        model = make()
        adapter = kwargs.pop("adapter", kra.LoRA(2))
        with pytest.raises(error, match=match):
            kra.inject(model, adapter, **kwargs)
        assert kra.sites(model) == {} and type(bank_of(model)) is Bank

    @pytest.mark.one_backend
    def test_a_model_without_experts(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
        with pytest.raises(ValueError, match="finds no layer"):
            kra.inject(model, kra.LoRA(2), "all-linear", experts=True)

    @pytest.mark.one_backend
    def test_one_kernel_is_left_while_another_stays(self):
        model = make()
        kra.inject(model, kra.LoRA(2), "down")
        kra.inject(model, kra.LoRA(2), "experts", name="both")
        kra.eject(model, "both")
        assert list(bank_of(model).adapter) == ["down"]
        kra.eject(model, "default")
        assert type(bank_of(model)) is Bank


class TestFiles:
    @pytest.mark.parametrize("method", _methods(["lora", "rlora", "dora"]))
    def test_adapter_file(self, method, tmp_path):
        model = adapted(method)
        path = str(tmp_path / "adapter.safetensors")
        kra.save_adapter(model, path)
        other = make()
        kra.load_adapter(other, path)
        methods.close(outputs(other), outputs(model), 1e-6)

    @pytest.mark.one_backend
    def test_file_of_another_number_of_experts(self, tmp_path):
        path = str(tmp_path / "adapter.safetensors")
        kra.save_adapter(adapted(), path)
        with pytest.raises(ValueError, match="3x6x8 in the file, 2x6x8 here"):
            kra.load_adapter(make(num_experts=2), path)

    @pytest.mark.one_backend
    def test_a_file_is_not_converted_without_the_model(self, tmp_path):
        path = str(tmp_path / "adapter.safetensors")
        kra.save_adapter(adapted("rlora"), path)
        with pytest.raises(ValueError, match="adapts the experts"):
            file_conversion.convert_file(
                path, str(tmp_path / "lora.safetensors")
            )

    def test_keras_files(self, tmp_path):
        model = adapted()
        model.save(tmp_path / "model.keras")
        other = keras.saving.load_model(tmp_path / "model.keras")
        methods.close(outputs(other), outputs(model), 1e-6)
        path = str(tmp_path / "model.weights.h5")
        model.save_weights(path)
        third = make(seed=50)
        kra.inject(third, METHODS["lora"](), "experts")
        third.load_weights(path)
        methods.close(outputs(third), outputs(model), 1e-6)

    @pytest.mark.one_backend
    def test_weights_file_of_another_adapter(self, tmp_path):
        path = str(tmp_path / "model.weights.h5")
        adapted().save_weights(path)
        other = make()
        kra.inject(other, kra.LoRA(2, seed=1), "experts")
        with pytest.raises(ValueError, match="other adapters"):
            other.load_weights(path)


@pytest.mark.filterwarnings("ignore:At 2 of 2 sites the LoRA is larger")
class TestConversions:
    @pytest.mark.one_backend
    def test_a_bank_of_adapters_refuses_experts(self, tmp_path):
        path = str(tmp_path / "adapter.safetensors")
        kra.save_adapter(adapted(), path)
        with pytest.raises(ValueError, match="In a bank a site must have one"):
            kra.serving.AdapterBank(make(), {"one": path})
        kra.save_adapter(adapted("vera"), path)
        with pytest.raises(ValueError, match="In a bank that must be"):
            kra.serving.AdapterBank(make(), {"one": path})

    @pytest.mark.parametrize("method", _methods(["rlora", "randlora"]))
    def test_to_lora(self, method):
        model = adapted(method)
        expected = outputs(model)
        report = kra.to_lora(model)
        assert max(report.energy_lost.values()) < 1e-9
        methods.close(outputs(model), expected, 1e-4)

    @pytest.mark.one_backend
    def test_to_lora_of_a_rank(self):
        model = adapted("randlora")
        adapter = bank_of(model).adapter["down"].get("default")
        whole = [methods.numpy(x.delta_kernel()) for x in lanes.each(adapter)]
        report = kra.to_lora(model, rank=2)
        adapter = bank_of(model).adapter["down"].get("default")
        lost = 0.0
        for one, delta in zip(lanes.each(adapter), whole):
            u, s, v = np.linalg.svd(delta.astype("float64"))
            closest = (u[:, :2] * s[:2]) @ v[:2]
            methods.close(one.delta_kernel(), closest, 1e-4)
            lost += np.sum(s[2:] ** 2)
        energy = sum(np.sum(d.astype("float64") ** 2) for d in whole)
        got = report.energy_lost["layers/experts/down"]
        np.testing.assert_allclose(got, lost / energy, rtol=1e-3)

    @pytest.mark.one_backend
    def test_combine(self):
        model = adapted()
        kra.inject(model, METHODS["rlora"](), "experts", name="other")
        kra.set_active(model, "other")
        train(model, seed=30)
        kra.set_active(model, {"default": 0.7, "other": 0.3})
        expected = outputs(model)
        kra.combine(model, {"default": 0.7, "other": 0.3}, name="both")
        kra.set_active(model, "both")
        methods.close(outputs(model), expected, 1e-4)

    @pytest.mark.one_backend
    def test_compact(self):
        model = adapted("adalora")
        gate = bank_of(model).adapter["down"].get("default").gate
        value = methods.numpy(gate)
        value[0] = 0
        gate.assign(value)
        expected = outputs(model)
        kra.compact(model)
        methods.close(outputs(model), expected, 1e-5)

    @pytest.mark.one_backend
    def test_merge(self):
        model = adapted()
        expected = outputs(model)
        kra.merge(model)
        assert type(bank_of(model)) is Bank
        methods.close(outputs(model), expected, 1e-5)

    @pytest.mark.one_backend
    def test_statistics_are_of_each_expert(self):
        table = kra.analysis.delta_statistics(adapted())
        assert len(table["site"]) == 2 * EXPERTS
        assert list(table["rank"]) == [2] * (2 * EXPERTS)

    @pytest.mark.one_backend
    def test_rank_budget_counts_the_ranks_of_experts(self):
        model = make()
        kra.inject(model, kra.AdaLoRA(2), "experts")
        model.compile(keras.optimizers.Adam(0.01), "mse")
        budget = kra.callbacks.RankBudget(1, interval=1)
        y = np.ones((TOKENS, 2))
        model.fit(
            inputs(), y, epochs=10, callbacks=[budget], verbose=0, batch_size=5
        )
        gates = [
            methods.numpy(bank_of(model).adapter[name].get("default").gate)
            for name in ("expert_up", "down")
        ]
        assert sum(np.count_nonzero(gate) for gate in gates) == 2 * EXPERTS
