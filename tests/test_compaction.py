"""Smaller adapters that compute the same."""

import re

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import methods
from tests import zoo
from tests.test_sora import _adapted

pytestmark = pytest.mark.one_backend


def _close_gates(model, closed):
    adapters = model._randadapt.adapters("default").values()
    for adapter, places in zip(adapters, closed):
        gate = methods.numpy(adapter.gate)
        gate[places] = 0
        adapter.gate.assign(gate)


class TestCompact:
    @pytest.mark.every_backend
    def test_computes_the_same(self, tmp_path):
        model, x, _ = _adapted(alpha=6)
        _close_gates(model, [[0, 2], [1]])
        before = zoo.outputs(model, x)
        deltas = [
            methods.numpy(a.delta_kernel())
            for a in model._randadapt.adapters("default").values()
        ]
        kra.save_adapter(model, tmp_path / "before")
        bytes_before = (tmp_path / "before").stat().st_size
        report = kra.compact(model)
        methods.close(zoo.outputs(model, x), before)
        adapters = model._randadapt.adapters("default").values()
        assert [type(a) for a in adapters] == [kra.LoRA] * 2
        assert [a.rank for a in adapters] == [2, 3]
        assert report.adapter_parameters == 2 * (7 + 6) + 3 * (6 + 5)
        for adapter, delta in zip(adapters, deltas):
            methods.close(adapter.delta_kernel(), delta, 1e-6)
        kra.save_adapter(model, tmp_path / "after")
        assert (tmp_path / "after").stat().st_size < bytes_before
        # The file carries the ranks.
        after = zoo.outputs(model, x)
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "after")
        np.testing.assert_array_equal(zoo.outputs(model, x), after)

    def test_sites_without_a_rank_are_let_go(self):
        model, x, _ = _adapted()
        _close_gates(model, [[0, 1, 2, 3], [1]])
        before = zoo.outputs(model, x)
        report = kra.compact(model)
        assert len(report.sites) == 1 and len(kra.sites(model)) == 1
        assert type(model.get_layer("one")) is keras.layers.Dense
        methods.close(zoo.outputs(model, x), before)
        kra.eject(model)
        assert model.get_layer("one").trainable

    @pytest.mark.parametrize(
        "closed", [[[0, 1, 2, 3], [1]], [[0], [1]]], ids=str
    )
    @pytest.mark.parametrize("beside", [True, False])
    def test_the_weight_of_an_active_adapter(self, closed, beside):
        """Its variable is at the first site, which may be let go."""
        model, x, _ = _adapted()
        if beside:
            kra.inject(model, kra.LoRA(2), ["one"], name="other")
        base = zoo.outputs(model, x)
        _close_gates(model, closed)
        kra.set_active(model, {"default": 0.5})
        before = zoo.outputs(model, x)
        assert np.abs(before - base).max() > 1e-3
        kra.compact(model, "default")
        methods.close(zoo.outputs(model, x), before)
        assert kra.status(model)[0].weight == 0.5
        # Compiled functions and files know only the model's own variables.
        weights = [v for v in model.variables if "weight_default" in v.path]
        assert len(weights) == 1
        kra.set_active(model, {"default": 1.0})
        whole = zoo.outputs(model, x)
        kra.set_active(model, {"default": 0.5})
        methods.close(zoo.outputs(model, x), before)
        assert np.abs(whole - before).max() > 1e-3
        kra.eject(model)

    def test_nothing_left(self):
        model, x, _ = _adapted()
        _close_gates(model, [[0, 1, 2, 3]] * 2)
        before = zoo.outputs(model, x)
        with pytest.raises(ValueError, match="there would be nothing left"):
            kra.compact(model)
        np.testing.assert_array_equal(zoo.outputs(model, x), before)

    def test_goes_on_training(self):
        model, x, y = _adapted()
        _close_gates(model, [[0], [1]])
        model.compile("adam", "mse")
        model.fit(x, y, verbose=0)
        kra.compact(model)
        assert isinstance(model.optimizer, keras.optimizers.Adam)
        values = [methods.numpy(v) for v in model.trainable_variables]
        model.fit(x, y, verbose=0)
        for variable, value in zip(model.trainable_variables, values):
            assert np.any(methods.numpy(variable) != value)

    def test_whole_model_file(self, tmp_path):
        model, x, _ = _adapted()
        _close_gates(model, [[0, 2], [1]])
        kra.compact(model)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(
            zoo.outputs(loaded, x), zoo.outputs(model, x), rtol=1e-6
        )

    def test_one_of_two_adapters(self):
        model, x, _ = _adapted()
        kra.inject(model, kra.LoRA(2), ["one"], name="other")
        kra.set_active(model, ["default", "other"])
        zoo.randomize(model, "other")
        _close_gates(model, [[0, 1, 2, 3], [1]])
        before = zoo.outputs(model, x)
        with pytest.raises(ValueError, match="say which with `name`"):
            kra.compact(model)
        kra.compact(model, "default")
        methods.close(zoo.outputs(model, x), before)
        assert [x.name for x in kra.sites(model).values()] == ["one", "two"]

    def test_other_methods(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="has no adapter attached"):
            kra.compact(model)
        kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(TypeError, match="`LoRA` has no ranks to leave"):
            kra.compact(model)
        with pytest.raises(TypeError, match="`LoRA` does not order its ranks"):
            kra.truncate(model, 1)


