"""Which layers `targets`, `exclude` and `keep_trainable` mean."""

import re

import keras
import pytest
from keras import layers

import keras_randadapt as kra
from keras_randadapt.sites import addresses
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")

LORA = kra.LoRA(2)


def _names(model):
    return [layer.path for layer in kra.sites(model).values()]


def _inject(builder, *args, **kwargs):
    model = builder()[0]
    kra.inject(model, LORA, *args, **kwargs)
    return _names(model)


class TestTargets:
    def test_default_is_query_and_value(self):
        assert _inject(zoo.bert) == [
            f"transformer_layer_{i}/self_attention_layer/{name}"
            for i in range(2)
            for name in ("query", "value")
        ]

    def test_name(self):
        assert len(_inject(zoo.bert, "key")) == 2

    def test_names_and_ends_of_paths(self):
        found = _inject(
            zoo.bert, ["transformer_layer_1/self_attention_layer/key", "query"]
        )
        assert len(found) == 3

    def test_a_name_is_not_a_suffix_of_a_name(self):
        # "uery" ends the path, but is no whole part of it.
        with pytest.raises(ValueError, match="Near misses: .*'query'"):
            _inject(zoo.bert, "uery")

    def test_pattern(self):
        found = _inject(zoo.bert, re.compile(r"layer_1/.*(key|query)$"))
        assert len(found) == 2

    def test_all_linear(self):
        # Per layer: query, key, value, output and two of the feed-forward;
        # and BERT's pooler.
        assert len(_inject(zoo.bert, "all-linear")) == 13

    def test_all_linear_leaves_the_head_of_a_task(self):
        found = _inject(zoo.pretrained_classifier, "all-linear")
        assert len(found) == 13
        assert not any("logits" in path for path in found)

    def test_function(self):
        found = _inject(
            zoo.bert, lambda x: isinstance(x, layers.Dense) and x.units == 12
        )
        assert len(found) == 2

    def test_exclude(self):
        assert len(_inject(zoo.bert, exclude="query")) == 2
        assert len(_inject(zoo.bert, exclude=re.compile("layer_0"))) == 2
        assert len(_inject(zoo.bert, exclude="transformer_layer_1")) == 2
        assert len(_inject(zoo.bert, exclude=lambda x: x.name == "value")) == 2

    def test_exclude_all_linear(self):
        model = keras.Sequential(
            [keras.Input((8, 3)), layers.Conv1D(4, 3), layers.Dense(2)]
        )
        report = kra.inject(
            model, LORA, lambda layer: True, exclude="all-linear"
        )
        assert len(report.sites) == 1
        assert [type(x) for x in kra.sites(model).values()] == [
            type(model.layers[0])
        ]

    def test_what_a_file_calls_a_layer_is_no_name(self):
        # There, `first` is `layers/dense` and `dense` is `layers/dense_1`.
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, name="first"),
                layers.Dense(4, name="dense"),
                layers.Dense(4, name="dense_1"),
            ]
        )
        for target in ("dense", re.compile("dense$")):
            kra.inject(model, LORA, target)
            assert [x.name for x in kra.sites(model).values()] == ["dense"]
            kra.eject(model)
        kra.inject(
            model, LORA, "all-linear", exclude="dense", keep_trainable="dense_1"
        )
        assert [x.name for x in kra.sites(model).values()] == ["first"]
        # But a whole address can't be misunderstood.
        kra.eject(model)
        kra.inject(model, LORA, ["layers/dense"])
        assert [x.name for x in kra.sites(model).values()] == ["first"]

    def test_attributes_are_names(self):
        class Block(layers.Layer):
            def __init__(self):
                super().__init__()
                self.up = layers.Dense(4)
                self.parts = [layers.Dense(4, name="part")]

            def build(self, shape):
                self.up.build(shape)
                self.parts[0].build(shape)

            def call(self, x):
                return self.parts[0](self.up(x))

        model = keras.Sequential([keras.Input((4,)), Block(), Block()])
        report = kra.inject(model, LORA, ["up", "parts/part"])
        assert len(report.sites) == 4

    def test_attributes_of_models(self):
        """Of those too that Keras's files know as one of `layers`."""

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.key = layers.Dense(4)
                self.query = layers.Dense(4)
                self.value = layers.Dense(4)

            def call(self, x):
                return self.key(x) + self.query(x) + self.value(x)

        model = Model()
        model(zoo.normal(2, 4))
        kra.inject(model, LORA)
        assert set(kra.sites(model).values()) == {model.query, model.value}
        kra.eject(model)
        kra.inject(model, LORA, ["value", "key"])
        assert set(kra.sites(model).values()) == {model.key, model.value}

    def test_places_in_a_list_without_names(self):
        class Block(layers.Layer):
            def __init__(self):
                super().__init__()
                self.parts = [layers.Dense(4), layers.Dense(4)]

            def build(self, shape):
                for part in self.parts:
                    part.build(shape)

            def call(self, x):
                return self.parts[1](self.parts[0](x))

        model = keras.Sequential([keras.Input((4,)), Block(), Block()])
        kra.inject(model, LORA, "parts/dense_1")
        assert list(kra.sites(model).values()) == [
            block.parts[1] for block in model.layers
        ]

    def test_shared_layer_is_one_site(self):
        model, x, _ = zoo.functional()
        report = kra.inject(model, LORA, "shared")
        assert len(report.sites) == 1
        assert report.adapter_parameters == 2 * (8 + 8)

    def test_keep_trainable(self):
        model = zoo.bert_classifier()[0]
        report = kra.inject(model, LORA, keep_trainable="logits")
        assert report.head_parameters == 8 * 3 + 3
        kept = [v.path for v in model.trainable_variables]
        assert "logits/kernel" in kept and "logits/bias" in kept
        assert sum("/adapter/" not in path for path in kept) == 2

    def test_routers_are_left_out(self):
        inputs = keras.Input((4,))
        x = layers.Dense(2, name="router")(inputs)
        model = keras.Model(inputs, layers.Dense(64, name="expert")(x))
        report = kra.inject(model, LORA, "all-linear")
        assert _names(model) == ["expert"]
        assert report.left_out == {"layers/dense": 8}
        assert "parameters left out" in str(report)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"targets": "qeury"}, "matches no layer: 'qeury'. Near misses"),
            ({"targets": ["query", "velue"]}, "matches no layer: 'velue'"),
            (
                {"targets": re.compile("xyz")},
                "matches no layer: re.compile..xyz",
            ),
            ({"targets": []}, "`targets` is empty"),
            ({"targets": ["all-linear"]}, "alone, not in a list"),
            (
                {"targets": "self_attention_layer"},
                "Layers inside of them can: .*'query'",
            ),
            ({"targets": lambda layer: False}, "returned a false value"),
            (
                {"targets": "self_attention_layer_norm"},
                "matches only layers of classes .*LayerNormalization",
            ),
            (
                {"targets": ["query", "self_attention_layer_norm"]},
                "target 'self_attention_layer_norm' matches only layers",
            ),
            ({"exclude": "valeu"}, "`exclude` matches no layer"),
            (
                {"targets": "query", "exclude": "query"},
                "`exclude` left none of the 2",
            ),
            (
                {"keep_trainable": lambda layer: False},
                "`keep_trainable` returned a false value",
            ),
            ({"keep_trainable": "all-linear"}, "is a choice of `targets`"),
            (
                {"keep_trainable": "logist"},
                "`keep_trainable` matches no layer",
            ),
            (
                {"targets": "query", "keep_trainable": "query"},
                "both a target and",
            ),
        ],
        ids=str,
    )
    def test_bad_values(self, arguments, message):
        model, _, _ = zoo.bert()
        with pytest.raises(ValueError, match=message):
            kra.inject(model, LORA, **arguments)
        assert "_randadapt" not in vars(model)

    @pytest.mark.parametrize(
        "targets", [3, [3], {"query": 1}, layers.Dense(2)], ids=str
    )
    def test_bad_types(self, targets):
        model, _, _ = zoo.bert()
        with pytest.raises(TypeError, match="`targets` must be a name"):
            kra.inject(model, LORA, targets)

    def test_no_projection_by_a_known_name(self):
        model, _, _ = zoo.dense()
        with pytest.raises(ValueError, match="called: site"):
            kra.inject(model, LORA)

    def test_layer_that_overrides_call(self):
        class Loud(layers.Dense):
            def call(self, inputs, training=None):
                return 2 * super().call(inputs)

        inputs = keras.Input((4,))
        model = keras.Model(inputs, Loud(3, name="loud")(inputs))
        with pytest.raises(ValueError, match="Loud that overrides `call`"):
            kra.inject(model, LORA, "loud")

    def test_subclass_that_keeps_call(self):
        class Quiet(layers.Dense):
            pass

        inputs = keras.Input((4,))
        model = keras.Model(inputs, Quiet(3, name="quiet")(inputs))
        kra.inject(model, LORA, "quiet")
        assert isinstance(model.get_layer("quiet"), Quiet)


