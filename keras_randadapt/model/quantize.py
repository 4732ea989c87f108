"""`quantize` of `inject`: the base is quantized as a part of the injection."""

import dataclasses
import functools
from typing import Any

import keras

from keras_randadapt import _compat
from keras_randadapt.model import attach
from keras_randadapt.model import checks
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import linear
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import KernelSite

#: The modes that Keras needs no data for.
MODES = ("int8", "int4", "float8")

_PRODUCTS = (keras.layers.Dense, keras.layers.EinsumDense)
_TABLES = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be quantized.

    Attributes:
        arguments: dict of arguments of Keras's `quantize`.
        layers: list of layers.
    """

    arguments: dict[str, Any]
    layers: list[keras.layers.Layer]


def plan_of(model, layers, quantize, chosen, kept):
    """The `Plan` for the argument `quantize` of `inject`, or `None`.

    Args:
        model: The model.
        layers: dict from structural address to layer.
        quantize: See `inject`.
        chosen: The addresses of the sites.
        kept: The addresses of the layers that stay trainable.

    Raises:
        TypeError: If `quantize` is neither a mode nor a config.
        ValueError: If it is no mode that needs no data, or if the model is
            quantized or adapted already, or has nothing to quantize.
    """
    if quantize is None:
        return None
    arguments = _arguments(quantize)
    if state_lib.is_adapted(model):
        raise ValueError(
            f"Model '{model.name}' has adapters already, which were attached "
            "to kernels as they are. Give `quantize` with the first adapter. "
            f"Received: quantize={quantize!r}"
        )
    before = [
        layer.path or layer.name
        for layer in layers.values()
        if getattr(layer, "quantization_mode", None) is not None
    ]
    if before:
        raise ValueError(
            f"Model '{model.name}' has quantized layers already: "
            f"{before[:5]}. Leave `quantize` out. "
            f"Received: quantize={quantize!r}"
        )
    mode = _mode(arguments)
    classes = _PRODUCTS + (_TABLES if mode in ("int8", "int4") else ())
    backbone = getattr(model, "backbone", None)
    inside = None
    if isinstance(backbone, keras.Model):
        inside = {id(layer) for layer in _compat.flatten_layers(backbone)}
    found = [
        layer
        for address, layer in layers.items()
        if not isinstance(layer, KernelSite)
        # Keras refuses subclasses, whose computation it does not know.
        and type(layer) in classes
        and layer.built
        and (inside is None or id(layer) in inside)
        and not linear.is_below(address, kept)
        and not linear.steers_experts(address, layers)
        and not checks.reads_kernel(address, layers)
        and not (address in chosen and not _adaptable(layer))
    ]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no layer to quantize beside its heads "
            f"and kept layers. Received: quantize={quantize!r}"
        )
    return Plan(arguments, found)


def apply(change, plan):
    """Quantizes the layers of a plan; the change takes it back.

    Args:
        change: A `transaction.Change`.
        plan: A `Plan`.
    """
    model = change.model
    functions = attach.compiled_functions(model)
    change.on_undo(functools.partial(_compat.refresh_torch_parameters, model))
    change.on_undo(functools.partial(attach.restore_functions, functions))
    for layer in plan.layers:
        change.on_undo(_compat.recorded_layer(layer))
    ids = {id(layer) for layer in plan.layers}
    model.quantize(**plan.arguments, filters=lambda layer: id(layer) in ids)


def _adaptable(layer):
    return isinstance(layer, _TABLES) or supported.is_matrix_product(layer)


def _mode(arguments):
    config = arguments.get("config")
    return arguments["mode"] if config is None else config.mode


def _arguments(quantize):
    configs = getattr(keras.quantizers, "QuantizationConfig", ())
    if configs and isinstance(quantize, configs):
        return {"mode": quantize.mode, "config": quantize}
    if not isinstance(quantize, str):
        raise TypeError(
            f"`quantize` must be a mode, one of {MODES}, or a config of "
            "`keras.quantizers`, such as `GPTQConfig`. "
            f"Received: quantize={quantize!r}"
        )
    if quantize not in MODES:
        raise ValueError(
            f"`quantize` must be one of {MODES}, or a config of "
            "`keras.quantizers`, which GPTQ and AWQ need for their data. "
            f"Received: quantize={quantize!r}"
        )
    return {"mode": quantize}
