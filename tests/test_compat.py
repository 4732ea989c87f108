"""One test a symbol of Keras's private API: which one moved, if one did."""

import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from keras_randadapt import _compat
from tests import quantizing


def _model():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(2, name="d")(inputs))


def test_flatten_layers():
    model = _model()
    found = _compat.flatten_layers(model)
    assert found[0] is model and model.get_layer("d") in found


def test_owned_variables():
    layer = layers.BatchNormalization()
    layer.build((None, 3))
    assert len(_compat.owned_variables(layer)) == 4
    assert _compat.owned_variables(_model()) == []


@pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="Keras takes no values out of variables on other backends",
)
def test_has_values(tmp_path):
    """A first step that fails leaves none, and everything says so."""
    model = _model()
    kra.inject(model, kra.LoRA(2), ["d"])
    model.compile("adam", "mse")
    # The first `fit` of all would fail before it takes any values.
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    assert _compat.has_values(model)
    with pytest.raises(Exception, match="shapes"):
        model.fit(np.ones((4, 3)), np.ones((4, 7)), verbose=0)
    assert not _compat.has_values(model)
    for act in (
        kra.eject,
        kra.merge,
        lambda model: kra.save_adapter(model, tmp_path / "a.safetensors"),
        lambda model: kra.inject(model, kra.LoRA(2), ["d"], name="b"),
    ):
        with pytest.raises(RuntimeError, match="have no values"):
            act(model)


def test_trainable_by_nature():
    layer = layers.BatchNormalization()
    layer.build((None, 3))
    layer.trainable = False
    names = [v.name for v in _compat.trainable_by_nature(layer)]
    assert names == ["gamma", "beta"]


def test_set_layer_trainable_flag():
    layer = layers.Dense(2)
    layer.build((None, 3))
    _compat.set_layer_trainable_flag(layer, False)
    assert not layer.trainable
    assert layer.kernel.trainable


def test_attach_and_detach_sublayer():
    layer, sublayer = layers.Dense(2), layers.Dense(4)
    layer.build((None, 3))
    sublayer.build((None, 3))
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.extra = sublayer
    if hasattr(layer, "extra"):
        del layer.extra
    _compat.attach_sublayer(layer, "extra", sublayer)
    assert len(layer.variables) == 4
    _compat.detach_sublayer(layer, "extra")
    assert len(layer.variables) == 2
    assert not hasattr(layer, "extra")
    assert layer._tracker.locked


def test_calls_in_graph():
    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(2)

        def build(self, input_shape):
            self.inner.build(input_shape)

        def call(self, x):
            return self.inner(self.inner(x))

    shared, once, outer = layers.Dense(2), layers.Dense(2), Outer()
    inputs = keras.Input((2,))
    model = keras.Model(inputs, outer(once(shared(shared(inputs)))))
    model(np.zeros((1, 2)))
    # A part of it, and the whole inside another model, call nothing anew.
    keras.Model(model.input, once.output)
    keras.Model(inputs, model(inputs))
    calls = map(_compat.calls_in_graph, (shared, once, outer.inner))
    assert list(calls) == [2, 1, 0]


@pytest.mark.parametrize("training", [True, False, None])
def test_training_phase(training):
    seen = []

    class Probe(layers.Conv1D):
        def call(self, inputs):
            seen.append(_compat.training_phase(self))
            return super().call(inputs)

    model = keras.Sequential([Probe(2, 1)])
    model(np.zeros((1, 3, 2), "float32"), training=training)
    assert seen[-1] is bool(training)


def test_is_in_call():
    seen = []

    class Probe(layers.Layer):
        def call(self, inputs):
            seen.append(_compat.is_in_call())
            return inputs

    layer = Probe()
    assert not _compat.is_in_call()
    layer(np.zeros((1, 2), "float32"))
    assert seen == [True]
    assert not _compat.is_in_call()