class Bank(layers.Layer):
    """Experts in one weight, as KerasHub stacks them."""

    def build(self, shape):
        self.experts = self.add_weight(shape=(3, shape[-1], 4), name="experts")
        self.expert_bias = self.add_weight(shape=(3, 4), name="expert_bias")

    def call(self, x):
        return keras.ops.sum(
            keras.ops.einsum("bi,eio->beo", x, self.experts) + self.expert_bias,
            axis=1,
        )


class TestLeftOut:
    """A layer that `targets` means and that is not adapted is told of."""

    def _model(self):
        inputs = keras.Input((6,))
        x = layers.Dense(6, name="block_query")(inputs)
        x = layers.LayerNormalization(name="block_norm")(x)
        x = x * layers.Dense(1, name="block_gate")(x)
        x = layers.Dropout(0.1, name="block_dropout")(x)
        x = Bank(name="block_experts")(x)
        return keras.Model(inputs, layers.Dense(4, name="head")(x))

    def test_pattern(self):
        model = self._model()
        with pytest.warns(
            kra.AdapterWarning,
            match="44 % of .*'layers/block_experts .Bank.'",
        ):
            report = kra.inject(model, LORA, re.compile("query|norm|experts"))
        assert _names(model) == ["block_query"]
        assert report.left_out == {"layers/bank": 72}

    def test_pattern_that_means_no_kernel_but_norms_and_dropout(self):
        model = self._model()
        pattern = re.compile("query|norm|dropout")
        assert kra.inject(model, LORA, pattern).left_out == {}

    def test_kinds_that_a_method_does_not_adapt(self):
        ids = keras.Input((5,), dtype="int32")
        x = layers.Embedding(11, 6, name="table")(ids)
        model = keras.Model(ids, layers.Dense(4, name="dense_of_table")(x))
        with pytest.warns(kra.AdapterWarning, match="table .Embedding."):
            report = kra.inject(model, kra.DoRA(LORA), re.compile("table"))
        assert _names(model) == ["dense_of_table"]
        assert report.left_out == {"layers/embedding": 66}
        kra.eject(model)
        for template in (kra.DoRA(LORA), kra.BitFit()):
            with pytest.raises(ValueError, match="does not adapt a Embedding"):
                kra.inject(model, template, ["dense_of_table", "table"])
        kra.inject(model, kra.DoRA(LORA), re.compile("table"), exclude="table")
        assert _names(model) == ["dense_of_table"]

    def test_equations_that_a_method_does_not_adapt(self):
        """A sum over tokens is no product that maps tokens to tokens."""
        inputs = keras.Input((3, 6))
        x = layers.Dense(6, name="query")(inputs)
        x = layers.EinsumDense("abc,cd->ad", (4,), name="sum_of_query")(x)
        model = keras.Model(inputs, x)
        with pytest.warns(kra.AdapterWarning, match="sum_of_query"):
            kra.inject(model, kra.Bottleneck(2), re.compile("query"))
        assert _names(model) == ["query"]

    def test_function(self):
        model = self._model()
        with pytest.warns(kra.AdapterWarning, match="block_norm .LayerNorm"):
            report = kra.inject(model, LORA, lambda x: x.name != "block_gate")
        assert _names(model) == ["block_query", "head"]
        assert report.left_out == {
            "layers/layer_normalization": 0,
            "layers/bank": 72,
        }

    def test_function_of_an_attribute_that_some_layers_have(self):
        assert _inject(
            lambda: [self._model()], lambda layer: layer.units == 6
        ) == ["block_query"]

    def test_name_of_several_layers(self):
        """One can be adapted and one can't, and a third has no kernel."""

        class Block(layers.Layer):
            def __init__(self, inner, **kwargs):
                super().__init__(**kwargs)
                self.proj = inner

            def build(self, shape):
                self.proj.build(shape)

            def call(self, x):
                return self.proj(x)

        def build(*inner):
            blocks = [Block(one, name=f"block_{one.name}") for one in inner]
            return keras.Sequential([keras.Input((4,)), *blocks])

        model = build(layers.Dense(4, name="a"), layers.Dropout(0.1, name="b"))
        assert len(kra.inject(model, LORA, "proj").sites) == 1
        model = build(layers.Dense(4, name="a"), Bank(name="bank"))
        with pytest.raises(
            ValueError, match="also means layers of .*Bank.*block_bank/proj"
        ):
            kra.inject(model, LORA, "proj")
        assert kra.sites(model) == {}
        kra.inject(model, LORA, "proj", exclude="block_bank")
        assert [x.name for x in kra.sites(model).values()] == ["a"]

    def test_all_linear(self):
        model = self._model()
        with pytest.warns(
            kra.AdapterWarning, match='"all-linear"` leaves out 47 %'
        ):
            report = kra.inject(model, LORA, "all-linear")
        assert _names(model) == ["block_query", "head"]
        assert report.left_out == {"layers/dense_1": 6, "layers/bank": 72}
        assert "78" in str(report)

    def test_what_is_excluded_or_kept_is_not_left_out(self):
        for arguments in (
            {"exclude": ["block_experts", "block_gate"]},
            {"keep_trainable": ["block_experts", "block_gate"]},
        ):
            model = self._model()
            report = kra.inject(model, LORA, "all-linear", **arguments)
            assert report.left_out == {}

    def test_heads_of_tasks(self):
        model = zoo.pretrained_classifier()[0]
        report = kra.inject(model, LORA, "all-linear")
        assert report.left_out == {"layers/dense": 24}

    def test_a_head_of_one_output_is_no_gate(self):
        inputs = keras.Input((6,))
        model = keras.Model(inputs, layers.Dense(1, name="score")(inputs))
        kra.inject(model, kra.LoRA(1), "all-linear")
        assert _names(model) == ["score"]

    @pytest.mark.parametrize("mode", ["int8", "int4"])
    def test_quantized_routers(self, mode):
        model = keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(4, name="router"),
                layers.Dense(64, name="dense"),
            ]
        )
        model.quantize(mode)
        report = kra.inject(model, LORA, "all-linear")
        assert list(report.left_out) == ["layers/dense"]
        assert report.left_out["layers/dense"] in (16, 32)