class TestSiteRanks:
    def test_ranks_of_single_sites(self):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.LoRA(3), ["query", "value"])
        addresses = list(kra.sites(model))
        kra.eject(model)
        ranks = {addresses[0]: 1, addresses[3]: 5}
        template = kra.LoRA(3, site_ranks=ranks)
        kra.inject(model, template, ["query", "value"])
        adapters = model._randadapt.adapters("default").values()
        assert [a.rank for a in adapters] == [1, 3, 3, 5]
        config = template.get_config()
        assert kra.LoRA.from_config(config).get_config() == config

    def test_file_of_a_task_in_its_backbone(self, tmp_path):
        model, x, _ = zoo.pretrained_classifier()
        kra.inject(model, kra.LoRA(3), ["query", "value"])
        ranks = {list(kra.sites(model))[1]: 2}
        kra.eject(model)
        kra.inject(model, kra.LoRA(3, site_ranks=ranks), ["query", "value"])
        zoo.randomize(model)
        kra.save_adapter(model, tmp_path / "file")
        backbone, _, _ = zoo.bert()
        kra.load_adapter(backbone, tmp_path / "file")
        adapters = backbone._randadapt.adapters("default").values()
        assert [a.rank for a in adapters] == [3, 2, 3, 3]

    def test_a_key_means_one_site(self):
        """Also where its address is the end of another one."""
        inner = keras.Sequential([keras.layers.Dense(6)])
        model = keras.Sequential([inner, keras.layers.Dense(4)])
        model.build((None, 6))
        ranks = {"layers/dense": 1}
        kra.inject(model, kra.LoRA(3, site_ranks=ranks), "all-linear")
        adapters = model._randadapt.adapters("default")
        assert {a: one.rank for a, one in adapters.items()} == {
            "layers/sequential/layers/dense": 3,
            "layers/dense": 1,
        }

    def test_masks_of_larger_ranks(self):
        ranks = {"layers/dense": 3}
        template = kra.RMLoRA(2, update_rank=2, site_ranks=ranks)
        optimizer = keras.optimizers.SGD()
        wrapped = template.wrap_optimizer(optimizer, "default")
        assert isinstance(wrapped, kra.optimizers.MaskedGradient)
        template = kra.RMLoRA(2, update_rank=2)
        assert template.wrap_optimizer(optimizer, "default") is optimizer

    def test_nested_site_of_the_same_name(self):
        """The address of one site is the end of another's."""
        inner = keras.Sequential(
            [keras.layers.Dense(6), keras.layers.Dense(6, name="deep")]
        )
        model = keras.Sequential([inner, keras.layers.Dense(4)])
        model.build((None, 6))
        kra.inject(model, kra.LoRA(3), "all-linear")
        outer = [a for a in kra.sites(model) if "sequential" not in a]
        nested = [a for a in kra.sites(model) if a.endswith(f"/{outer[0]}")]
        assert len(outer) == 1 and len(nested) == 1
        kra.eject(model)
        ranks = {outer[0]: 1, nested[0]: 2}
        for order in (ranks, dict(reversed(ranks.items()))):
            template = kra.LoRA(3, site_ranks=order)
            kra.inject(model, template, "all-linear")
            adapters = model._randadapt.adapters("default")
            assert {a: adapters[a].rank for a in ranks} == ranks
            kra.eject(model)

    def test_compact_with_a_nested_site(self):
        inner = keras.Sequential([keras.layers.Dense(6)])
        model = keras.Sequential([inner, keras.layers.Dense(4)])
        model.build((None, 6))
        kra.inject(model, kra.SoRA(3), "all-linear")
        zoo.randomize(model)
        # The outer site loses ranks, the nested one none.
        _close_gates(model, [[], [0, 2]])
        x = zoo.normal(5, 6)
        before = zoo.outputs(model, x)
        kra.compact(model)
        adapters = model._randadapt.adapters("default").values()
        assert [a.rank for a in adapters] == [3, 1]
        methods.close(zoo.outputs(model, x), before)

    @pytest.mark.parametrize(
        "template",
        [
            kra.LoRA(3, site_ranks={"layers/qurey": 2}),
            kra.DoRA(kra.LoRA(3, site_ranks={"layers/qurey": 2})),
        ],
        ids=lambda template: type(template).__name__,
    )
    def test_key_that_means_no_site(self, template):
        model, _, targets = zoo.dense()
        with pytest.raises(
            ValueError, match="matches no layer: 'layers/qurey'"
        ):
            kra.inject(model, template, targets)
        assert kra.sites(model) == {}

    def test_ranks_that_a_method_cannot_take(self):
        ranks = {"a": 1}
        with pytest.raises(ValueError, match="`DyLoRA` draws one rank"):
            kra.DyLoRA(4, site_ranks=ranks)
        with pytest.raises(ValueError, match="must be at most 1, the smallest"):
            kra.RMLoRA(4, site_ranks=ranks)
        with pytest.raises(ValueError, match="needs even ranks. Received: 1"):
            kra.LoRA(4, initialization="orthogonal", site_ranks=ranks)

    def test_bad_ranks(self):
        with pytest.raises(ValueError, match=r"`site_ranks\['x'\]` must be"):
            kra.LoRA(3, site_ranks={"x": 0})


