"""`kernels`: the kernels, biases and weights of a model by keys."""

from collections.abc import Iterable

import keras
import numpy as np

from keras_randadapt.analysis import deltas
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import product
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import is_adapted


def kernels(
    model: keras.Model, keys: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Copies of the kernels with which a model computes, with deltas added.

    Kernels make models comparable that were adapted by different methods or
    trained in full: their trained weights differ in kind, but their kernels
    have the same shapes.

    Args:
        model: A built Keras model, adapted or not.
        keys: Optional keys, such as those of another model's copies. A
            structural address means that layer's kernel view, `"address#i"`
            means weight `i` of the layer, and `"address#bias"` means its bias,
            as adapters change it. The default keys are the kernel views of an
            adapted model's sites, the biases that an active adapter adapts,
            and all weights of the layers that active adapters keep trainable.

    Returns:
        dict from key to float32 array. A kernel view has shape `(input_dim,
        output_dim)`.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If a key means nothing in this model, if a kernel is
            quantized and its layer is no site, or if the model has no adapter
            and there are no `keys`.

    Example:

    ```python
    before = kra.analysis.kernels(model)
    model.fit(x, y, verbose=0)
    after = kra.analysis.kernels(model)
    ```
    """
    state_lib.check_is_model(model)
    if keys is None:
        keys = default_keys(state_lib.state_of(model))
    layers = state_lib.layers_of(model)
    check_keys(layers, keys)
    return {key: read(layers, key) for key in keys}


def default_keys(state):
    active = [state.records[name] for name in state.active]
    kept = {address for record in active for address in record.kept}
    with_bias = {
        address
        for record in active
        if record.template.adapts_bias
        for address in record.addresses
    }
    keys = []
    for address, layer in zip(state.site_addresses, state.site_layers):
        if supported.kernel_variable(layer) is not None:
            keys.append(address)
        if address in with_bias and supported.bias_variable(layer) is not None:
            keys.append(f"{address}#bias")
    for address in state.layers:
        if address in kept:
            number = len(state.layers[address].weights)
            keys += [f"{address}#{i}" for i in range(number)]
    return keys


def check_keys(layers, keys):
    for key in keys:
        address, _, index = str(key).partition("#")
        layer = layers.get(address)
        if layer is None:
            raise ValueError(f"The model has no layer at '{address}'.")
        if index == "bias":
            has_bias = (
                supported.looks_supported(layer, any_kind=True)
                and supported.bias_variable(layer) is not None
            )
            if not has_bias:
                raise ValueError(f"Layer '{address}' has no bias.")
        elif index:
            if not index.isdigit() or int(index) >= len(layer.weights):
                raise ValueError(
                    f"'{key}' means no weight: layer '{address}' has "
                    f"{len(layer.weights)}."
                )
        elif not layer.built or supported.supported_class(layer) is None:
            raise ValueError(
                f"Layer '{address}' is a {type(layer).__name__}, which has no "
                f"kernel view. Name its weights: '{address}#0' and so on."
            )
        elif layer.quantization_mode is not None and not is_adapted(layer):
            raise ValueError(
                f"The kernel of '{address}' is quantized to "
                f"'{layer.quantization_mode}': it can be read only while an "
                "adapter is attached there."
            )


def variable(layers, key):
    address, _, index = key.partition("#")
    if index == "bias":
        return supported.bias_variable(layers[address])
    if index:
        return layers[address].weights[int(index)]
    return supported.kernel_variable(layers[address])


def shape(layers, key):
    if "#" in key:
        return tuple(variable(layers, key).shape)
    return supported.view_shape(layers[key])


def read(layers, key):
    address, _, index = key.partition("#")
    layer = layers[address]
    if index == "bias" and is_adapted(layer):
        return as_numpy(layer.merged_bias()).astype("float32")
    if index:
        return as_numpy(variable(layers, key)).astype("float32")
    if not is_adapted(layer):
        view = supported.as_view(layer, supported.kernel_variable(layer))
        return as_numpy(view).astype("float32")
    view = deltas.base_kernel_view(layer)
    if getattr(layer, "stack", None) is not None:
        return as_numpy(layer._merged_kernel_view(view))
    return as_numpy(product.fold(layer.adapter.active(), view))


def write(layers, key, value):
    value = value.astype("float32")
    if "#" not in key:
        value = supported.from_view(layers[key], value)
    variable(layers, key).assign(value)


def as_numpy(value):
    """A copy of a tensor, as a NumPy array of the same dtype."""
    return np.array(keras.ops.convert_to_numpy(value))
