"""Adapters that are combined, against sums of dense updates in float64."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import methods
from tests import zoo
from tests.matrices import test_merging
from tests.test_to_lora import LARGER
from tests.test_to_lora import METHODS as REFERENCES

pytestmark = pytest.mark.one_backend

#: By name: the template and its dense update.
ADAPTERS = {
    "lora": (lambda: kra.LoRA(2, alpha=3), REFERENCES["lora"][1]),
    "rlora": (lambda: kra.RLoRA(3, scaling=2.0), REFERENCES["rlora"][1]),
    "randlora": (lambda: kra.RandLoRA(3), REFERENCES["randlora"][1]),
    "vera": (lambda: kra.VeRA(4, scaling=5.0), REFERENCES["vera"][1]),
    "pissa": (
        lambda: kra.LoRA(2, initialization="pissa"),
        REFERENCES["pissa"][1],
    ),
    "said": (lambda: kra.SAID(9), REFERENCES["said"][1]),
}
WEIGHTS = {"lora": 0.7, "rlora": -0.3}


def _plain():
    inputs = keras.Input((14,))
    x = keras.layers.Dense(16, activation="tanh", name="a")(inputs)
    x = keras.layers.Dense(12, activation="tanh", name="b")(x)
    x = keras.layers.Dense(10, activation="tanh", name="c")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    return zoo.set_weights(model), zoo.normal(8, 14)


def _model(targets=None, kept=(), names=("lora", "rlora")):
    """A model with adapters of these names at these targets."""
    targets = targets or {}
    model, x = _plain()
    for i, name in enumerate(names):
        kra.inject(
            model,
            ADAPTERS[name][0](),
            targets.get(name, ["a", "b"]),
            name=name,
            keep_trainable="head" if name in kept else None,
        )
        zoo.randomize(model, name, seed=i)
    return model, x


def _dense(model, name):
    """dict from address to the update, of one adapter."""
    return {
        address: ADAPTERS[name][1](adapter)
        for address, adapter in model._randadapt.adapters(name).items()
    }


def _updates(model, name):
    return {
        address: methods.numpy(adapter.delta_kernel())
        for address, adapter in model._randadapt.adapters(name).items()
    }


def _sum(dense, weights, address):
    return sum(
        weight * dense[name][address]
        for name, weight in weights.items()
        if address in dense[name]
    )


def _summary(model, x):
    """All that must not change where a combination is refused."""
    return (
        zoo.outputs(model, x),
        sorted(model._randadapt.records),
        [methods.numpy(weight).copy() for weight in model.weights],
    )


def _check_unchanged(model, x, before):
    after = _summary(model, x)
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1] == before[1] and len(after[2]) == len(before[2])
    for now, then in zip(after[2], before[2]):
        np.testing.assert_array_equal(now, then)


class TestMethods:
    @LARGER
    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "weights",
        [
            {"lora": 0.7, "rlora": 0.3},
            {"lora": 1.0, "randlora": -2.0},
            {"pissa": 0.5, "vera": 0.25, "said": 1.5},
            {"vera": -0.5},
        ],
        ids=str,
    )
    def test_linear(self, weights):
        model, x = _model(names=tuple(weights))
        dense = {name: _dense(model, name) for name in weights}
        report = kra.combine(model, weights, name="both")
        for address, update in _updates(model, "both").items():
            methods.close(update, _sum(dense, weights, address), 3e-6)
            assert report.energy_lost[address] < 1e-13
        known = {"lora": 2, "rlora": 3, "pissa": 4, "vera": 4}
        if set(weights) <= set(known):
            rank = sum(known[name] for name in weights)
            assert set(report.ranks.values()) == {rank}

    def test_linear_of_a_rank(self):
        model, x = _model()
        dense = {name: _dense(model, name) for name in WEIGHTS}
        report = kra.combine(model, WEIGHTS, "both", rank=2)
        for address, update in _updates(model, "both").items():
            u, s, v = np.linalg.svd(_sum(dense, WEIGHTS, address))
            methods.close(update, (u[:, :2] * s[:2]) @ v[:2])
            lost = np.sum(s[2:] ** 2) / np.sum(s**2)
            assert report.energy_lost[address] == pytest.approx(lost, rel=1e-4)
            assert report.ranks[address] == 2

    def test_linear_of_factors_in_common(self):
        """LoRA-FA's first factor is the same in both, so the rank is too."""
        model, x = _plain()
        for i, name in enumerate(["one", "two"]):
            kra.inject(model, kra.LoRAFA(2), ["a", "b"], name=name)
            zoo.randomize(model, name, seed=i)
        report = kra.combine(model, {"one": 1.0, "two": 1.0}, "both")
        assert set(report.ranks.values()) == {2}

    def test_a_sum_of_nothing(self):
        model, x = _model()
        kra.set_active(model, [])
        base = zoo.outputs(model, x)
        kra.combine(model, {"lora": 0.0, "rlora": 0.0}, "both")
        kra.set_active(model, "both")
        np.testing.assert_array_equal(zoo.outputs(model, x), base)

    def test_concat(self):
        model, x = _model()
        adapters = {n: model._randadapt.adapters(n) for n in WEIGHTS}
        dense = {name: _dense(model, name) for name in WEIGHTS}
        report = kra.combine(model, WEIGHTS, "both", "concat")
        for address, both in model._randadapt.adapters("both").items():
            assert report.ranks[address] == both.rank == 5
            assert report.energy_lost[address] == 0
            methods.close(
                both.delta_kernel(), _sum(dense, WEIGHTS, address), 3e-6
            )
            np.testing.assert_array_equal(
                methods.numpy(both.lora_a)[:, :2],
                methods.numpy(adapters["lora"][address].lora_a),
            )

    def test_svd(self):
        """Its rank is the largest of the adapters at the site."""
        model, x = _model({"rlora": ["b", "c"]})
        dense = {name: _dense(model, name) for name in WEIGHTS}
        report = kra.combine(model, WEIGHTS, "both", "svd")
        assert list(report.ranks.values()) == [2, 3, 3]
        for address, update in _updates(model, "both").items():
            rank = report.ranks[address]
            u, s, v = np.linalg.svd(_sum(dense, WEIGHTS, address))
            methods.close(update, (u[:, :rank] * s[:rank]) @ v[:rank])

    @LARGER
    @pytest.mark.parametrize("density", [None, 0.5, 1])
    def test_ties(self, density):
        # Entries of these have no equal sizes, of which some would be kept.
        weights = {"lora": 0.7, "vera": -0.3, "randlora": 1.1}
        model, x = _model(names=tuple(weights))
        dense = {name: _dense(model, name) for name in weights}
        kra.combine(model, weights, "both", "ties", density=density)
        for address, update in _updates(model, "both").items():
            expected = test_merging.ties(
                [one[address] for one in dense.values()],
                list(weights.values()),
                density or 0.2,
            )
            assert np.any(expected)
            methods.close(update, expected, 2e-6)

    @LARGER
    @pytest.mark.parametrize("density", [None, 0.4])
    def test_dare(self, density):
        weights = {"lora": 0.7, "randlora": -0.3}
        model, x = _model(names=tuple(weights))
        dense = {name: _dense(model, name) for name in weights}
        kra.combine(
            model, weights, "both", "dare", density=density, seed=np.int64(3)
        )
        kept = density or 0.1
        for address, update in _updates(model, "both").items():
            expected = 0.0
            for name, weight in weights.items():
                delta = dense[name][address]
                drawn = random.uniforms(
                    3, f"dare/{address}/{name}", delta.shape
                )
                mask = (drawn < kept).astype("float64")
                assert 0 < mask.sum() < mask.size
                expected = expected + weight * mask * delta / kept
            methods.close(update, expected, 2e-6)

    @LARGER
    def test_dare_of_other_seeds(self):
        model, x = _model()
        for name, seed in (("one", 1), ("again", 1), ("two", 2)):
            kra.combine(model, WEIGHTS, name, "dare", density=0.5, seed=seed)
        one, again, two = (
            _updates(model, name) for name in ("one", "again", "two")
        )
        for address in one:
            np.testing.assert_array_equal(one[address], again[address])
            assert np.abs(one[address] - two[address]).max() > 0.1

    @pytest.mark.parametrize("method", ["ties", "dare"])
    def test_a_rank_shortens_them(self, method):
        model, x = _model()
        report = kra.combine(model, WEIGHTS, "both", method, rank=3)
        assert set(report.ranks.values()) == {3}
        assert all(0 < lost < 1 for lost in report.energy_lost.values())


