"""Bottleneck adapters: where they are, what they compute, what they cost."""

import concurrent.futures

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import addresses
from keras_randadapt.sites import kerashub
from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import supported
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend

#: A feed-forward network, by KerasHub's names.
FIRST = "feedforward_intermediate_dense"
LAST = "feedforward_output_dense"


def _relu(x):
    return np.maximum(x, 0)


def _swish(x):
    return x / (1 + np.exp(-x))


def _update(values, z, activation):
    hidden = activation(z @ values["down"] + values["down_bias"])
    return hidden @ values["up"] + values["up_bias"]


def _two_layers():
    """A feed-forward network by KerasHub's names, and a projection before."""
    inputs = keras.Input((3, 5))
    x = keras.layers.Dense(7, name="before")(inputs)
    x = keras.layers.Dense(11, activation="tanh", name=FIRST)(x)
    outputs = keras.layers.Dense(7, activation="sigmoid", name=LAST)(x)
    return zoo.set_weights(keras.Model(inputs, outputs)), zoo.normal(4, 3, 5)


class _Block(keras.layers.Layer):
    """A transformer block whose author named no layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 4)
        self.one = keras.layers.Dense(8, activation="relu")
        self.two = keras.layers.Dense(8)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.one.build(input_shape)
        self.two.build(input_shape)

    def call(self, x):
        x = x + self.attention(x, x)
        return x + self.two(self.one(x))

    def compute_output_shape(self, input_shape):
        return input_shape


def _blocks():
    inputs = keras.Input((3, 8))
    return zoo.set_weights(keras.Model(inputs, _Block()(inputs)))


def _dense(layer, x):
    kernel, bias = (methods.numpy(v).astype("float64") for v in layer.weights)
    return x @ kernel + bias


def _adapter(model, name):
    return model.get_layer(name).adapter.get("default")


class TestFormula:
    """Against the formula in NumPy, in float64."""

    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "placement, activation, scaling",
        [("houlsby", _swish, 1.0), ("pfeiffer", _relu, 1.0)],
    )
    def test_behind_a_layer(self, placement, activation, scaling):
        model, x = _two_layers()
        weights = [_dense(model.get_layer("before"), x)]
        weights.append(np.tanh(_dense(model.get_layer(FIRST), weights[0])))
        h = 1 / (1 + np.exp(-_dense(model.get_layer(LAST), weights[1])))
        kra.inject(model, kra.Bottleneck(2, placement=placement), LAST)
        values = methods.randomize(_adapter(model, LAST))
        expected = h + scaling * _update(values, h, activation)
        methods.close(zoo.outputs(model, x), expected.ravel())

    def test_beside_a_feed_forward_network(self):
        model, x = _two_layers()
        z = _dense(model.get_layer("before"), x)
        hidden = np.tanh(_dense(model.get_layer(FIRST), z))
        h = 1 / (1 + np.exp(-_dense(model.get_layer(LAST), hidden)))
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        assert [s.name for s in kra.sites(model).values()] == [LAST]
        values = methods.randomize(_adapter(model, LAST))
        expected = h + 4.0 * _update(values, z, _relu)
        methods.close(zoo.outputs(model, x), expected.ravel())
        y = model.predict(x, verbose=0)
        methods.close(y, expected)

    def test_beside_a_layer(self):
        """A parallel site that ends no known network reads its own input."""
        model, x = _two_layers()
        z = _dense(model.get_layer("before"), x)
        hidden = np.tanh(_dense(model.get_layer(FIRST), z))
        kra.inject(model, kra.Bottleneck(2, placement="parallel"), FIRST)
        values = methods.randomize(_adapter(model, FIRST))
        hidden = hidden + 4.0 * _update(values, z, _relu)
        h = 1 / (1 + np.exp(-_dense(model.get_layer(LAST), hidden)))
        methods.close(zoo.outputs(model, x), h.ravel())

    def test_without_scaling_it_is_the_base(self):
        model, x = _two_layers()
        base = zoo.outputs(model, x)
        kra.inject(model, kra.Bottleneck(2, placement="parallel", scaling=0.0))
        methods.randomize(_adapter(model, LAST))
        methods.close(zoo.outputs(model, x), base, 1e-6)

    def test_several_are_summed_in_order(self):
        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2), LAST)
        kra.inject(model, kra.LoRA(2), LAST, name="lora")
        zoo.randomize(model, "lora")
        kra.set_active(model, "lora")
        h = zoo.outputs(model, x).reshape(4, 3, 7).astype("float64")
        kra.set_active(model, ["default", "lora"])
        values = methods.randomize(_adapter(model, LAST))
        expected = h + _update(values, h, _swish)
        methods.close(zoo.outputs(model, x), expected.ravel())

    def test_features_of_an_einsum(self):
        """The heads and features of a query projection are one vector."""
        model, x, _ = zoo.einsum_query()
        h = zoo.outputs(model, x).reshape(-1, 8).astype("float64")
        kra.inject(model, kra.Bottleneck(3, activation="relu"), "site")
        values = methods.randomize(_adapter(model, "site"))
        expected = h + _update(values, h, _relu)
        methods.close(zoo.outputs(model, x), expected.ravel())

    @pytest.mark.every_backend
    def test_mixed_precision(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model, x = _two_layers()
        finally:
            keras.config.set_dtype_policy("float32")
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        adapter = _adapter(model, LAST)
        assert keras.backend.standardize_dtype(adapter.down.dtype) == "float32"
        methods.randomize(adapter)
        y = model(x, training=False)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"

    def test_first_values(self):
        model, _ = _two_layers()
        kra.inject(
            model,
            kra.Bottleneck(
                5,
                down_initializer={"name": "normal", "stddev": 0.5},
                up_initializer={"name": "normal", "stddev": 0.02},
            ),
            [FIRST, LAST, "before"],
        )
        downs = [_adapter(model, n).down for n in (FIRST, LAST, "before")]
        values = np.concatenate([methods.numpy(v).ravel() for v in downs])
        assert 0.4 < values.std() < 0.6
        assert 0 < np.abs(methods.numpy(_adapter(model, FIRST).up)).max() < 0.1


class TestRelay:
    """How the input of one layer gets to the adapter of another."""

    def test_layer_of_the_input_is_left_as_it_was(self):
        model, x = _two_layers()
        base = zoo.outputs(model, x)
        classes = [type(layer) for layer in model.layers]
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        assert type(model.get_layer(FIRST)) not in classes
        kra.inject(model, kra.LoRA(2), FIRST, name="lora")
        kra.eject(model, "default")
        assert isinstance(model.get_layer(FIRST), layer_lib.AdaptedLayer)
        kra.eject(model)
        assert [type(layer) for layer in model.layers] == classes
        np.testing.assert_array_equal(zoo.outputs(model, x), base)

    def test_with_adapters_on_both_layers(self):
        model, x = _two_layers()
        kra.inject(model, kra.LoRA(2), [FIRST, LAST], name="lora")
        zoo.randomize(model, "lora")
        without = zoo.outputs(model, x).reshape(4, 3, 7)
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        kra.set_active(model, ["lora", "default"])
        values = methods.randomize(_adapter(model, LAST))
        z = _dense(model.get_layer("before"), x)
        expected = without + 4.0 * _update(values, z, _relu)
        methods.close(zoo.outputs(model, x), expected.ravel())
        with kra.disabled(model):
            y = zoo.outputs(model, x)
        assert np.abs(y - expected.ravel()).max() > 1e-3

    def test_last_layer_alone(self):
        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        hidden = keras.ops.convert_to_tensor(zoo.normal(4, 3, 11))
        with pytest.raises(ValueError, match="not called before the last"):
            model.get_layer(LAST)(hidden)
        # And a call of the whole leaves nothing behind for the next.
        zoo.outputs(model, x)
        with pytest.raises(ValueError, match="not called before the last"):
            model.get_layer(LAST)(hidden)

    def test_what_was_not_taken_is_dropped(self):
        """The input of a call of a part is not that of a later call."""
        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        methods.randomize(_adapter(model, LAST))
        out = zoo.outputs(model, x)
        part = keras.Model(model.input, model.get_layer(FIRST).output)
        part(2 * x)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    @pytest.mark.every_backend
    def test_threads(self):
        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        methods.randomize(_adapter(model, LAST))
        inputs = [x, 2 * x, -x]
        expected = [zoo.outputs(model, one) for one in inputs]

        def outputs(i):
            return [zoo.outputs(model, inputs[i]) for _ in range(20)]

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for i, results in enumerate(pool.map(outputs, range(3))):
                for result in results:
                    methods.close(result, expected[i], 1e-6)

    def test_network_used_twice_in_a_graph(self):
        """Keras calls its first layer twice, and only then its last."""
        first = keras.layers.Dense(6, name=FIRST)
        last = keras.layers.Dense(5, name=LAST)
        inputs = [keras.Input((5,)), keras.Input((5,))]
        model = keras.Model(inputs, [last(first(one)) for one in inputs])
        with pytest.raises(ValueError, match="several times in the model"):
            kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        assert kra.sites(model) == {}

    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "options, refused",
        [
            (dict(mode="full"), True),
            (dict(mode="larger_than", output_size_threshold=1), True),
            (dict(mode="list_of_layers", layer_names=[LAST]), True),
            (dict(mode="list_of_layers", layer_names=["other"]), False),
            (dict(mode="activations"), False),
        ],
        ids=str,
    )
    def test_rematerialized_networks(self, options, refused):
        with keras.RematScope(**options):
            model, _ = _two_layers()
        template = kra.Bottleneck(2, placement="parallel")
        if refused:
            with pytest.raises(ValueError, match="RematScope"):
                kra.inject(model, template)
            assert kra.sites(model) == {}
            template = kra.Bottleneck(2)
        assert len(kra.inject(model, template).sites) == 1

    def test_files_say_where_the_input_comes_from(self, tmp_path):
        """Names of unnamed layers are others when a model is built again."""
        model = _blocks()
        x = zoo.normal(4, 3, 8)
        names = [m.name for m in (model.layers[1].one, model.layers[1].two)]
        model.layers[1].one.name, model.layers[1].two.name = FIRST, LAST
        kra.inject(model, kra.Bottleneck(2, placement="parallel"), [LAST])
        assert len(kra.sites(model)) == 1
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "file")
        model.layers[1].one.name, model.layers[1].two.name = names
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(
            tmp_path / "model.keras", custom_objects={"_Block": _Block}
        )
        methods.close(zoo.outputs(loaded, x), out, 1e-6)
        fresh = _blocks()
        kra.load_adapter(fresh, tmp_path / "file")
        methods.close(zoo.outputs(fresh, x), out, 1e-6)
        # And a file that gets its input elsewhere is another adapter.
        kra.eject(model)
        kra.inject(
            model,
            kra.Bottleneck(2, placement="parallel"),
            list(kra.sites(loaded)),
        )
        with pytest.raises(ValueError, match="inputs of different layers"):
            kra.load_adapter(model, tmp_path / "file")

    @pytest.mark.every_backend
    @pytest.mark.skipif(
        keras.config.backend() == "torch",
        reason="Keras exports no SavedModel from the torch backend",
    )
    def test_saved_model(self, tmp_path):
        import tensorflow as tf

        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        model.export(tmp_path / "saved", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "saved")
        methods.close(np.ravel(loaded.serve(x).numpy()), out)

    def test_whole_model_file_and_eject(self, tmp_path):
        model, x = _two_layers()
        kra.inject(model, kra.Bottleneck(2, placement="parallel"))
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        methods.close(zoo.outputs(loaded, x), out, 1e-6)
        kra.save_adapter(model, tmp_path / "file")
        kra.eject(loaded)
        kra.load_adapter(loaded, tmp_path / "file")
        methods.close(zoo.outputs(loaded, x), out, 1e-6)


class TestPlacement:
    """Where the sites are in KerasHub's families."""

    def _families(self):
        import keras_hub

        models = keras_hub.models
        common = dict(
            vocabulary_size=20,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=12,
        )
        # Families differ in what they call the number of heads.
        sizes = {k: v for k, v in common.items() if k != "num_heads"}
        grouped = dict(sizes, num_query_heads=2, num_key_value_heads=1)
        return {
            "bloom": lambda: models.BloomBackbone(**common),
            "falcon": lambda: models.FalconBackbone(
                num_attention_heads=2, **sizes
            ),
            "gemma": lambda: models.GemmaBackbone(head_dim=4, **grouped),
            "phi3": lambda: models.Phi3Backbone(**grouped),
            "gpt_neo_x": lambda: models.GPTNeoXBackbone(**common),
            "esm": lambda: models.ESMBackbone(**common),
            "swin": lambda: models.SwinTransformerBackbone(
                image_shape=(16, 16, 3),
                patch_size=4,
                embed_dim=8,
                depths=(2,),
                num_heads=(2,),
                window_size=2,
            ),
            "bert": lambda: zoo.bert()[0],
            "gpt2": lambda: zoo.gpt2()[0],
            "llama": lambda: zoo.llama()[0],
            "vit": lambda: zoo.vit()[0],
            "deberta": lambda: zoo.deberta()[0],
            "clip": lambda: zoo.clip()[0],
            "t5": lambda: models.T5Backbone(**common),
        }

    @pytest.mark.parametrize(
        "family, attention, networks",
        [
            ("bloom", 2, 2),
            ("falcon", 2, 2),
            ("gemma", 2, 2),
            ("phi3", 2, 2),
            ("gpt_neo_x", 2, 2),
            ("esm", 2, 2),
            ("swin", 2, 2),
            ("bert", 2, 2),
            ("gpt2", 2, 2),
            ("llama", 2, 2),
            ("vit", 2, 2),
            ("deberta", 2, 2),
            ("clip", 4, 4),
            # Two of the decoder's three a block are attention.
            ("t5", 6, 4),
        ],
    )
    def test_kerashub(self, family, attention, networks):
        model = self._families()[family]()
        layers = addresses.layers_by_address(model)
        assert len(kerashub.attention_outputs(layers)) == attention
        found = kerashub.feed_forwards(layers)
        assert len(found) == networks
        for last, first in found.items():
            # Each goes from the model's features and comes back to them.
            dims = supported.view_of(layers[first]).input_dim
            assert supported.view_of(layers[last]).output_dim == dims
        report = kra.inject(model, kra.Bottleneck(3))
        assert len(report.sites) == attention + networks
        kra.inject(model, kra.Bottleneck(3, placement="pfeiffer"), name="p")
        assert (
            len(
                kra.inject(
                    model, kra.Bottleneck(3, placement="parallel"), name="q"
                ).sites
            )
            == networks
        )

    def test_a_gated_network_reads_its_input(self):
        """In Llama's blocks: the same as an adapter written by hand."""
        model, x, _ = zoo.llama()
        kra.inject(model, kra.Bottleneck(3, placement="parallel"))
        seen = {}
        block = model.get_layer("transformer_layer_0")
        gate = block._feedforward_gate_dense
        last = block._feedforward_output_dense
        adapter = last.adapter.get("default")
        methods.randomize(adapter)

        class Spy:
            def __init__(self, layer, key):
                self.layer, self.key = layer, key
                self.call = layer.call

            def __call__(self, inputs, *args, **kwargs):
                y = self.call(inputs, *args, **kwargs)
                seen[self.key] = methods.numpy(inputs), methods.numpy(y)
                return y

        object.__setattr__(gate, "call", Spy(gate, "gate"))
        object.__setattr__(last, "call", Spy(last, "last"))
        model(x, training=False)
        values = {
            w.name: methods.numpy(w).astype("float64")
            for w in adapter.trainable_variables
        }
        z = seen["gate"][0].astype("float64")
        inner, y = seen["last"]
        kernel = methods.numpy(last._kernel)
        expected = inner @ kernel + 4.0 * _update(values, z, _relu)
        methods.close(y, expected)

    def test_layer_that_is_read_and_not_called(self):
        class Gemma4TextDecoderBlock(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.ffw_linear = keras.layers.Dense(4, name="ffw_linear")

            def build(self, input_shape):
                self.ffw_linear.build(input_shape)

            def call(self, x):
                return keras.ops.matmul(x, self.ffw_linear.kernel)

        inputs = keras.Input((4,))
        model = keras.Model(inputs, Gemma4TextDecoderBlock()(inputs))
        for template in (
            kra.Bottleneck(2),
            kra.LoRA(2, dropout=0.1),
            kra.DoRA(kra.LoRA(2, dropout=0.1)),
        ):
            with pytest.raises(ValueError, match="would be missed"):
                kra.inject(model, template, "ffw_linear")
            assert kra.sites(model) == {}
        kra.inject(model, kra.LoRA(2), "ffw_linear")

    @pytest.mark.parametrize(
        "first, last", [("dense_1", "dense_2"), ("fc1", "fc2")]
    )
    def test_own_layers_of_such_names_are_left_alone(self, first, last):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name=first)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(4, name=last)(x))
        with pytest.raises(ValueError, match="Name layers in `targets`"):
            kra.inject(model, kra.Bottleneck(2))

    def test_unnamed_layers_are_left_alone(self):
        """Keras's names of unnamed layers depend on what was built before."""
        blocks = [_Block() for _ in range(4)]
        inputs = keras.Input((3, 8))
        x = inputs
        for block in blocks:
            x = block(x)
            block.one.name, block.two.name = "dense_1", "dense_2"
        model = keras.Model(inputs, x)
        with pytest.raises(ValueError, match="Name layers in `targets`"):
            kra.inject(model, kra.Bottleneck(2, placement="pfeiffer"))

    def test_convolutions_of_such_names_are_left_alone(self):
        layers = addresses.Layers()
        for address, layer in {
            "block/attention/query": keras.layers.Dense(2, name="query"),
            "block/attention/o_proj": keras.layers.Dense(2, name="o_proj"),
            "block/fc1": keras.layers.Conv2D(2, 1, name="fc1"),
            "block/fc2": keras.layers.Conv2D(2, 1, name="fc2"),
        }.items():
            layers[address], layers.places[address] = layer, address
        assert kerashub.feed_forwards(layers) == {}
        layers["block/fc1"] = keras.layers.Dense(2, name="fc1")
        layers["block/fc2"] = keras.layers.Dense(2, name="fc2")
        assert kerashub.feed_forwards(layers) == {"block/fc2": "block/fc1"}

    def test_mixture_of_experts(self):
        import keras_hub

        model = keras_hub.models.QwenMoeBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=12,
            moe_intermediate_dim=6,
            shared_expert_intermediate_dim=6,
            num_experts=2,
            top_k=1,
        )
        with pytest.raises(ValueError, match="Name layers in `targets`"):
            kra.inject(model, kra.Bottleneck(2))


