"""`merge` and `merged`: fold adapters into the kernels and biases."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.model import attach
from keras_randadapt.model import moving_state
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch
from keras_randadapt.model import transaction
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported


def merge(model: keras.Model, *, through_float: bool = False) -> keras.Model:
    """Folds the active adapters into the kernels, then ejects all adapters.

    Deltas are added in float32 and rounded once to the kernel's dtype.
    Kernels in int8 or int4 are dequantized, merged and quantized again with
    new scales, which rounds the delta to the new grid. In float8 the stored
    floats change. Kept layers keep their trained values. The `trainable` flags
    become those from before `inject`.

    GPTQ and AWQ rounded their kernels with calibration data, and a sum can't be
    rounded so again. Such kernels are merged only with `through_float=True`.

    Args:
        model: An adapted model.
        through_float: bool. Whether kernels of GPTQ and AWQ are dequantized,
            merged and rounded to the nearest values of fresh grids. A warning
            tells the error that this introduces.

    Returns:
        The model, without adapters.

    Raises:
        TypeError: If `through_float` is no bool.
        ValueError: If the model has no adapter, if an active one can't be
            merged, if a kernel of GPTQ or AWQ would be rounded and
            `through_float` is false, or if a merged kernel would hold NaN or
            infinity. The model is then unchanged.
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    _check_mergeable(state)
    _check_rounding(state, through_float)
    _check_finite_merge(state)
    with attach.changing(model) as change:
        for layer in state.site_layers:
            if layer.adapter.active():
                _write_merged(change, layer)
        # The trained heads of the active adapters stay in the model.
        learned = {
            address: state_lib.kept_layer_values(state.layers[address])
            for name in state.active
            for address in state.records[name].kept
        }
        change.set(state, "base_values", {**state.base_values, **learned})
        # So does what their training moved.
        change.set(state, "base_moving", moving_state.values_now(state))
        switch.remove(change, tuple(state.records))
    return model


@contextlib.contextmanager
def merged(
    model: keras.Model, *, through_float: bool = False
) -> Iterator[keras.Model]:
    """Folds the active adapters into the kernels during a block.

    Callbacks may use it in the middle of `fit`. Inside of the block the model
    can be exported and its weights can be saved; `model.save` needs a merged
    copy.

    Example:

    ```python
    import copy

    with kra.merged(model):
        model.save_weights("merged.weights.h5")
    kra.merge(copy.deepcopy(model)).save("merged.keras")
    ```

    Args:
        model: An adapted model.
        through_float: bool. See `merge`.

    Raises:
        TypeError: See `merge`.
        ValueError: See `merge`.
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    functions = attach.functions_of_fit(model)
    _check_mergeable(state)
    _check_rounding(state, through_float)
    _check_finite_merge(state)
    active = state.active

    def enter(change):
        values = {}
        for layer in state.site_layers:
            if layer.adapter.active():
                values[layer] = _kernel_values(layer)
                _write_merged(change, layer)
        attach.record_common(change)
        change.set(state, "block", "merged")
        change.on_undo(functools.partial(attach.show, model, state.shown))
        attach.show(model, ())
        state.functions.bring_back(model, ())
        return functools.partial(_unmerge, model, active, values, functions)

    with transaction.block(model, enter):
        yield model


def _unmerge(model, active, values, functions):
    """Ends a `merged` block; it may be repeated after an interruption."""
    state = model._randadapt
    for layer, before in values.items():
        _restore_kernel(layer, before)
    attach.show(model, active)
    state.block = None
    state.functions.bring_back(model, active)
    attach.restore_functions(functions)


def _merged_kernel(layer):
    """The merged kernel of a site, float32, in the layer's own shape."""
    kernel = quantized.float_kernel(layer)
    return keras.ops.convert_to_numpy(
        layer.from_view(layer._merged_kernel_view(kernel))
    )


def _adapts_kernel(layer):
    return any(adapter.adapts_kernel for adapter in layer.adapter.active())


def _adapts_bias(layer):
    return supported.bias_variable(layer) is not None and any(
        adapter.adapts_bias for adapter in layer.adapter.active()
    )