@LARGER
@pytest.mark.every_backend
@pytest.mark.parametrize(
    "site",
    [
        "einsum_output",
        "einsum_shared",
        "conv2d_grouped",
        "embedding",
        "reversible_embedding",
        "dense_int8",
        "dense_int4",
        "einsum_int8",
        "embedding_int8",
        "reversible_embedding_int4",
    ],
)
def test_every_kind_of_site(site):
    """The combination computes what both compute together."""
    model, x, targets = zoo.ALL[site]()
    for i, name in enumerate(["vera", "randlora"]):
        kra.inject(model, ADAPTERS[name][0](), targets, name=name)
        zoo.randomize(model, name, seed=i)
    kra.set_active(model, ["vera", "randlora"])
    both = zoo.outputs(model, x)
    dense = {name: _dense(model, name) for name in ("vera", "randlora")}
    kra.combine(model, {"vera": 1, "randlora": 1}, "sum")
    kra.set_active(model, "sum")
    methods.close(zoo.outputs(model, x), both)
    kra.combine(model, {"vera": 2, "randlora": -1}, "other")
    for address, update in _updates(model, "other").items():
        expected = _sum(dense, {"vera": 2, "randlora": -1}, address)
        methods.close(update, expected, 3e-6)


class TestAttached:
    @pytest.mark.every_backend
    def test_sites_are_those_of_all(self):
        model, x = _model({"rlora": ["b", "c"]})
        dense = {name: _dense(model, name) for name in WEIGHTS}
        report = kra.combine(model, WEIGHTS, "both")
        layers = [model._randadapt.layers[a].name for a in report.sites]
        assert layers == ["a", "b", "c"]
        assert list(report.ranks.values()) == [2, 5, 3]
        for address, update in _updates(model, "both").items():
            methods.close(update, _sum(dense, WEIGHTS, address), 3e-6)

    def test_is_attached_beside_the_others_and_inactive(self, tmp_path):
        model, x = _model()
        model.compile("adam", "mse")
        before = zoo.outputs(model, x)
        weights = [methods.numpy(w).copy() for w in model.weights]
        kra.combine(model, WEIGHTS, name="both")
        assert model._randadapt.active == ("lora",)
        np.testing.assert_array_equal(zoo.outputs(model, x), before)
        after = {id(w): methods.numpy(w) for w in model.weights}
        assert len(after) == len(weights) + 4
        kra.set_active(model, "both")
        trained = {v.path.rpartition("/")[2] for v in model.trainable_weights}
        assert trained == {"lora_a", "lora_b"}
        both = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "both.safetensors", "both")
        model.fit(x, zoo.normal(8, 3), verbose=0)
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "both.safetensors")
        np.testing.assert_array_equal(zoo.outputs(model, x), both)

    def test_eject_all(self):
        model, x = _plain()
        base = zoo.outputs(model, x)
        for name in WEIGHTS:
            kra.inject(model, ADAPTERS[name][0](), ["a", "b"], name=name)
            zoo.randomize(model, name)
        kra.combine(model, WEIGHTS, name="both")
        kra.set_active(model, "both")
        kra.eject(model)
        np.testing.assert_array_equal(zoo.outputs(model, x), base)