@pytest.mark.parametrize("training", [True, False])
def test_call_context(training):
    layer = layers.Conv1D(2, 1)
    with pytest.raises(KeyError):
        with _compat.call_context(layer, training):
            assert _compat.is_in_call()
            assert _compat.training_phase(layers.Dense(2)) is training
            raise KeyError
    assert not _compat.is_in_call()


def test_walk_attributes():
    names = dict(_compat.walk_attributes(_model()))
    assert [x.name for x in names["layers"]][1:] == ["d"]


def test_walk_attributes_makes_no_layers(monkeypatch):
    """As Keras does at every walk, to find out what is its own."""
    model = _model()
    dict(_compat.walk_attributes(model))
    made = []
    monkeypatch.setattr(
        keras.layers.Layer, "__init__", lambda layer: made.append(layer)
    )
    dict(_compat.walk_attributes(model))
    assert made == []


def test_may_rematerialize():
    assert not _compat.may_rematerialize(layers.Dense(2))
    with keras.RematScope(mode="full"):
        assert _compat.may_rematerialize(layers.Dense(2))
    with keras.RematScope(mode="activations"):
        assert not _compat.may_rematerialize(layers.Dense(2))
    with keras.RematScope(mode="list_of_layers", layer_names=["a"]):
        assert _compat.may_rematerialize(layers.Dense(2, name="a"))
        assert not _compat.may_rematerialize(layers.Dense(2, name="b"))


def test_keeps_training_flag():
    """A layer rematerialized on its own and one inside another."""

    class Doubling(_compat.KeepsTrainingFlag, layers.Layer):
        def call(self, x, training=None):
            return 2 * x if training else x

    class Outer(_compat.KeepsTrainingFlag, layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Doubling()

        def call(self, x, training=None):
            return self.inner(x)

    with keras.RematScope(mode="full"):
        layer = Outer()
        for training, factor in ((True, 2), (False, 1)):
            y = layer(np.ones((1, 2), "float32"), training=training)
            assert np.all(keras.ops.convert_to_numpy(y) == factor)


def test_is_saveable():
    assert _compat.is_saveable(layers.Dense(2))
    assert not _compat.is_saveable(object())


def test_snake_case():
    assert _compat.snake_case("EinsumDense") == "einsum_dense"
    assert _compat.snake_case("Conv2D") == "conv2d"


def test_alias_registered_class():
    @keras.saving.register_keras_serializable(package="tests")
    class Registered:
        def get_config(self):
            return {}

    class Other:
        pass

    _compat.alias_registered_class(
        Other, keras.saving.get_registered_name(Registered)
    )
    assert keras.saving.get_registered_name(Other) == "tests>Registered"


def test_unpickle_model():
    _, arguments = _model().__reduce__()
    assert _compat.unpickle_model(*arguments).get_layer("d").units == 2


def test_reset_compiled_functions():
    model = _model()
    model.compile("sgd", "mse")
    x, y = np.zeros((2, 3), "float32"), np.zeros((2, 2), "float32")
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    assert model.train_function is not None
    functions = _compat.compiled_functions(model)
    assert functions["train_function"] is model.train_function
    assert functions["predict_function"] is model.predict_function
    _compat.reset_compiled_functions(model)
    assert model.train_function is None
    assert model.predict_function is None
    model.fit(x, y, verbose=0)


def test_sync_jax_state():
    """In a step's callback, JAX's variables have their values of the step."""
    model = _model()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = np.ones((2, 3), "float32"), np.ones((2, 2), "float32")
    values = []

    def look(*_, **__):
        _compat.sync_jax_state(model)
        values.append(np.array(model.get_weights()[0]))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    assert np.any(values[0] != values[1])
    np.testing.assert_array_equal(values[1], model.get_weights()[0])


def test_forget_jax_state():
    """After an error in the second batch, its state is not written back."""
    model = _model()
    model.compile("sgd", "mse")
    shapes = (3, 4)

    class Broken(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return np.zeros((2, shapes[i])), np.zeros((2, 2))

    with pytest.raises(Exception):
        model.evaluate(Broken(), verbose=0)
    if keras.config.backend() == "jax":
        assert model._jax_state is not None
    _compat.forget_jax_state(model)
    assert getattr(model, "_jax_state", None) is None
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    if keras.config.backend() == "jax":
        model.jax_state_sync()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(model.get_layer("d").kernel), 1
    )


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="torch's parameter lists"
)
def test_refresh_torch_parameters():
    model = _model()
    list(model.parameters())
    layer, sublayer = model.get_layer("d"), layers.Dense(4)
    sublayer.build((None, 3))
    _compat.attach_sublayer(layer, "extra", sublayer)
    _compat.refresh_torch_parameters(model)
    found = {id(p) for p in model.parameters()}
    assert all(id(v.value) in found for v in sublayer.variables)


