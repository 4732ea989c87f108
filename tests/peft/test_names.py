"""The map between sites and transformers' modules, on KerasHub alone."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.model import state as state_lib
from keras_randadapt.peft import family
from keras_randadapt.peft import recording
from keras_randadapt.peft import shapes
from tests.peft import families
from tests.peft import hub

pytestmark = pytest.mark.one_backend


def _part(names, ending, number=0):
    (address,) = [a for a in names.parts if a.endswith(ending)]
    return names.parts[address][number]


def _weights(model):
    return [keras.ops.convert_to_numpy(w).copy() for w in model.weights]


def test_a_decoder_by_name_and_number():
    model = hub.llama()
    names = kra.peft.name_map(model)
    assert names.model_type == "llama" and names.prefix == "model"
    assert not names.refused
    part = _part(
        names, "llama_transformer_decoder_1/_self_attention_layer/_query_dense"
    )
    assert part.module == "model.layers.1.self_attn.q_proj"
    assert part.kind == "linear" and part.weight_shape == (24, 24)
    # The kernel is (hidden, heads, size), and PyTorch's rows count the heads
    # and then their numbers.
    np.testing.assert_array_equal(part.inputs, np.arange(24))
    np.testing.assert_array_equal(part.outputs, np.arange(24))
    text = str(names)
    assert "model.layers.0.mlp.gate_proj (linear, all outputs)" in text
    assert "15 sites" in text


def test_several_sites_in_one_module():
    names = kra.peft.name_map(hub.gpt2())
    places = names.by_module()["transformer.h.1.attn.c_attn"]
    assert [part.kind for _, part in places] == ["conv1d"] * 3
    assert {part.weight_shape for _, part in places} == {(24, 72)}
    starts = {
        address.rpartition("/")[2]: int(part.outputs[0])
        for address, part in places
    }
    assert starts == {"query_dense": 0, "key_dense": 24, "value_dense": 48}
    assert "outputs 24 to 47" in str(names)


@families.needs_new_hub
def test_several_modules_in_one_site():
    names = kra.peft.name_map(hub.swin())
    parts = next(p for p in names.parts.values() if len(p) > 1)
    assert [part.module.rpartition(".")[2] for part in parts] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    columns = np.concatenate([part.columns for part in parts])
    np.testing.assert_array_equal(columns, np.arange(36))
    for part in parts:
        np.testing.assert_array_equal(part.outputs, np.arange(12))
        # Files of checkpoints have the names of transformers 4.
        assert ".attention.self." in part.file_module


def test_nothing_changes_and_adapters_do_not_matter():
    model = hub.gpt2()
    before = _weights(model)
    plain = str(kra.peft.name_map(model))
    for ours, theirs in zip(_weights(model), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    kra.inject(model, kra.LoRA(2), targets="all-linear")
    assert str(kra.peft.name_map(model)) == plain
    assert not hasattr(model.weights[0], "assignments")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_kernels_have_the_same_map(mode):
    model = hub.llama()
    plain = kra.peft.name_map(model)
    model.quantize(mode, filters="query|gate")
    kra.inject(model, kra.LoRA(2), targets="all-linear")
    packed = kra.peft.name_map(model)
    assert packed.modules() == plain.modules()
    for address, parts in plain.parts.items():
        for ours, theirs in zip(packed.parts[address], parts, strict=True):
            np.testing.assert_array_equal(ours.inputs, theirs.inputs)
            np.testing.assert_array_equal(ours.outputs, theirs.outputs)


def test_a_task_has_the_map_of_its_backbone():
    backbone = hub.bert()
    task = hub.bert_classifier(backbone)
    ours = kra.peft.name_map(task)
    ours_layers = state_lib.layers_of(task)
    assert set(ours.modules()) == set(kra.peft.name_map(backbone).modules())
    outside = [
        ours_layers[a].name
        for a, why in ours.refused.items()
        if "does not fill it" in why
    ]
    assert outside == ["logits"]


def test_tied_embeddings_are_refused():
    names = kra.peft.name_map(hub.gpt2())
    (address,) = names.refused
    assert "share its weights" in names.refused[address]


def test_a_mixture_of_experts_says_what_it_cannot():
    names = kra.peft.name_map(hub.mixtral())
    routers = [a for a in names.refused if "router" in names.refused[a]]
    assert len(routers) == 2
    assert not any(module.endswith("gate") for module in names.modules())
    names = kra.peft.name_map(hub.gpt_oss())
    assert "stopped before it" in " ".join(names.refused.values())


@pytest.mark.parametrize(
    "model, message",
    [
        (hub.no_converter, "no converter from transformers for a Bloom"),
        (hub.plain, "no converter from transformers for a Functional"),
    ],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        kra.peft.name_map(model())
    with pytest.raises(TypeError, match="must be a `keras.Model`"):
        kra.peft.name_map("model")


def test_the_first_llama_has_the_names_of_the_third():
    names = kra.peft.name_map(hub.llama_1())
    assert "model.layers.0.self_attn.q_proj" in names.modules()


@families.needs_new_hub
def test_find_takes_all_names_of_a_module():
    names = kra.peft.name_map(hub.swin())
    module = names.modules()[1]
    file_module = next(
        part.file_module
        for parts in names.parts.values()
        for part in parts
        if part.module == module
    )
    for name in (module, file_module):
        assert names.find(name) == module
        assert names.find(name.removeprefix("swin.")) == module
    assert names.find("layers.0.q_proj") is None
    assert module in names.near(module + "x")


@families.needs_new_hub
def test_config_is_what_the_converter_reads():
    """Arguments with factors, sums, tuples and comparisons are undone."""
    assert kra.peft.name_map(hub.gpt2()).config["n_embd"] == 24
    names = kra.peft.name_map(hub.roberta())
    # KerasHub leaves out two positions.
    assert names.config["max_position_embeddings"] == 34
    names = kra.peft.name_map(hub.gemma2())
    assert names.model_type == "gemma2"
    assert names.config["intermediate_size"] == 40
    assert names.config["query_pre_attn_scalar"] == 12
    assert names.config_differs == []
    # Its converter does not read the dropout.
    assert kra.peft.name_map(hub.bert(dropout=0.0)).config_differs == []
    assert kra.peft.name_map(hub.bert(num_segments=3)).config_differs == [
        "num_segments"
    ]
    names = kra.peft.name_map(hub.swin())
    assert names.config["depths"] == (1, 1) and names.config_differs == []


# The stand-ins of a checkpoint.


def test_a_tensor_replays_what_was_done_to_it():
    x = np.arange(24).reshape(4, 6)
    tensor = recording.Tensor(key="w")
    for function in (
        lambda w: np.transpose(w),
        lambda w: w.T.reshape((2, 3, 4)),
        lambda w: w.T.reshape(2, 3, 4).swapaxes(0, 1),
        lambda w: np.reshape(w[:, 2:4], (8,)),
        lambda w: np.split(w, 2, axis=1)[1],
        lambda w: np.concatenate([w, w], axis=0).T,
        lambda w: np.expand_dims(w.astype("float16"), 0),
        lambda w: w.transpose((1, 0)),
        lambda w: w.transpose(),
        lambda w: np.stack([w, w]),
    ):
        recorded = function(tensor)
        assert recorded.opaque is None and recorded.keys() == ["w"]
        np.testing.assert_array_equal(recorded.replay({"w": x}), function(x))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda w: w + 1, "arithmetic"),
        (lambda w: 2 * w, "arithmetic"),
        (lambda w: np.add(w, 1), "numpy.add"),
        (lambda w: np.flip(w.T, 0), "numpy.flip"),
        (lambda w: np.mean(w), "numpy.mean"),
    ],
)
def test_what_computes_is_opaque(function, message):
    made = np.transpose(function(recording.Tensor(key="w")))
    assert message in made.opaque


def test_shapes_are_asked_for_in_vain():
    tensor = recording.Tensor(key="w")
    with pytest.raises(AttributeError, match="`shape` of a tensor"):
        tensor.shape
    with pytest.raises(TypeError):
        list(tensor)


def _assignment(layer, attribute, shape, value):
    return recording.Assignment(layer, attribute, layer.kernel, shape, value)


def test_a_shape_that_may_be_two_is_refused():
    """Nothing is guessed where two shapes give two maps."""
    layer = keras.layers.Dense(6)
    layer.build((None, 4))
    tensor = recording.Tensor(key="w.weight")
    value = np.reshape(np.transpose(tensor), [4, 6])
    one = _assignment(layer, "kernel", (4, 6), value)
    origins, refused = shapes.origins_of(
        [one], lambda one: None, lambda one, origin: str(origin.coordinates)
    )
    assert not origins and "may have the shape" in refused[0]
    # A linear layer's is known: its rows are outputs.
    origins, refused = shapes.origins_of(
        [one],
        lambda one: 2,
        lambda one, origin: True if origin.shapes == ((6, 4),) else None,
    )
    assert origins[0].shapes == ((6, 4),) and not refused


def test_a_site_that_is_no_low_rank_update_is_refused():
    """A kernel whose inputs are a module's outputs in part."""
    from keras_randadapt.peft import parts

    layer = keras.layers.Dense(4)
    layer.build((None, 4))
    rows, columns = np.indices((4, 4))

    def split(move):
        origin = shapes.Origin(
            ("w",), ((4, 4),), (move(rows), move(columns)), None
        )
        return parts.splits(layer, origin)

    def mix(array):
        # Half of the inputs and half of the outputs change places.
        mixed = array.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3)
        return mixed.reshape(4, 4)

    assert split(mix) is None
    # A weight whose rows are twice the same one is no rearrangement.
    assert split(lambda array: array[[0, 1, 1, 2]].T) is None
    ((kind, columns, inputs, outputs),) = split(lambda array: array[::-1].T)
    assert kind == "linear" and list(outputs) == [3, 2, 1, 0]
    assert list(inputs) == list(columns) == [0, 1, 2, 3]


def test_renamed_modules():
    assert (
        family.renamed("vit", "vit.encoder.layer.3.attention.attention.query")
        == "vit.layers.3.attention.q_proj"
    )
    assert family.renamed("llama", "model.x") == "model.x"
