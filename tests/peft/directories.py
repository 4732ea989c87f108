"""Directories as PEFT writes them, without PEFT."""

import json

import numpy as np
import safetensors.numpy

START = "base_model.model.model.layers.{}.self_attn.{}_proj"


def modules():
    return [START.format(i, side) for i in range(2) for side in "qv"]


def write(folder, tensors=None, config=None):
    """A LoRA of rank 2 for the small Llama, as PEFT writes one."""
    generator = np.random.default_rng(0)
    content = {}
    for module in modules():
        n_out = 24 if "q_proj" in module else 12
        content[f"{module}.lora_A.weight"] = generator.normal(size=(2, 24))
        content[f"{module}.lora_B.weight"] = generator.normal(size=(n_out, 2))
    content.update(tensors or {})
    content = {
        key: np.ascontiguousarray(array.astype("float32"))
        if array.dtype == np.float64
        else array
        for key, array in content.items()
        if array is not None
    }
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        **(config or {}),
    }
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(content, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return content