def test_set_keras_mask():
    tensor = keras.ops.ones((2, 3))
    _compat.set_keras_mask(tensor, "mask")
    assert tensor._keras_mask == "mask"


def test_instance_attributes():
    layer = layers.Dense(2, activation="relu")
    layer.build((None, 3))
    bias, variables = layer.bias, len(layer.variables)
    with pytest.raises(RuntimeError):
        with _compat.instance_attributes(layer, bias=None, activation=None):
            assert layer.bias is None and layer.activation is None
            raise RuntimeError
    assert layer.bias is bias
    assert layer.activation is keras.activations.relu
    assert len(layer.variables) == variables


def test_nnx_is_refused(monkeypatch):
    import keras_randadapt as kra

    assert _compat.is_nnx_enabled() is False
    monkeypatch.setattr(_compat, "is_nnx_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="NNX"):
        kra.inject(_model(), kra.LoRA(1), "d")


def test_no_automatic_dependency_tracking():
    """What it keeps off an optimizer's variables: the model's."""

    class Keeping(keras.optimizers.SGD):
        def keep(self, variables):
            self.kept = variables

        keep_untracked = _compat.no_automatic_dependency_tracking(keep)

    variables = [keras.Variable([0.0])]
    optimizer = Keeping()
    count = len(optimizer.variables)
    optimizer.keep_untracked(variables)
    assert len(optimizer.variables) == count
    optimizer.keep(list(variables))
    assert len(optimizer.variables) == count + 1


def _optimizer(variables, **arguments):
    optimizer = keras.optimizers.SGD(0.1, **arguments)
    optimizer.build(variables)
    return optimizer


def test_weight_decay_and_exclusion_from_it():
    one, two = (keras.Variable(np.ones(2), name=n) for n in ("one", "two"))
    optimizer = _optimizer([one, two], weight_decay=0.5)
    assert _compat.weight_decay(optimizer, one) == 0.5
    _compat.exclude_from_weight_decay(optimizer, [one])
    _compat.exclude_from_weight_decay(optimizer, [])
    assert _compat.weight_decay(optimizer, one) == 0.0
    assert _compat.weight_decay(optimizer, two) == 0.5
    zeros = keras.ops.zeros(2)
    optimizer.apply([zeros, zeros], [one, two])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(one), 1.0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(two), 0.95)
    assert _compat.weight_decay(_optimizer([one]), one) == 0.0


def test_copy_weight_decay_exclusions():
    one, two, gone = (keras.Variable(np.ones(2), name=n) for n in "abc")
    source = _optimizer([one, two, gone], weight_decay=0.5)
    _compat.exclude_from_weight_decay(source, [one, gone])
    target = _optimizer([one, two], weight_decay=0.5)
    _compat.copy_weight_decay_exclusions(source, target, [one, two])
    assert _compat.weight_decay(target, one) == 0.0
    assert _compat.weight_decay(target, two) == 0.5
    assert target._exclude_from_weight_decay == {target._var_key(one)}
    source = keras.optimizers.AdamW(weight_decay=0.5)
    source.exclude_from_weight_decay(var_names=["b"])
    _compat.copy_weight_decay_exclusions(source, target, [one, two])
    assert _compat.weight_decay(target, one) == 0.5
    assert _compat.weight_decay(target, two) == 0.0