def _write_merged(change, layer):
    # Both are computed from the base values, before either is written.
    kernel = _merged_kernel(layer) if _adapts_kernel(layer) else None
    bias = layer.merged_bias() if _adapts_bias(layer) else None
    if kernel is not None:
        _write_kernel(change, layer, kernel)
    if bias is not None:
        change.assign(supported.bias_variable(layer), bias)


def _merged_values(layer):
    """The kernel and the bias that a merge would write, in their dtypes."""
    if _adapts_kernel(layer):
        kernel = _merged_kernel(layer)
        if layer.quantization_mode is None:
            dtype = supported.kernel_variable(layer).dtype
            kernel = keras.ops.cast(kernel, dtype)
        yield kernel
    if _adapts_bias(layer):
        yield layer.merged_bias()


def _check_mergeable(state):
    for name in state.active:
        template = state.records[name].template
        if not template.mergeable:
            raise ValueError(
                f"The adapter '{name}' is a `{type(template).__name__}`, which "
                "computes something between the layers that no kernel can "
                "hold: it can't be merged. Save it with `save_adapter`, or "
                "export the adapted model without a merge."
            )


def _check_rounding(state, through_float):
    """Refuses kernels that a merge would round without calibration.

    If they are to be rounded, it warns with the error.
    """
    if not isinstance(through_float, bool):
        raise TypeError(
            "`through_float` must be a bool: whether kernels of GPTQ and AWQ "
            "are merged as floats and rounded again. "
            f"Received: through_float={through_float!r}"
        )
    rounded = {
        address: layer
        for address, layer in zip(state.site_addresses, state.site_layers)
        if _compat.is_calibrated(layer) and _adapts_kernel(layer)
    }
    if not rounded:
        return
    names = list(rounded)[:5]
    if not through_float:
        modes = sorted({one.quantization_mode for one in rounded.values()})
        raise ValueError(
            f"The kernels of {len(rounded)} sites, {names} among them, were "
            f"rounded with calibration data ({modes}), and a merged kernel "
            "can't be rounded so again. Keep the adapter apart: `save_adapter` "
            "and `export` do. Or load its file into the float model, merge "
            "there, and call `quantize` again. Or give `through_float=True` "
            "for the nearest values without calibration. "
            f"Received: through_float={through_float}"
        )
    worst = 0.0
    for layer in rounded.values():
        base, wanted = quantized.float_kernel(layer), _merged_kernel(layer)
        found = quantized.after_rounding(layer, wanted)
        error = np.sum((found - wanted) ** 2)
        delta = np.sum((wanted - keras.ops.convert_to_numpy(base)) ** 2)
        worst = max(worst, float(np.sqrt(error / max(delta, 1e-30))))
    warnings.warn(
        f"The merged kernels of {len(rounded)} sites are rounded without "
        f"calibration data: the error is up to {100 * worst:.3g} % of a "
        "kernel's update. Measure the merged model before you ship it.",
        AdapterWarning,
        stacklevel=3,
    )


def _check_finite_merge(state):
    for address in state.site_addresses:
        layer = state.layers[address]
        values = [
            keras.ops.convert_to_numpy(value).astype("float32")
            for value in _merged_values(layer)
        ]
        if not all(np.all(np.isfinite(value)) for value in values):
            names = [adapter.name for adapter in layer.adapter.active()]
            raise ValueError(
                f"Merging the adapters {names} into '{address}' would give a "
                "kernel with NaN or infinity; nothing was merged. Either "
                "training diverged (lower the learning rate), or the values "
                "exceed the kernel's dtype."
            )


def _write_kernel(change, layer, kernel):
    if layer.quantization_mode is None:
        change.assign(supported.kernel_variable(layer), kernel)
    else:
        for variable, value in quantized.requantized(layer, kernel):
            change.assign(variable, value)


def _kernel_values(layer):
    """Copies of all of a site's own variables."""
    return [
        np.array(keras.ops.convert_to_numpy(variable))
        for variable in _compat.owned_variables(layer)
    ]


def _restore_kernel(layer, values):
    variables = _compat.owned_variables(layer)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