def _head(model):
    return methods.numpy(model.get_layer("head").kernel).copy()


def _train_heads(model, names):
    """Gives the heads of these adapters kernels of their own."""
    found = {}
    for i, name in enumerate(names):
        kra.set_active(model, name)
        found[name] = zoo.normal(10, 3, seed=10 + i)
        model.get_layer("head").kernel.assign(found[name])
    return found


class TestHeads:
    @pytest.mark.parametrize("active", ["lora", "rlora"])
    def test_the_only_head(self, active):
        model, x = _model(kept=["rlora"])
        base = _head(model)
        heads = _train_heads(model, ["rlora"])
        kra.set_active(model, active)
        kra.combine(model, WEIGHTS, name="both")
        kra.set_active(model, "both")
        np.testing.assert_array_equal(_head(model), heads["rlora"])
        # Each adapter has weights of its own from here on.
        model.get_layer("head").kernel.assign(np.ones((10, 3)))
        kra.set_active(model, "rlora")
        np.testing.assert_array_equal(_head(model), heads["rlora"])
        kra.set_active(model, "lora")
        np.testing.assert_array_equal(_head(model), base)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("chosen", ["lora", "rlora"])
    def test_one_of_two_heads(self, chosen):
        model, x = _model(kept=["lora", "rlora"])
        heads = _train_heads(model, ["lora", "rlora"])
        before = _summary(model, x)
        with pytest.raises(ValueError, match="Choose one .* `heads_from`"):
            kra.combine(model, WEIGHTS, name="both")
        _check_unchanged(model, x, before)
        report = kra.combine(model, WEIGHTS, "both", heads_from=chosen)
        assert report.head_parameters == 33
        np.testing.assert_array_equal(_head(model), heads["rlora"])
        kra.set_active(model, "both")
        np.testing.assert_array_equal(_head(model), heads[chosen])

    def test_heads_from_what_has_none(self):
        model, x = _model(kept=["lora"])
        before = _summary(model, x)
        with pytest.raises(ValueError, match="'rlora', which keeps no layer"):
            kra.combine(model, WEIGHTS, "both", heads_from="rlora")
        with pytest.raises(ValueError, match="must be one of the combined"):
            kra.combine(model, WEIGHTS, "both", heads_from="other")
        _check_unchanged(model, x, before)


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            (dict(weights={}), ValueError, "must name at least one adapter"),
            (dict(weights=["lora", "rlora"]), TypeError, "must be a dict"),
            (dict(weights={"lora": 1, "no": 1}), ValueError, "called 'no'"),
            (dict(weights={"lora": np.nan}), ValueError, "finite number"),
            (dict(weights={"lora": np.inf}), ValueError, "finite number"),
            (dict(weights={"lora": "1"}), ValueError, r"`weights\['lora'\]`"),
            (dict(weights={"lora": 1e39}), ValueError, "NaN or infinity"),
            (dict(name="lora"), ValueError, "called 'lora' already"),
            (dict(name="a b"), ValueError, "must consist of letters"),
            (dict(method="cat"), ValueError, "`method` must be one of"),
            (dict(rank=13), ValueError, "at most 12, the smaller dimension"),
            (dict(rank=0), ValueError, "at least 1"),
            (dict(rank=2.5), TypeError, "must be an integer"),
            (dict(rank=2, method="concat"), ValueError, "takes no `rank`"),
            (dict(density=0.5), ValueError, r"for the methods \['dare'"),
            (dict(density=0, method="ties"), ValueError, "above 0 and at"),
            (dict(density=1.1, method="dare"), ValueError, "above 0 and at"),
            (dict(density=np.nan, method="ties"), ValueError, "above 0 and"),
            (dict(density="1", method="dare"), ValueError, "above 0 and at"),
            (dict(seed=-1, method="dare"), ValueError, "`seed` must be"),
            (dict(verbose="no"), ValueError, "`verbose` must be one of"),
        ],
        ids=str,
    )
    def test_arguments(self, arguments, error, message):
        model, x = _model()
        before = _summary(model, x)
        with pytest.raises(error, match=message):
            kra.combine(
                model, **{"weights": WEIGHTS, "name": "both", **arguments}
            )
        _check_unchanged(model, x, before)

    def test_no_site_in_common(self):
        model, x = _model({"lora": "a", "rlora": ["b", "c"]})
        before = _summary(model, x)
        with pytest.raises(ValueError, match="share no site.*set_active"):
            kra.combine(model, WEIGHTS, name="both")
        _check_unchanged(model, x, before)
        # One adapter by itself is only scaled.
        kra.combine(model, {"lora": 0.5}, name="half")

    def test_ranks_that_are_not_known(self):
        model, x = _model(names=("lora", "randlora"))
        weights = {"lora": 1.0, "randlora": 1.0}
        before = _summary(model, x)
        for method, remedy in (("concat", "linear"), ("svd", "give `rank`")):
            with pytest.raises(ValueError, match=f"'randlora'.*{remedy}"):
                kra.combine(model, weights, "both", method)
        _check_unchanged(model, x, before)
        kra.combine(model, weights, "both", "svd", rank=3)

    def test_ranks_that_add_up_to_too_much(self):
        model, x = _model(names=("rlora", "vera", "pissa"))
        kra.inject(model, kra.LoRA(4), ["b", "c"], name="more")
        zoo.randomize(model, "more")
        weights = {"rlora": 1.0, "vera": 1.0, "pissa": 1.0, "more": 1.0}
        before = _summary(model, x)
        with pytest.raises(ValueError, match='add up to 15.*"linear"'):
            kra.combine(model, weights, "both", "concat")
        _check_unchanged(model, x, before)

    @pytest.mark.parametrize(
        "make", [lambda: kra.DoRA(kra.LoRA(2)), kra.IA3, kra.Bottleneck]
    )
    def test_methods_that_are_more_than_a_delta(self, make):
        model, x = _model()
        kra.inject(model, make(), ["a", "b"], name="other")
        before = _summary(model, x)
        with pytest.raises(ValueError, match="'other' is a"):
            kra.combine(model, {"lora": 1.0, "other": 1.0}, name="both")
        _check_unchanged(model, x, before)

    @pytest.mark.parametrize("method", ["linear", "concat", "svd", "ties"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_updates_that_are_not_finite(self, value, method):
        model, x = _model()
        (first, _) = model._randadapt.adapters("rlora").values()
        first.beta.assign(np.full(16, value))
        with pytest.raises(ValueError, match="by the adapter 'rlora' holds Na"):
            kra.combine(model, WEIGHTS, "both", method)
        assert sorted(model._randadapt.records) == ["lora", "rlora"]

    def test_models(self):
        model, x = _plain()
        with pytest.raises(ValueError, match="has no adapter attached"):
            kra.combine(model, WEIGHTS, name="both")
        model, x = _model()
        with kra.merged(model):
            with pytest.raises(ValueError, match="inside a `merged` block"):
                kra.combine(model, WEIGHTS, name="both")