def test_track_optimizer_variable():
    variable = keras.Variable(np.ones(2))
    optimizer = _optimizer([variable])
    mine = keras.Variable(np.zeros(3), name="mine")
    _compat.track_optimizer_variable(optimizer, mine)
    assert any(v is mine for v in optimizer.variables)


def test_open_name_scope():
    layer = layers.Layer(name="one")
    with keras.name_scope("outer"):
        with _compat.open_name_scope(layer):
            variable = keras.Variable(0.0, name="v")
    assert variable.path == "outer/one/v"


def test_name_scope():
    with pytest.raises(KeyError):
        with _compat.name_scope("inner", "some/path"):
            assert keras.Variable(0.0, name="v").path == "some/path/inner/v"
            raise KeyError
    assert keras.Variable(0.0, name="v").path == "v"


def test_sublayers_and_restore_sublayer():
    """From every state that an interruption can leave."""
    layer = layers.Layer()
    layer.first, layer.second = layers.Dense(1), layers.Dense(2)
    layer.build(())
    first, order = layer.first, _compat.sublayers(layer)
    assert order == [first, layer.second]

    def check():
        _compat.restore_sublayer(layer, "first", first, order)
        assert layer.first is first and _compat.sublayers(layer) == order
        with pytest.raises(ValueError, match="cannot add new"):
            layer.third = layers.Dense(1)

    check()
    _compat.detach_sublayer(layer, "first")
    check()
    # Between the two steps of `detach_sublayer`, and in `attach_sublayer`.
    del layer.first
    check()
    layer._tracker.unlock()
    check()
    other = layers.Dense(3)
    _compat.attach_sublayer(layer, "other", other)
    _compat.restore_sublayer(layer, "other", None, order)
    assert not hasattr(layer, "other") and _compat.sublayers(layer) == order


def test_layer_trainable_flag():
    layer = layers.Dense(2)
    layer.build((None, 3))
    for flag in (False, True):
        layer.trainable = flag
        assert _compat.layer_trainable_flag(layer) is flag


@pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="Keras takes no values out of variables on other backends",
)
def test_values_of_jax_state():
    model = _model()
    model.compile("adam", "mse")
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            model = self._model
            state = list(model._jax_state.values())
            assert not _compat.has_values(model)
            with _compat.values_of_jax_state(model, state):
                seen.append(np.array(model.get_layer("d").bias))
            assert not _compat.has_values(model)

    model.fit(
        np.ones((8, 3)),
        np.ones((8, 2)),
        batch_size=4,
        verbose=0,
        callbacks=[Watch()],
    )
    assert len(seen) == 2 and np.any(seen[0] != seen[1])
    np.testing.assert_array_equal(seen[1], model.get_layer("d").bias)


def test_weight_decay_exclusions():
    model = _model()
    optimizer = keras.optimizers.AdamW()
    before = _compat.weight_decay_exclusions(optimizer)
    _compat.exclude_from_weight_decay(optimizer, model.variables[:1])
    optimizer.build(model.variables)
    assert not optimizer._use_weight_decay(model.variables[0])
    _compat.set_weight_decay_exclusions(optimizer, before)
    assert optimizer._use_weight_decay(model.variables[0])


def test_what_optimizers_know_of_variables():
    model = _model()
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.variables)
    assert _compat.trained_variables(optimizer) == model.variables
    assert _compat.variable_index(optimizer, model.variables[1]) == 1
    _compat.check_variables_are_known(optimizer, model.variables)
    with pytest.raises(ValueError, match="Unknown variable"):
        _compat.check_variables_are_known(optimizer, _model().variables)
    counter = _compat.iterations(optimizer)
    counter.assign_add(1)
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 1