class TestMixturesOfExperts:
    """All of KerasHub's: routers and gates are left out, and experts told."""

    COMMON = dict(
        vocabulary_size=20,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
    )
    QWEN = dict(num_experts=4, top_k=2, moe_intermediate_dim=8)

    @pytest.mark.parametrize(
        "family, arguments, gates",
        [
            ("Mixtral", dict(intermediate_dim=8, num_experts=4, top_k=2), 1),
            (
                "QwenMoe",
                dict(
                    **QWEN,
                    intermediate_dim=8,
                    shared_expert_intermediate_dim=8,
                ),
                2,
            ),
            ("Qwen3Moe", dict(**QWEN, intermediate_dim=8, head_dim=4), 1),
            (
                "Qwen3_5Moe",
                dict(
                    **QWEN,
                    head_dim=8,
                    shared_expert_intermediate_size=8,
                    layer_types=["full_attention"],
                ),
                2,
            ),
            ("GptOss", dict(intermediate_dim=8, num_experts=4), 1),
            (
                "Gemma4",
                dict(
                    image_size=8,
                    intermediate_dim=8,
                    head_dim=4,
                    enable_moe_block=True,
                    num_experts=4,
                    expert_intermediate_dim=8,
                    num_experts_per_token=2,
                ),
                1,
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_family(self, family, arguments, gates):
        model = zoo.backbone(family)(**self.COMMON, **arguments)
        with pytest.warns(kra.AdapterWarning, match="Experts|MoEBlock"):
            report = kra.inject(model, LORA, "all-linear")
        small = [n for n in report.left_out.values() if n in (8, 32)]
        assert len(small) == gates and len(report.left_out) == gates + 1
        # Three stacks of four experts of 8 x 8 weights.
        assert max(report.left_out.values()) == 768
        assert not any("router" in a for a in report.sites)

    def test_router_that_routes_no_experts(self):
        model = zoo.backbone("Gemma3n")(
            text_vocab_size=20,
            text_hidden_size=8,
            num_hidden_layers=1,
            pad_token_id=0,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=[8],
            hidden_activation="gelu_approximate",
            layer_types=["full_attention"],
            sliding_window=4,
            rope_theta=10000.0,
            max_position_embeddings=16,
            vocab_size_per_layer_input=20,
            hidden_size_per_layer_input=4,
            altup_num_inputs=2,
            laurel_rank=2,
        )
        report = kra.inject(model, LORA, "all-linear")
        assert any(a.endswith("/modality_router") for a in report.sites)
        assert report.left_out == {}


class TestAddresses:
    """An address is the path of a layer's weights in a `.weights.h5` file."""

    @pytest.mark.parametrize(
        "builder",
        [
            zoo.sequential,
            zoo.functional,
            zoo.subclassed,
            zoo.pretrained_classifier,
            zoo.clip,
            zoo.llama,
        ],
        ids=lambda b: b.__name__,
    )
    def test_equal_paths_in_weight_files(self, builder, tmp_path):
        import h5py

        model, _, targets = builder()
        targets = targets or "all-linear"
        kra.inject(model, LORA, targets)
        model.save_weights(tmp_path / "x.weights.h5")
        groups = set()
        with h5py.File(tmp_path / "x.weights.h5") as file:
            file.visit(groups.add)
        for address, layer in kra.sites(model).items():
            assert f"{address}/vars/0" in groups
            assert f"{address}/adapter/named_default/vars/0" in groups

    def test_stable_over_instances(self):
        first = zoo.sequential()[0]
        second = zoo.sequential()[0]
        paths = [[x.path for x in m._flatten_layers()] for m in (first, second)]
        assert paths[0] != paths[1]
        assert list(addresses.layers_by_address(first)) == list(
            addresses.layers_by_address(second)
        )


class TestEveryFamily:
    """`targets=None` finds the projections that KerasHub's default misses."""

    def _t5(self, hub):
        return hub.models.T5Backbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
        )

    def _gpt_neo_x(self, hub):
        return hub.models.GPTNeoXBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
        )

    def _smollm3(self, hub):
        return hub.models.SmolLM3Backbone(
            vocabulary_size=20,
            hidden_dim=8,
            intermediate_dim=8,
            num_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=False,
            attention_dropout=0.0,
            rope_layer_enabled_list=[True, True],
            layer_types=["full_attention", "full_attention"],
            mlp_bias=False,
            layer_norm_epsilon=1e-5,
            max_position_embeddings=16,
            rope_theta=10000.0,
            partial_rotary_factor=1.0,
        )

    def _esm(self, hub):
        return hub.models.ESMBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
        )

    @pytest.mark.parametrize(
        "family, sites",
        [("t5", 6), ("gpt_neo_x", 1), ("smollm3", 4), ("esm", 2)],
    )
    def test_default_targets(self, family, sites):
        import keras_hub

        model = getattr(self, f"_{family}")(keras_hub)
        report = kra.inject(model, LORA)
        assert len(report.sites) == sites
        # SmolLM3 calls every block's value projection by the same path.
        paths = [v.path for v in model.trainable_variables]
        assert len(set(paths)) == len(paths) == 2 * sites
