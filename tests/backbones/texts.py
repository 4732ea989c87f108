"""Tiny backbones whose inputs are texts alone."""

from tests.backbones import row
from tests.backbones.row import of_class

_VOCABULARY = {"vocabulary_size": row.VOCABULARY}
_SIZES = {"hidden_dim": 8, "intermediate_dim": 12}
_ENCODER = {**_VOCABULARY, **_SIZES, "num_layers": 2, "num_heads": 2}
_LIMITED = {**_ENCODER, "max_sequence_length": 8}
_QUIET = {**_LIMITED, "dropout": 0.0}
_DECODER = {
    **_VOCABULARY,
    **_SIZES,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_experts": 3, "top_k": 2}
#: The rows of Qwen3.5 have one layer with attention and one without.
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 3,
    "partial_rotary_factor": 0.5,
    "head_dim": 8,
}


def _t5gemma(side):
    sizes = {
        "hidden_dim": 8,
        "intermediate_dim": 12,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    return {f"{side}_{name}": value for name, value in sizes.items()}


_T5GEMMA = {
    **_VOCABULARY,
    **_t5gemma("encoder"),
    **_t5gemma("decoder"),
    "sliding_window": 4,
    "query_pre_attn_scalar": 4.0,
}

_ARGUMENTS = {
    "AlbertBackbone": {**_QUIET, "embedding_dim": 4},
    "BartBackbone": _QUIET,
    "BertBackbone": _QUIET,
    "BloomBackbone": _ENCODER,
    "DebertaV3Backbone": {**_QUIET, "bucket_size": 4},
    "DistilBertBackbone": _QUIET,
    "ESMBackbone": _QUIET,
    "EdRecBackbone": {
        **_SIZES,
        "vocab_size": row.VOCABULARY,
        "num_layers_enc": 2,
        "num_layers_dec": 2,
        "num_heads": 2,
    },
    "ElectraBackbone": {
        **_SIZES,
        "vocab_size": row.VOCABULARY,
        "num_layers": 2,
        "num_heads": 2,
        "embedding_dim": 4,
        "dropout": 0.0,
        "max_sequence_length": 8,
    },
    "FNetBackbone": {
        **_VOCABULARY,
        **_SIZES,
        "num_layers": 2,
        "dropout": 0.0,
        "max_sequence_length": 8,
    },
    "FalconBackbone": {
        **_VOCABULARY,
        **_SIZES,
        "num_layers": 2,
        "num_attention_heads": 2,
    },
    "GPT2Backbone": _QUIET,
    "GPTNeoXBackbone": {**_LIMITED, "rotary_percentage": 0.5},
    "GemmaBackbone": {**_DECODER, "head_dim": 4},
    "GptOssBackbone": {**_DECODER, **_EXPERTS, "sliding_window": 4},
    "Llama3Backbone": _DECODER,
    "LlamaBackbone": _DECODER,
    "MistralBackbone": {**_DECODER, "sliding_window": 4},
    "MixtralBackbone": {**_DECODER, **_EXPERTS, "sliding_window": 4},
    "OPTBackbone": _QUIET,
    "Phi3Backbone": {**_DECODER, "max_sequence_length": 8},
    "Qwen3Backbone": {**_DECODER, "head_dim": 4},
    "Qwen3MoeBackbone": {
        **_DECODER,
        **_EXPERTS,
        "head_dim": 4,
        "moe_intermediate_dim": 6,
    },
    "Qwen3_5Backbone": {**_DECODER, **_LINEAR_ATTENTION},
    "Qwen3_5MoeBackbone": {
        **_VOCABULARY,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 8,
        "moe_intermediate_dim": 6,
        "shared_expert_intermediate_size": 6,
    },
    "QwenBackbone": _DECODER,
    "QwenMoeBackbone": {
        **_DECODER,
        **_EXPERTS,
        "moe_intermediate_dim": 6,
        "shared_expert_intermediate_dim": 6,
    },
    "RWKV7Backbone": {
        **_VOCABULARY,
        "hidden_size": 16,
        "head_size": 4,
        "num_layers": 2,
        "intermediate_dim": 12,
        "gate_lora": 4,
        "mv_lora": 4,
        "aaa_lora": 4,
        "decay_lora": 4,
    },
    "RobertaBackbone": _QUIET,
    "RoformerV2Backbone": {**_ENCODER, "head_size": 4, "dropout": 0.0},
    "SmolLM3Backbone": {
        **_VOCABULARY,
        **_SIZES,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [True, False],
        "layer_types": ["attention", "attention"],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 8,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "T5Backbone": {**_ENCODER, "dropout": 0.0},
    "T5Gemma2Backbone": _T5GEMMA,
    "T5GemmaBackbone": _T5GEMMA,
    "XLMRobertaBackbone": _QUIET,
    "XLNetBackbone": _ENCODER,
}
_TEXT_TOWER = {
    **_LIMITED,
    "embedding_dim": 8,
}
for _name in ("CLIPTextEncoder", "MetaCLIP2TextEncoder", "SigLIPTextEncoder"):
    _ARGUMENTS[_name] = {**_TEXT_TOWER, "max_sequence_length": row.LENGTH}

ROWS = {
    name: of_class(name, **arguments) for name, arguments in _ARGUMENTS.items()
}