class TestNamesInSiteRanks:
    """Keys of `site_ranks` are what `targets` takes, and layers."""

    @pytest.mark.parametrize(
        "key",
        [
            "query",
            re.compile("que"),
            lambda model: model.get_layer("query"),
            lambda model: kra.sites(model) or "query",
        ],
        ids=["name", "pattern", "layer", "nothing else"],
    )
    def test_keys(self, key, tmp_path):
        model, x, _ = zoo.classifier()
        key = key(model) if callable(key) else key
        template = kra.LoRA(3, site_ranks={key: 1})
        kra.inject(model, template, ["query", "value"])
        ranks = {
            a.path.partition("/")[0]: a.rank
            for a in model._randadapt.adapters("default").values()
        }
        assert ranks == {"query": 1, "value": 3}
        zoo.randomize(model)
        kra.save_adapter(model, tmp_path / "a")
        other, _, _ = zoo.classifier()
        kra.load_adapter(other, tmp_path / "a")
        np.testing.assert_array_equal(
            zoo.outputs(other, x), zoo.outputs(model, x)
        )

    @pytest.mark.parametrize("wrap", [lambda a: a, kra.DoRA])
    def test_clip(self, wrap):
        """A head of three classes takes no rank above three."""
        model, _, _ = zoo.classifier()
        with pytest.raises(ValueError, match="`rank` must be at most 3"):
            kra.inject(model, wrap(kra.LoRA(5)), "all-linear")
        kra.inject(model, wrap(kra.LoRA(5, site_ranks="clip")), "all-linear")
        adapters = model._randadapt.adapters("default").values()
        ranks = [getattr(a, "inner", a).rank for a in adapters]
        assert ranks == [5, 5, 3]

    @pytest.mark.parametrize(
        ("ranks", "error", "match"),
        [
            ("all", TypeError, 'names, patterns or layers to ranks, "clip"'),
            ({"no_such": 2}, ValueError, "`site_ranks` matches no layer"),
            ({"logits": 2}, ValueError, "a key that means no site: 'logits'"),
        ],
    )
    def test_bad_keys(self, ranks, error, match):
        model, _, _ = zoo.classifier()
        with pytest.raises(error, match=match):
            kra.inject(model, kra.LoRA(3, site_ranks=ranks), "query")
        assert kra.sites(model) == {}


