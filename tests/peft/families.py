"""Small models of transformers and KerasHub's conversions of them."""

import importlib.metadata
import json
import os

import keras
import numpy as np
import pytest

#: For tests of families that older releases of KerasHub convert in part.
needs_new_hub = pytest.mark.skipif(
    [int(n) for n in importlib.metadata.version("keras-hub").split(".")[:2]]
    < [0, 32],
    reason="older KerasHub has fewer converters, and reads transformers 4's "
    "files alone",
)

#: For tests that import PyTorch. TensorFlow, which KerasHub imports, crashes
#: the process if PyTorch comes after it, and the backend comes first.
NEEDS_TORCH = [
    pytest.mark.one_backend("torch"),
    pytest.mark.skipif(
        keras.config.backend() != "torch",
        reason="PyTorch can't be imported after TensorFlow",
    ),
    needs_new_hub,
]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_SIZES = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=61,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_DECODER = dict(
    _SIZES, num_key_value_heads=1, head_dim=12, max_position_embeddings=32
)
_NO_HEAD_DIM = {k: v for k, v in _DECODER.items() if k != "head_dim"}
_ROBERTA = dict(
    _SIZES, max_position_embeddings=34, pad_token_id=1, layer_norm_eps=1e-5
)
_IMAGES = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)

# KerasHub's models have these numbers as constants.
_VIT = dict(_IMAGES, layer_norm_eps=1e-6)
_QWEN3 = dict(_DECODER, rms_norm_eps=1e-5)

#: Family: the classes of config and base model in transformers, the task class
#: for the tests with a prefix, and the arguments of the config.
FAMILIES = {
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        dict(_SIZES, max_position_embeddings=32, hidden_act="gelu_new"),
    ),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        _ROBERTA,
    ),
    "xlm-roberta": (
        "XLMRobertaConfig",
        "XLMRobertaForSequenceClassification",
        _ROBERTA,
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        dict(
            dim=24,
            hidden_dim=40,
            n_layers=2,
            n_heads=2,
            vocab_size=61,
            max_position_embeddings=32,
        ),
    ),
    "albert": (
        "AlbertConfig",
        "AlbertForSequenceClassification",
        dict(_SIZES, embedding_size=12, max_position_embeddings=32),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_inner=96,
            vocab_size=61,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(_DECODER, tie_word_embeddings=False),
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        dict(_DECODER, sliding_window=16),
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _DECODER),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(_DECODER, query_pre_attn_scalar=12),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(_DECODER, query_pre_attn_scalar=12),
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _NO_HEAD_DIM),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _QWEN3),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _NO_HEAD_DIM),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        dict(_NO_HEAD_DIM, num_local_experts=3, sliding_window=None),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        dict(
            _NO_HEAD_DIM,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        dict(
            _DECODER,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        dict(
            _DECODER,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
            hidden_size_per_layer_input=0,
            global_head_dim=12,
            num_global_key_value_heads=1,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
        ),
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _VIT),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _IMAGES),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {k: v for k, v in _IMAGES.items() if k != "intermediate_size"},
    ),
    "dinov3": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        dict(_IMAGES, layer_norm_eps=1e-5),
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        dict(
            image_size=16,
            patch_size=2,
            embed_dim=12,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
    ),
    "t5gemma": ("T5GemmaConfig", "T5GemmaForConditionalGeneration", None),
}


#: Families whose experts `kra.peft` knows.
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gemma4")


def _t5gemma():
    import transformers

    module = transformers.T5GemmaModuleConfig
    part = dict(_DECODER, hidden_size=24)
    return transformers.T5GemmaConfig(
        encoder=module(**part),
        decoder=module(**part, cross_attention_hidden_size=24),
        vocab_size=61,
        tie_word_embeddings=True,
    )


def torch_model(family, seed=0):
    """A task model of transformers with random weights."""
    import torch
    import transformers

    config_name, task_name, arguments = FAMILIES[family]
    if arguments is None:
        config = _t5gemma()
    else:
        config = getattr(transformers, config_name)(**arguments)
    torch.manual_seed(seed)
    cls = getattr(transformers, task_name)
    model = cls(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Biases and scales start as zeros and ones, which hide mistakes.
            if "token_type" in name:
                # KerasHub's RoBERTa has none.
                weight.zero_()
            else:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(0.05 * noise)
                # KerasHub's converter of Mistral rounds to 16 bits.
                weight.copy_(weight.half().float())
    return model.eval()


def keras_model(model, folder):
    """KerasHub's backbone with the weights of a model of transformers."""
    import keras_hub

    model.save_pretrained(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "num_local_experts" in config:
        # transformers 5 has renamed it, and checkpoints and KerasHub have not.
        config.setdefault("num_experts", config["num_local_experts"])
        path.write_text(json.dumps(config))
    return keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")


def inputs(backbone, seed=0):
    """Inputs of a backbone as a dict or an array."""
    generator = np.random.default_rng(seed)
    if isinstance(backbone.input, dict) and "token_ids" in backbone.input:
        ids = generator.integers(3, 60, (2, 7)).astype("int32")
        x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        if "segment_ids" in backbone.input:
            x["segment_ids"] = np.zeros_like(ids)
        if "position_ids" in backbone.input:
            x["position_ids"] = np.tile(np.arange(7, dtype="int32"), (2, 1))
        return x
    if isinstance(backbone.input, dict) and len(backbone.input) > 1:
        ids = generator.integers(3, 60, (2, 7)).astype("int32")
        return {
            name: np.ones_like(ids) if "mask" in name else ids
            for name in backbone.input
        }
    named = isinstance(backbone.input, dict)
    (tensor,) = backbone.input.values() if named else (backbone.input,)
    x = generator.normal(size=(2, *tensor.shape[1:])).astype("float32")
    return {name: x for name in backbone.input} if named else x


def needs_torch(test):
    """Marks a test that imports PyTorch."""
    for mark in NEEDS_TORCH:
        test = mark(test)
    return test


def keras_outputs(model, x):
    """The last hidden states of a backbone of KerasHub."""
    y = model.predict(x, verbose=0)
    if isinstance(y, dict):
        for name in ("sequence_output", "decoder_sequence_output"):
            if name in y:
                return y[name]
    return y


def torch_outputs(model, x):
    """The last hidden states of the base model in a model of transformers."""
    import torch

    base = model.base_model if hasattr(model, "base_model") else model
    if type(base).__name__ == "DINOv3ViTEncoder":
        # transformers calls a part of this model its base.
        base = model
    with torch.no_grad():
        images = [x] if isinstance(x, np.ndarray) else list(x.values())
        if images[0].ndim == 4:
            (x,) = images
            y = base(pixel_values=torch.tensor(x).permute(0, 3, 1, 2))
        elif "token_ids" in x:
            ids = torch.tensor(x["token_ids"]).long()
            y = base(ids, attention_mask=torch.ones_like(ids))
        else:
            ids = torch.tensor(x["encoder_token_ids"]).long()
            y = base(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                decoder_input_ids=ids,
                decoder_attention_mask=torch.ones_like(ids),
            )
    return y.last_hidden_state.numpy()


def train(model, seed=0, scale=0.1):
    """Gives all trainable weights of a model random values."""
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = scale * generator.normal(size=variable.shape)
        value = keras.ops.convert_to_numpy(variable) + noise
        variable.assign(value.astype("float32"))
