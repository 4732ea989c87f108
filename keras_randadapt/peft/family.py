"""The names that transformers gives the parts of a family of models.

KerasHub's converters have the names that files of a checkpoint use. Three facts
are in neither KerasHub nor the files, so they are written here: under which
name a task class of transformers holds its base model, which converter has a
model whose config names no type, and which modules transformers 5 renamed while
the files keep their names.
"""

import re

#: The attribute under which transformers' task classes hold the base model,
#: `base_model_prefix` there. It is "model" for those that are not listed.
_PREFIXES = {
    "albert": "albert",
    "bert": "bert",
    "blip-2": "",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "dinov3_vit": "",
    "distilbert": "distilbert",
    "esm": "esm",
    "gpt2": "transformer",
    "metaclip_2": "",
    "roberta": "roberta",
    "sam3_video": "",
    "swin": "swin",
    "vit": "vit",
    "xlm-roberta": "roberta",
}

_VIT = (
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_VIT_NETWORK = (
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_VIT_LAYERS = ((r"\bencoder\.layer\.", "layers."),)

#: From the names in checkpoints to the modules of transformers 5.
_RENAMED = {
    "mixtral": ((r"\bblock_sparse_moe\b", "mlp"),),
    "vit": (*_VIT, *_VIT_NETWORK, *_VIT_LAYERS),
    "deit": (*_VIT, *_VIT_NETWORK, *_VIT_LAYERS),
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "dinov3_vit": ((r"(?<!model\.)\blayer\.", "model.layer."),),
    "swin": (
        (r"\battention\.self\.query\b", "attention.q_proj"),
        (r"\battention\.self\.key\b", "attention.k_proj"),
        (r"\battention\.self\.value\b", "attention.v_proj"),
        (r"\battention\.output\.dense\b", "attention.o_proj"),
        *_VIT_NETWORK,
    ),
}

#: The parameters with the kernels of all experts in transformers 5, in the
#: order in which its modules have them.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

#: From the names of an expert's layers in files, which are transformers 4's, to
#: the parameter and the part of its outputs.
_GATED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}
_EXPERT_LAYERS = {
    "mixtral": {
        "w1": ("gate_up_proj", 0),
        "w3": ("gate_up_proj", 1),
        "w2": ("down_proj", 0),
    },
    "qwen2_moe": _GATED,
    "qwen3_moe": _GATED,
}

#: Activations that have another name in Keras's configs.
ACTIVATIONS = {"gelu_approximate": "gelu_pytorch_tanh"}

#: Routers of mixtures of experts, which are no linear layers in transformers.
_ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|router)$")


def prefix_of(model_type):
    """The name under which task classes hold the base model, or `""`.

    Args:
        model_type: string, as in a config of transformers.
    """
    return _PREFIXES.get(model_type, "model")


def renamed(model_type, module):
    """The name of a module in transformers 5, which may be the same.

    Args:
        model_type: string, as in a config of transformers.
        module: The name in the files of a checkpoint.
    """
    for pattern, name in _RENAMED.get(model_type, ()):
        module = re.sub(pattern, name, module)
    return module


def expert_layers(model_type):
    """dict from the name of an expert's layer to `(parameter, part)`.

    Args:
        model_type: string, as in a config of transformers.
    """
    return _EXPERT_LAYERS.get(model_type, {})


def halves_of(parameter):
    """The number of layers that one of `EXPERT_PARAMETERS` holds."""
    return 2 if parameter == "gate_up_proj" else 1


def is_router(module):
    """Whether a module is the router of a mixture of experts.

    Args:
        module: The name in the files of a checkpoint.
    """
    return _ROUTER.search(module) is not None