def test_shows_moving_average():
    class Wrapper(_compat.ShowsMovingAverage):
        inner_optimizer = keras.optimizers.SGD(use_ema=True)

    model = _model()
    Wrapper.inner_optimizer.build(model.variables)
    averages = Wrapper()._model_variables_moving_average
    assert len(averages) == len(model.variables)


def test_unrounded():
    seen = {}

    class Reads(layers.Layer):
        def build(self, shape):
            self.one = self.add_weight(shape=(), initializer="ones")
            self.one.assign(1e-8)

        def call(self, x):
            seen["rounded"] = self.one + 0.0
            seen["unrounded"] = _compat.unrounded(self.one) + 0.0
            return x

    Reads(dtype="mixed_float16")(np.ones((1, 1)))
    values = {k: float(keras.ops.convert_to_numpy(v)) for k, v in seen.items()}
    assert values["rounded"] == 0 and values["unrounded"] > 0.9e-8
    assert _compat.unrounded(3.0) == 3.0


def test_kernel_of():
    dense = _model().get_layer("d")
    assert _compat.kernel_of(dense) is dense.trainable_weights[0]
    embedding = layers.Embedding(3, 2)
    embedding.build(())
    assert _compat.kernel_of(embedding) is embedding.trainable_weights[0]
    assert _compat.kernel_of(layers.LayerNormalization()) is None
    assert _compat.kernel_of(layers.DepthwiseConv2D(3)) is None
    for cls in (
        layers.DepthwiseConv1D,
        layers.DepthwiseConv2D,
        layers.Conv1DTranspose,
        layers.Conv2DTranspose,
        layers.Conv3DTranspose,
    ):
        arguments = (2, 3) if "Transpose" in cls.__name__ else (3,)
        layer = cls(*arguments)
        layer.build((None, *[5] * layer.rank, 4))
        assert _compat.kernel_of(layer) is layer.trainable_weights[0]


def test_table_name():
    import keras_hub
    from keras_hub.src.models.deberta_v3 import relative_embedding

    position = keras_hub.layers.PositionEmbedding(9)
    position.build((None, 5, 6))
    relative = relative_embedding.RelativeEmbedding(6, 4)
    for layer in (position, relative):
        name = _compat.table_name(type(layer))
        assert name == _compat.TABLES[type(layer).__name__]
        assert _compat.kernel_of(layer) is getattr(layer, name)
        assert isinstance(_compat.kernel_of(layer), keras.Variable)
        assert _compat.holds_table(layer)
    assert _compat.table_name(layers.Embedding) is None


def test_holds_table():
    assert _compat.holds_table(layers.Embedding(3, 2))
    assert not _compat.holds_table(layers.Dense(3))


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_kernel_shape(mode):
    layer = layers.EinsumDense("abc,cde->abde", (None, 2, 4))
    layer.build((None, 3, 6))
    if mode:
        layer.quantize(mode)
    assert _compat.kernel_shape(layer) == (6, 2, 4)


def test_paired_quantized_variables():
    pair = []
    for _ in range(2):
        layer = layers.Dense(4)
        layer.build((None, 6))
        layer.quantize("int8")
        pair.append(layer)
    found = _compat.paired_quantized_variables(*pair)
    assert [a.name for a, _ in found] == ["kernel", "kernel_scale"]
    for i, layer in enumerate(pair):
        assert all(any(p[i] is w for w in layer.weights) for p in found)


def test_causal_padding():
    layer = layers.Conv1D(2, 3, padding="causal", dilation_rate=2)
    assert _compat.causal_padding(layer) == [[0, 0], [4, 0], [0, 0]]


@pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="JAX alone finds programs by the function that they came from",
)
def test_fresh_step():
    """In the block a step is another function each time."""
    model = _model()
    own = model.train_step
    seen = []
    for _ in range(2):
        with _compat.fresh_step(model, "train_step"):
            seen.append(model.train_step)
    assert seen[0] != seen[1] and own not in seen
    assert model.train_step == own