class TestSiteAlphas:
    """Other alphas at some sites, by the same keys as those of `site_ranks`."""

    METHODS = {
        "lora": kra.LoRA,
        "rmlora": lambda rank, **kwargs: kra.RMLoRA(
            rank, update_rank=1, **kwargs
        ),
        "sora": kra.SoRA,
        "adalora": kra.AdaLoRA,
        "dylora": kra.DyLoRA,
        "lorafa": kra.LoRAFA,
        "nola": lambda rank, **kwargs: kra.NOLA(rank, num_bases=3, **kwargs),
        "randlora": kra.RandLoRA,
        "dora": lambda rank, **kwargs: kra.DoRA(kra.LoRA(rank, **kwargs)),
    }

    @pytest.mark.every_backend
    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_method_with_that_alpha_there(self, method, tmp_path):
        """Outputs are those of two templates, each at its own sites."""
        make = self.METHODS[method]
        mixed, x, _ = zoo.classifier()
        template = make(2, alpha=3, site_alphas={"value": 12})
        kra.inject(mixed, template, ["query", "value"])
        zoo.randomize(mixed)
        apart, _, _ = zoo.classifier()
        for target, alpha in (("query", 3), ("value", 12)):
            kra.inject(apart, make(2, alpha=alpha), target, name=target)
            zoo.randomize(apart, target)
        kra.set_active(apart, ["query", "value"])
        out = zoo.outputs(mixed, x)
        methods.close(out, zoo.outputs(apart, x))
        kra.save_adapter(mixed, tmp_path / "a")
        other, _, _ = zoo.classifier()
        kra.load_adapter(other, tmp_path / "a")
        np.testing.assert_array_equal(zoo.outputs(other, x), out)
        kra.merge(other)
        methods.close(zoo.outputs(other, x), out)

    @pytest.mark.parametrize(
        "key",
        [
            "query",
            re.compile("que"),
            lambda model: model.get_layer("query"),
            lambda model: "layers/dense",
        ],
        ids=["name", "pattern", "layer", "address"],
    )
    def test_keys(self, key):
        model, _, _ = zoo.classifier()
        key = key(model) if callable(key) else key
        template = kra.LoRA(2, site_alphas={re.compile("."): 4, key: 6})
        kra.inject(model, template, ["query", "value"])
        adapters = model._randadapt.adapters("default").values()
        assert [a.scaling for a in adapters] == [3, 2]
        config = model._randadapt.records["default"].template.get_config()
        assert config["site_alphas"] == {"layers/dense": 6, "layers/dense_1": 4}

    @pytest.mark.parametrize("rslora", [False, True])
    def test_of_sites_with_other_ranks(self, rslora):
        """An alpha is divided by the rank of its own site."""
        model, _, _ = zoo.classifier()
        template = kra.LoRA(
            4,
            alpha=8,
            rslora=rslora,
            site_ranks={"value": 1},
            site_alphas={"value": 3, "logits": 3},
        )
        with pytest.raises(ValueError, match="At 'layers/logits': `rank` must"):
            kra.inject(model, template, "all-linear")
        template = kra.LoRA(
            4,
            alpha=8,
            rslora=rslora,
            site_ranks={"value": 1, "logits": 3},
            site_alphas={"value": 3, "logits": 3},
        )
        again = kra.LoRA.from_config(template.get_config())
        for one in (template, again):
            kra.inject(model, one, "all-linear")
            adapters = model._randadapt.adapters("default").values()
            root = 0.5 if rslora else 1
            methods.close(
                [a.scaling for a in adapters],
                np.array([8 / 4**root, 3, 3 / 3**root]),
            )
            kra.eject(model)

    def test_clipped_ranks(self):
        model, _, _ = zoo.classifier()
        template = kra.LoRA(6, site_ranks="clip", site_alphas={"logits": 6})
        kra.inject(model, template, "all-linear")
        adapters = model._randadapt.adapters("default").values()
        assert [a.rank for a in adapters] == [6, 6, 3]
        assert [a.scaling for a in adapters] == [1, 1, 2]

    def test_roots_without_an_alpha_of_all_sites(self):
        model, _, _ = zoo.classifier()
        template = kra.LoRA(4, rslora=True, site_alphas={"query": 8})
        kra.inject(model, template)
        adapters = model._randadapt.adapters("default").values()
        assert [a.scaling for a in adapters] == [4, 1]

    def test_config_without_them(self):
        """Files without such an argument stay as they were, to the byte."""
        config = kra.LoRA(4, alpha=8, rslora=True).get_config()
        assert not {"site_alphas", "rslora", "site_ranks"} & set(config)
        for make in self.METHODS.values():
            assert "site_alphas" not in str(make(2).get_config())

    def test_file_of_a_task_in_its_backbone(self, tmp_path):
        model, _, _ = zoo.pretrained_classifier()
        pattern = re.compile("layer_0.*query")
        template = kra.LoRA(2, site_alphas={pattern: 6})
        kra.inject(model, template)
        kra.save_adapter(model, tmp_path / "file")
        backbone, _, _ = zoo.bert()
        kra.load_adapter(backbone, tmp_path / "file")
        adapters = backbone._randadapt.adapters("default").values()
        assert [a.scaling for a in adapters] == [3, 1, 1, 1]

    @pytest.mark.parametrize("rank", [None, 2])
    def test_compacted_and_truncated(self, rank):
        """The LoRA that they make has these scales too."""
        make = kra.SoRA if rank is None else kra.DyLoRA
        model, x, _ = zoo.classifier()
        kra.inject(model, make(4, alpha=4, site_alphas={"query": 8}))
        zoo.randomize(model)
        if rank is None:
            _close_gates(model, [[0, 2], [1]])
            before = zoo.outputs(model, x)
            kra.compact(model)
            methods.close(zoo.outputs(model, x), before)
        else:
            kra.truncate(model, rank)
        scalings = [
            a.scaling for a in model._randadapt.adapters("default").values()
        ]
        assert scalings == ([2, 1] if rank is None else [4, 2])

    @pytest.mark.parametrize(
        ("values", "error", "match"),
        [
            ("clip", TypeError, "to alphas, or `None`"),
            ([8], TypeError, "`site_alphas` must be a dict from names"),
            ({"query": "8"}, ValueError, r"`site_alphas\['query'\]` must be"),
            ({"no_such": 2}, ValueError, "`site_alphas` matches no layer"),
            (
                {"logits": 2},
                ValueError,
                r"`site_alphas` has a key that means no site: 'logits'. "
                r"Sites: \['query', 'value'\]",
            ),
        ],
    )
    def test_bad_values(self, values, error, match):
        model, _, _ = zoo.classifier()
        with pytest.raises(error, match=match):
            kra.inject(model, kra.LoRA(3, site_alphas=values))
        assert kra.sites(model) == {}

    def test_values_that_a_method_cannot_take(self):
        zero = {"query": 0}
        with pytest.raises(ValueError, match="which must not be 0"):
            kra.LoRA(2, initialization="pissa", site_alphas=zero)
        with pytest.raises(ValueError, match="which must not be 0"):
            kra.LoRAFA(2, precondition=True, site_alphas=zero)
        with pytest.raises(TypeError, match="`alpha_pattern` .`site_alphas`"):
            kra.LoRA(2, alpha_pattern=zero)
        with pytest.raises(TypeError, match="no argument `site_alphas`"):
            kra.VeRA(2, site_alphas=zero)
