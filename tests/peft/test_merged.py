"""Merged checkpoints, against transformers, KerasHub and GGUF."""

import json
import os

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from tests import zoo
from tests.peft import families
from tests.peft import hub

pytestmark = pytest.mark.one_backend

_QUICK = ("bert", "llama")
#: Families whose converters drop numbers of the checkpoint. They are written
#: with the checkpoint of the base model.
_INCOMPLETE = {
    "gemma4": "layer_scalar",
    "roberta": "shapes of the checkpoint's tensors are not known",
    "xlm-roberta": "computes its values: arithmetic",
}
#: Families whose converters do not tell the whole config.
_NEED_CONFIG = ("smollm3", "t5gemma")


def _adapted(model, adapter=None, targets="all-linear", **options):
    adapter = adapter or kra.RLoRA(4, seed=1)
    kra.inject(model, adapter, targets=targets, **options)
    families.train(model)
    return model


@families.needs_torch
@pytest.mark.filterwarnings(
    'ignore:`targets="all-linear"` leaves out:keras_randadapt.AdapterWarning'
)
@pytest.mark.parametrize(
    "family",
    [
        name
        if name in _QUICK
        else pytest.param(name, marks=pytest.mark.slow("one of many families"))
        for name in families.FAMILIES
    ],
)
def test_transformers_computes_the_same(family, tmp_path):
    import transformers

    torch_model = families.torch_model(family)
    config = torch_model.config.to_dict()
    model = families.keras_model(torch_model, tmp_path / "base")
    x = families.inputs(model)
    apart = np.abs(
        families.keras_outputs(model, x)
        - families.torch_outputs(torch_model, x)
    ).max()
    _adapted(model, experts=family in families.MIXTURES)
    ours = families.keras_outputs(model, x)
    if family in _INCOMPLETE:
        with pytest.raises(ValueError, match=_INCOMPLETE[family]):
            kra.peft.save_merged(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        kra.peft.save_merged(
            model, tmp_path / "merged", checkpoint=tmp_path / "base"
        )
    else:
        # The activation of this model is none that KerasHub's BERT knows of.
        given = config if family in (*_NEED_CONFIG, "bert", "vit") else None
        kra.peft.save_merged(model, tmp_path / "merged", config=given)
    merged, report = transformers.AutoModel.from_pretrained(
        str(tmp_path / "merged"), output_loading_info=True
    )
    # A pooler is no part of KerasHub's vision models, and there may be no
    # register tokens.
    sizes = {key: one.numel() for key, one in merged.state_dict().items()}
    assert not [
        key
        for key in report["missing_keys"]
        if "pooler" not in key and sizes[key]
    ]
    # A backbone has the head of its task.
    assert all(
        key.startswith(("lm_head.", "classifier."))
        for key in report["unexpected_keys"]
    )
    theirs = families.torch_outputs(merged.eval(), x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 + apart)


@families.needs_torch
def test_the_head_of_a_decoder_is_there(tmp_path):
    """transformers' causal model computes the merged logits."""
    import torch
    import transformers

    model = families.keras_model(
        families.torch_model("llama"), tmp_path / "base"
    )
    _adapted(model)
    x = families.inputs(model)
    hidden = model.predict(x, verbose=0)
    logits = keras.ops.convert_to_numpy(
        model.token_embedding(hidden, reverse=True)
    )
    kra.peft.save_merged(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "merged")
    ).eval()
    with torch.no_grad():
        theirs = merged(torch.tensor(x["token_ids"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-4)


@families.needs_torch
@pytest.mark.slow("KerasHub's loader is slow, and two families are enough")
@pytest.mark.parametrize("family", ["qwen3", "swin"])
def test_keras_hub_reads_it_again(family, tmp_path):
    import keras_hub

    model = families.keras_model(families.torch_model(family), tmp_path / "a")
    _adapted(model)
    x = families.inputs(model)
    ours = families.keras_outputs(model, x)
    kra.peft.save_merged(model, tmp_path / "merged")
    again = keras_hub.models.Backbone.from_preset(
        str(tmp_path / "merged"), dtype="float32"
    )
    np.testing.assert_allclose(
        families.keras_outputs(again, x), ours, atol=1e-5
    )


def _gguf(folder, path):
    """A GGUF file of a checkpoint, as llama.cpp's converter lays it out."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    kind, layers = config["model_type"], config["num_hidden_layers"]
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, layers)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(
        config["hidden_size"] // config["num_attention_heads"]
    )
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    found = {}
    for key, array in tensors.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        heads = {
            "q_proj": "num_attention_heads",
            "k_proj": "num_key_value_heads",
        }
        part = key.split(".")[-2]
        if kind == "llama" and part in heads:
            # llama.cpp turns pairs of neighbours, and transformers halves.
            halves = array.reshape(config[heads[part]], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(
                array.shape
            )
        found[name] = array
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arch, found


@families.needs_torch
@pytest.mark.slow("it needs the package gguf")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf(family, tmp_path):
    """A GGUF file of the checkpoint is complete, and computes the same.

    transformers reads the file, with a map of names of its own.
    """
    import gguf
    import torch
    import transformers

    torch_model = families.torch_model(family)
    model = families.keras_model(torch_model, tmp_path / "a")
    _adapted(model)
    x = families.inputs(model)
    ours = families.keras_outputs(model, x)
    kra.peft.save_merged(model, tmp_path / "merged", checkpoint=tmp_path / "a")
    path = tmp_path / "model.gguf"
    arch, found = _gguf(tmp_path / "merged", path)
    read = {one.name: one for one in gguf.GGUFReader(path).tensors}
    assert set(read) == set(found)
    for name, array in found.items():
        np.testing.assert_array_equal(read[name].data, array)
    # llama.cpp can do without these.
    without = {"ROPE_FREQS", "ATTN_ROT_EMBD"}
    if torch_model.config.tie_word_embeddings:
        without.add("OUTPUT")
    needed = {
        gguf.TENSOR_NAMES[one].format(bid=bid) + ".weight"
        for one in gguf.MODEL_TENSORS[arch]
        for bid in range(2)
        if one.name not in without
        and "EXP" not in one.name
        and one.name != "FFN_GATE_INP"
    }
    assert needed <= set(read)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="model.gguf", dtype=torch.float32
    )
    theirs = families.torch_outputs(again.eval(), x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.every_backend
def test_fused_modules(tmp_path):
    """Three kernels of GPT-2 are one tensor again."""
    model = _adapted(hub.gpt2(), kra.LoRA(2), ["query"])
    before = [keras.ops.convert_to_numpy(w).copy() for w in model.weights]
    kra.peft.save_merged(model, tmp_path / "a")
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    fused = tensors["h.1.attn.c_attn.weight"]
    kra.merge(model)
    attention = model.transformer_layers[1]._self_attention_layer
    parts = [
        keras.ops.convert_to_numpy(one.kernel).reshape(24, 24)
        for one in (
            attention.query_dense,
            attention.key_dense,
            attention.value_dense,
        )
    ]
    np.testing.assert_allclose(fused, np.concatenate(parts, axis=1), atol=1e-6)
    assert tensors["h.1.attn.c_attn.bias"].shape == (72,)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["n_embd"] == 24
    assert sorted(os.listdir(tmp_path / "a")) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_model_without_adapters_and_one_merged_already(tmp_path):
    model = hub.gpt2()
    kra.peft.save_merged(model, tmp_path / "plain")
    _adapted(model, kra.LoRA(2), ["query"])
    kra.peft.save_merged(model, tmp_path / "adapted")
    with kra.merged(model):
        kra.peft.save_merged(model, tmp_path / "block")
    with kra.disabled(model):
        pass
    files = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("plain", "adapted", "block")
    ]
    assert files[0] != files[1] == files[2]


@families.needs_new_hub
def test_what_is_refused(tmp_path):
    model = hub.roberta()
    with pytest.raises(ValueError, match="more than this model holds"):
        kra.peft.save_merged(model, tmp_path / "a")
    with pytest.raises(ValueError, match="stopped half-way"):
        kra.peft.save_merged(hub.gpt_oss(), tmp_path / "a")
    with pytest.raises(ValueError, match="no converter"):
        kra.peft.save_merged(hub.plain(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_else_is_refused(tmp_path):
    model = hub.gpt2()
    with pytest.raises(TypeError, match="`config` must be a dict"):
        kra.peft.save_merged(model, tmp_path / "a", config="config.json")
    with pytest.raises(ValueError, match="own type, 'gpt2'"):
        kra.peft.save_merged(
            model, tmp_path / "a", config={"model_type": "bert"}
        )
    kra.inject(model, kra.Bottleneck(2))
    with pytest.raises(ValueError, match="merge"):
        kra.peft.save_merged(model, tmp_path / "a")
    kra.eject(model)
    model.quantize("int8")
    with pytest.raises(ValueError, match="layers are quantized"):
        kra.peft.save_merged(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_config_of_several_parts_is_asked_for(tmp_path):
    """KerasHub's converter reads some of it, and a part would be wrong."""
    model = zoo.set_weights(hub.t5gemma())
    with pytest.raises(ValueError, match="Pass the base model's `config.json`"):
        kra.peft.save_merged(model, tmp_path / "a")
    kra.peft.save_merged(
        model, tmp_path / "a", config={"model_type": "t5gemma", "x": 1}
    )
    text = (tmp_path / "a" / "config.json").read_text()
    assert json.loads(text) == {"model_type": "t5gemma", "x": 1}


@families.needs_torch
def test_what_keras_hub_leaves_out_is_the_base_checkpoints(tmp_path):
    """Reserved positions, the head and the tokenizer come from there."""
    torch_model = families.torch_model("roberta")
    model = families.keras_model(torch_model, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    _adapted(model)
    kra.peft.save_merged(model, tmp_path / "a", checkpoint=tmp_path / "base")
    base = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    assert set(found) == set(base)
    changed = {key for key in base if not np.array_equal(found[key], base[key])}
    names = kra.peft.name_map(model)
    assert changed == {f"{module}.weight" for module in _dense_modules(names)}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"


def _dense_modules(names):
    return {
        module
        for module, places in names.by_module().items()
        if places[0][1].kind == "linear"
    }


@families.needs_torch
def test_another_checkpoint_is_refused(tmp_path):
    model = families.keras_model(
        families.torch_model("roberta"), tmp_path / "base"
    )
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)

    def refused(message, **changed):
        safetensors.numpy.save_file(
            {
                key: value
                for key, value in {**tensors, **changed}.items()
                if value is not None
            },
            path,
        )
        with pytest.raises(ValueError, match=message):
            kra.peft.save_merged(
                model, tmp_path / "a", checkpoint=tmp_path / "base"
            )
        assert not (tmp_path / "a").exists()

    start = "roberta.embeddings"
    words = f"{start}.word_embeddings.weight"
    positions = f"{start}.position_embeddings.weight"
    refused("lacks the tensor", **{words: None})
    refused("lacks the tensor", **{positions: None})
    refused(r"of shape \(60, 24\)", **{words: tensors[words][1:]})
    refused("is not what|it was trained", **{positions: tensors[positions] + 1})
    refused("it was trained", **{positions: tensors[positions][:-1]})
    refused("as C64", **{"x": np.zeros(2, "complex64")})
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        kra.peft.save_merged(
            model, tmp_path / "a", checkpoint=tmp_path / "base"
        )
    with pytest.raises(ValueError, match="must be the directory"):
        kra.peft.save_merged(model, tmp_path / "a", checkpoint=path)
    with pytest.raises(ValueError, match="are the same"):
        kra.peft.save_merged(
            model, tmp_path / "base", checkpoint=tmp_path / "base"
        )
    with pytest.raises(FileNotFoundError):
        kra.peft.save_merged(
            model, tmp_path / "a", checkpoint=tmp_path / "nothing"
        )
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        kra.peft.save_merged(model, tmp_path / "b", checkpoint=tmp_path / "c")