def test_is_tracing():
    assert not _compat.is_tracing()
    with keras.StatelessScope():
        assert _compat.is_tracing()
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        seen = []
        tf.function(lambda: seen.append(_compat.is_tracing()))()
        assert seen == [True]


@pytest.mark.parametrize("is_in_scope", [False, True])
def test_substituted_values(is_in_scope):
    """Some variables have other values; updates of others come through."""
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    norm = model.layers[0]
    before = np.array(keras.ops.convert_to_numpy(norm.beta))
    pairs = [(norm.beta, np.full(3, 5.0, "float32"))]
    x = np.arange(6, dtype="float32").reshape(2, 3)

    def step():
        with _compat.substituted_values(model, pairs):
            y = model(x, training=True)
            assert keras.ops.convert_to_numpy(y).mean() > 4
        return norm.moving_mean + 0.0

    if is_in_scope:
        mapping = [(v, v.value + 0.0) for v in model.variables]
        with keras.StatelessScope(mapping):
            mean = step()
        assert not keras.ops.convert_to_numpy(norm.moving_mean).any()
    else:
        mean = step()
    assert keras.ops.convert_to_numpy(mean).any()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(norm.beta), before)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_variables(mode, tie_weights):
    layer = layers.ReversibleEmbedding(6, 4, tie_weights=tie_weights)
    layer.build()
    layer.quantize(mode)
    found = _compat.quantized_variables(layer)
    assert {id(v) for v in found.values()} == {id(v) for v in layer.variables}
    assert all(getattr(layer, name) is v for name, v in found.items())


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_kernel_of_and_unquantized_variables(mode):
    layer = layers.Dense(4)
    layer.build((None, 6))
    bias = layer.bias
    layer.quantize(mode)
    kernel = _compat.quantized_kernel_of(layer)
    assert kernel is layer._kernel and kernel.dtype == "int8"
    assert _compat.unquantized_variables(layer) == [bias]


def test_quantized_kernel_of_another_name():
    """Keras's GPTQ replaces the kernel by a variable of another name."""
    layer = layers.Dense(4, dtype="gptq/4/-1_from_float32")
    layer.build((None, 6))
    assert _compat.quantized_kernel_of(layer) is layer.quantized_kernel
    assert layer.quantized_kernel.dtype == "uint8"


@pytest.mark.one_backend
def test_check_before_export(monkeypatch, tmp_path):
    """Tasks and backbones call it before anything is written."""
    import keras_hub
    from keras_hub.src.utils.transformers.export import hf_exporter

    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=5,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=2,
        intermediate_dim=4,
        head_dim=2,
    )
    task = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    # At the end KerasHub's own function is there again.
    monkeypatch.setattr(
        hf_exporter, "export_backbone", hf_exporter.export_backbone
    )
    seen = []

    def check(backbone):
        seen.append(backbone)
        raise ValueError("no export")

    for _ in range(2):
        assert _compat.check_before_export(check)
    for model in (backbone, task):
        with pytest.raises(ValueError, match="no export"):
            model.export_to_transformers(tmp_path / "files")
    assert seen == [backbone, backbone] and not list(tmp_path.iterdir())


def test_check_before_export_without_an_exporter(monkeypatch):
    monkeypatch.setitem(sys.modules, _compat.kerashub._EXPORTER, None)
    assert not _compat.check_before_export(print)
    monkeypatch.delitem(sys.modules, "keras_hub", raising=False)
    assert not _compat.check_before_export(print)


def test_transformers_converters():
    """KerasHub's converters, by the names that transformers has."""
    found = _compat.transformers_converters()
    assert {"bert", "gpt2", "llama", "gemma", "gemma2", "vit"} <= set(found)
    for model_type, converter in found.items():
        assert callable(converter.convert_weights), model_type
        assert callable(converter.convert_backbone_config), model_type
        assert issubclass(converter.backbone_cls, keras.Model), model_type
    assert found["gemma"] is found["gemma2"] is not found["llama"]