class TestArguments:
    def test_size_of_the_hidden_layer(self):
        for template, size in (
            (kra.Bottleneck(), 2),
            (kra.Bottleneck(5), 5),
            (kra.Bottleneck(reduction=4), 8),
            (kra.Bottleneck(reduction=100), 1),
            (kra.Bottleneck(placement="parallel"), 16),
        ):
            inputs = keras.Input((3,))
            model = keras.Model(inputs, keras.layers.Dense(32)(inputs))
            kra.inject(model, template, "all-linear")
            (site,) = kra.sites(model).values()
            assert site.adapter.get("default").down.shape[1] == size

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"placement": "here"}, ValueError, "`placement` must be one of"),
            ({"rank": 0}, ValueError, "`rank` must be at least 1"),
            ({"rank": 2.5}, TypeError, "`rank` must be an integer"),
            ({"reduction": 0}, ValueError, "`reduction` must be at least 1"),
            ({"rank": 2, "reduction": 2}, ValueError, "give one of them"),
            ({"activation": "no"}, ValueError, "`activation` must be a Keras"),
            (
                {"activation": lambda x: x},
                ValueError,
                "`activation` must be a Keras",
            ),
            (
                {"activation": keras.layers.LeakyReLU()},
                ValueError,
                "`activation` must be a Keras",
            ),
            ({"scaling": "no"}, ValueError, "`scaling` must be a finite"),
            ({"up_initializer": "no"}, ValueError, "`up_initializer` must be"),
        ],
        ids=str,
    )
    def test_bad_values(self, arguments, error, message):
        with pytest.raises(error, match=message):
            kra.Bottleneck(**arguments)

    @pytest.mark.parametrize(
        "template",
        [
            kra.Bottleneck(),
            kra.Bottleneck(5, placement="pfeiffer", seed=3, dropout=0.2),
            kra.Bottleneck(placement="parallel", activation="gelu"),
        ],
        ids=str,
    )
    def test_config_round_trip(self, template):
        config = template.get_config()
        assert kra.Bottleneck.from_config(config).get_config() == config

    def test_dora_takes_none(self):
        with pytest.raises(ValueError):
            kra.DoRA(kra.Bottleneck(2))


class TestPaperCount:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "placement, reduction, count",
        [
            # 2L (2 d m + m + d), L (2 d m + m + d), d = 768, L = 12.
            ("houlsby", 16, 24 * (2 * 768 * 48 + 48 + 768)),
            ("pfeiffer", 16, 12 * (2 * 768 * 48 + 48 + 768)),
            ("parallel", 2, 12 * (2 * 768 * 384 + 384 + 768)),
        ],
    )
    def test_roberta_base(self, placement, reduction, count):
        template = kra.Bottleneck(placement=placement, reduction=reduction)
        report = kra.inject(methods.roberta(), template)
        assert report.adapter_parameters == count
