"""The updates of attached adapters, as NumPy matrices that can be converted."""

import keras
import numpy as np

from keras_randadapt.matrices import low_rank as matrices


def check_is_delta(name, template, way=None):
    """Raises `ValueError` unless a method adds a delta and nothing else.

    Args:
        name: The adapter's name.
        template: Its template.
        way: Optional sentence that says what to do instead. The default is for
            an adapter in a model.
    """
    adds_more = template.adapts_bias or template.adapts_output
    if template.additive and template.adapts_kernel and not adds_more:
        return
    raise ValueError(
        f"The adapter '{name}' is a `{type(template).__name__}`, and it does "
        "more than adding an update of its own to kernels, so no `LoRA` "
        f"computes the same. {way or _way(template)}"
    )


def _way(template):
    if template.mergeable:
        return (
            "Save it as it is with `save_adapter`, or fold it into the kernels "
            "with `merge`."
        )
    return "Save it as it is with `save_adapter`."


def parts_of(adapter, address, name):
    """The update of one site, as `matrices.low_rank` takes it.

    Args:
        adapter: A built adapter that adds a delta.
        address: The site's address.
        name: The adapter's name.

    Returns:
        A tuple of float64 arrays: two thin factors if the method has a known
        rank below both dimensions, or else the update itself.

    Raises:
        ValueError: If the update holds NaN or infinity.
    """
    factors = adapter.factors()
    if factors is None:
        parts = (as_float64(adapter.delta_kernel()),)
    else:
        parts = tuple(map(as_float64, factors))
    if not all(np.all(np.isfinite(part)) for part in parts):
        raise ValueError(
            f"The update of '{address}' by the adapter '{name}' holds NaN or "
            "infinity: training diverged. Lower the learning rate, or load an "
            "earlier file of the adapter."
        )
    if len(parts) == 2 and len(parts[1]) >= min(matrices.shape_of(parts)):
        return (matrices.dense(parts),)
    return parts


def as_float64(tensor):
    """The float32 numbers of a tensor or variable, as a float64 array."""
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    return array.astype("float64")
