"""`save_merged`: writes the merged model as a checkpoint of transformers."""

import contextlib
import json
import os
import reprlib
import secrets

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import merge
from keras_randadapt.model import paths
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import tensor_data
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import family
from keras_randadapt.peft import names as names_lib

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


def save_merged(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    config: dict | None = None,
) -> None:
    """Writes a model, its active adapters merged, for transformers.

    The directory gets `config.json` and `model.safetensors`, which
    `from_pretrained` of transformers, vLLM and the converter of llama.cpp
    read, and `from_preset` of KerasHub. Tensors are in float32. The tokenizer
    is not written: it is the base model's. The model itself stays adapted; a
    model without adapters is written as it is.

    This is for families that KerasHub can load from transformers, including
    those that its own `export_to_transformers` refuses. The config is the one
    that KerasHub's exporter gives, or else what its converter reads; the rest
    is then transformers' default. Pass the base model's own as `config` where
    it has more than that, such as another activation.

    Args:
        model: A backbone or task of KerasHub, with or without adapters.
        directory: Path of the directory. It is made if it is not there, and
            files of these names are replaced.
        config: Optional dict, the content of the base model's `config.json`.

    Raises:
        TypeError: If `directory` is no path or `config` no dict.
        ValueError: If KerasHub has no converter for the model; if a number of
            the checkpoint is not in the model or can't be told from it; if a
            layer is quantized; if KerasHub can't tell the config and none is
            given; or if an active adapter can't be merged. Nothing is written
            then.

    Example:

    ```python
    kra.peft.save_merged(classifier, "merged")
    ```
    """
    state_lib.check_is_model(model)
    target = directory_lib.check_writable(directory)
    if not isinstance(config, (dict, type(None))):
        raise TypeError(
            "`config` must be a dict, the content of a `config.json`, or "
            f"`None`. Received: config={reprlib.repr(config)}"
        )
    names = names_lib.name_map(model)
    _check_complete(names)
    _check_not_quantized(model)
    config = _config(model, names, config)
    with contextlib.ExitStack() as stack:
        if state_lib.is_adapted(model) and model._randadapt.block != "merged":
            stack.enter_context(merge.merged(model))
        tensors = {key: _tensor(key, names) for key in names.variables}
    os.makedirs(target, exist_ok=True)
    _write(os.path.join(target, _WEIGHTS), tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    paths.replace(os.path.join(target, _CONFIG), text.encode())


def _check_complete(names):
    """Raises `ValueError` unless the whole checkpoint is in the model."""
    if names.stopped:
        raise ValueError(
            "The checkpoint can't be told from the model: KerasHub's converter "
            f"of '{names.model_type}' stopped half-way ({names.stopped})."
        )
    reasons = [f"'{path}' ({why})" for path, why in names.lost.items()]
    for key, places in names.variables.items():
        covered = np.zeros(_shape(key, places), bool).reshape(-1)
        for one, origin in places:
            if origin.coordinates is None:
                covered[:] = True
            else:
                covered[origin.place(key)[1]] = True
        if not covered.all():
            reasons.append(
                f"'{key}' (KerasHub leaves out {np.sum(~covered):,} of its "
                f"{covered.size:,} numbers)"
            )
    if reasons:
        raise ValueError(
            f"A checkpoint of '{names.model_type}' has more than this model "
            "holds: "
            + ", ".join(reasons[:5])
            + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")
            + ". Save the adapter with `kra.peft.save`, and merge it into the "
            "original checkpoint with PEFT (`merge_and_unload`)."
        )


def _shape(key, places):
    origin = places[0][1]
    return origin.shapes[origin.keys.index(key)]


def _check_not_quantized(model):
    quantized = [
        layer.path or layer.name
        for layer in _compat.flatten_layers(model)
        if getattr(layer, "quantization_mode", None) is not None
    ]
    if quantized:
        raise ValueError(
            f"{len(quantized)} layers are quantized, and a checkpoint of "
            f"transformers has floats: {quantized[:5]}. Load the adapter into "
            "the base model in float, and save that."
        )


def _config(model, names, given):
    if given is not None:
        if given.get("model_type") != names.model_type:
            raise ValueError(
                "`config` must be of the model's own type, "
                f"'{names.model_type}'. Received: config with model_type="
                f"{reprlib.repr(given.get('model_type'))}"
            )
        return given
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model):
        backbone = model
    config = _compat.exported_config(backbone)
    # The exporter takes Gemma 2 for Gemma.
    if config is None or config.get("model_type") != names.model_type:
        # Converters read some of the config of each part of a model.
        parts = [k for k, v in names.config.items() if isinstance(v, dict)]
        if names.config_differs or parts:
            raise ValueError(
                f"KerasHub's converter of '{names.model_type}' does not tell "
                "which config a checkpoint of this model has: its "
                f"{names.config_differs or parts} are not known. Pass the base "
                "model's `config.json` as the dict `config`."
            )
        config = {k: _in_its_words(v) for k, v in names.config.items()}
    return {**config, "torch_dtype": "float32"}


def _in_its_words(value):
    """A value of the config as transformers writes it."""
    if isinstance(value, (list, tuple)):
        # Its lists of truth values are of integers.
        return [int(v) if isinstance(v, bool) else v for v in value]
    if isinstance(value, str):
        return family.ACTIVATIONS.get(value, value)
    return value


def _tensor(key, names):
    """One tensor of the checkpoint, float32."""
    places = names.variables[key]
    shape = _shape(key, places)
    values = np.zeros(int(np.prod(shape)), "float32")
    for one, origin in places:
        variable = keras.ops.cast(one.variable, "float32")
        ours = np.asarray(keras.ops.convert_to_numpy(variable))
        if origin.coordinates is None:
            values[:] = ours.reshape(-1)
            continue
        inside, index = origin.place(key)
        values[index] = ours if inside is None else ours[inside]
    return values.reshape(shape)


def _write(path, tensors):
    """Writes a file of tensors as a whole, or leaves what was there."""
    folder = os.path.dirname(path)
    name = f".randadapt-{secrets.token_hex(8)}.tmp"
    temporary = os.path.join(folder, name)
    try:
        tensor_data.write(temporary, tensors, {"format": "pt"})
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