def test_exported_config():
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=32,
        max_sequence_length=6,
    )
    config = _compat.exported_config(backbone)
    assert config["model_type"] == "gpt2" and config["n_embd"] == 8
    kra.inject(backbone, kra.LoRA(2), targets=["query"])
    assert _compat.exported_config(backbone) == config
    assert _compat.exported_config(_model()) is None


@pytest.mark.one_backend
@pytest.mark.parametrize("mode", quantizing.MODES)
def test_dequantized_kernel(mode):
    """It is the kernel by which Keras's own product multiplies."""
    if not quantizing.has(mode):
        pytest.skip(f"This Keras has no {mode}.")
    model = quantizing.quantized(mode)
    for name in quantizing.SITES:
        layer = model.get_layer(name)
        layer.activation = None
        layer.bias = None
        dim = {"query": 8, "up": 10, "down": 12}[name]
        units = np.eye(dim, dtype="float32")[None]
        expected = keras.ops.convert_to_numpy(layer(units))[0]
        found = keras.ops.convert_to_numpy(_compat.dequantized_kernel(layer))
        assert _compat.can_dequantize(layer)
        # Float8 rounds a 1 exactly at the scale of an untrained layer.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_can_dequantize():
    dense, embedding = layers.Dense(4), layers.Embedding(6, 4)
    dense.build((None, 6))
    embedding.build()
    assert not _compat.can_dequantize(dense)
    embedding.quantize("int8")
    dense.quantize("int8")
    assert _compat.can_dequantize(dense)
    assert not _compat.can_dequantize(embedding)


@pytest.mark.one_backend
def test_is_calibrated_and_has_float_kernel():
    model = quantizing.quantized("gptq", ["up"])
    down = model.get_layer("down")
    down.quantize("gptq", config=model.get_layer("up").quantization_config)
    found = [_compat.is_calibrated(model.get_layer(n)) for n in ("up", "down")]
    assert found == [True, False]
    floats = [
        _compat.has_float_kernel(model.get_layer(n)) for n in ("up", "down")
    ]
    assert floats == [False, True]
    assert _compat.kernel_of(model.get_layer("up")).dtype == "uint8"


@pytest.mark.one_backend
@pytest.mark.parametrize("mode", quantizing.MODES)
def test_product_variables(mode):
    """They are all that the product reads."""
    if not quantizing.has(mode):
        pytest.skip(f"This Keras has no {mode}.")
    layer = quantizing.quantized(mode, ["up"]).get_layer("up")
    found = _compat.product_variables(layer)
    own = {id(v) for v in layer.variables if v is not layer.bias}
    assert {id(v) for v in found.values()} == own


def test_recorded_layer():
    layer = layers.Dense(4)
    layer.build((None, 6))
    x = np.ones((2, 6), "float32")
    y = keras.ops.convert_to_numpy(layer(x))
    before, variables = set(vars(layer)), list(layer.variables)
    restore = _compat.recorded_layer(layer)
    layer.quantize("int4")
    layer.bias.trainable = False
    for _ in range(2):
        restore()
        assert set(vars(layer)) == before
        assert list(map(id, layer.variables)) == list(map(id, variables))
        assert layer.quantization_mode is None and layer.bias.trainable
        assert len(layer.trainable_variables) == 2
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x)), y)
    layer.quantize("int8")
    assert layer.quantization_mode == "int8"


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="PyTorch alone has torch.compile"
)
def test_is_compiling():
    import torch

    assert not _compat.is_compiling()
    step = torch.compile(
        lambda x: x + 1 if _compat.is_compiling() else x, backend="eager"
    )
    assert float(step(torch.zeros(()))) == 1.0
