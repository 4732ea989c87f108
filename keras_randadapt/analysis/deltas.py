"""The deltas of an adapted model, one at a time, as NumPy arrays."""

import keras
import numpy as np

from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import checks
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import lanes
from keras_randadapt.sites import product
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported
from keras_randadapt.sites import weighted

_EPSILON = float(np.finfo("float32").eps)


class SiteDelta:
    """The delta of one site, reduced to its Gram matrix.

    Attributes:
        address: The site's structural address. That of an expert has its
            number below it.
        layer: Its layer.
        shape: `(input_dim, output_dim)`.
        gram: float64 matrix whose nonzero eigenvalues are the squares of the
            delta's nonzero singular values. It is the smaller of
            `delta' delta` and `delta delta'`, or a matrix of the delta's rank.
        noise: The rounding noise of the singular values. It is 0 unless the
            delta is the difference of two kernels.
    """

    def __init__(self, address, layer, gram, noise):
        self.address = address
        self.layer = layer
        self.shape = tuple(supported.view_of(layer))
        self.gram = gram
        self.noise = noise

    def singular_values(self):
        """All `min(input_dim, output_dim)` singular values, largest first."""
        # Eigenvalues of a float64 Gram matrix are ten times faster than an
        # SVD. They are accurate to 1e-8 of the largest, while the delta, a
        # float32 product, is less accurate.
        squares = np.linalg.eigvalsh(self.gram)[::-1]
        values = np.zeros(min(self.shape))
        values[: len(squares)] = np.sqrt(np.maximum(squares, 0))
        return values

    def orthogonality_loss(self):
        """`||delta' delta - I||_F^2`, with the identity of `output_dim`."""
        squares = np.trace(self.gram)
        return float(np.sum(self.gram**2) - 2 * squares + self.shape[1])


def site_deltas(model, name=None):
    """Yields a `SiteDelta` of every site that has a delta to measure.

    Args:
        model: An adapted model.
        name: Optional string. The name of one adapter, active or not. By
            default the deltas of all active adapters are added.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model has no adapter, none of this name or none
            active, if one is not mergeable and so has no delta, if the model
            is inside a `merged` block, or if a delta holds NaN.
    """
    state = check_measurable(model, name)
    for address in state.site_addresses:
        layer = state.layers[address]
        if name is None:
            adapters = layer.adapter.active()
        else:
            adapters = [layer.adapter.get(name)]
            adapters = [one for one in adapters if one is not None]
        if adapters:
            for place, base, parts in _parts(address, layer, adapters):
                gram, noise = _gram(base, parts)
                if not np.all(np.isfinite(gram)):
                    raise ValueError(
                        f"The delta of '{place}' holds NaN or infinity: "
                        "training diverged. Lower the learning rate."
                    )
                yield SiteDelta(place, layer, gram, noise)


def _parts(address, layer, adapters):
    """The kernels of a site: one, or one an expert.

    Yields:
        The address, with the expert's number below it; a function that gives
        the base kernel view; and the adapters.
    """
    if getattr(layer, "stack", None) is None:
        yield address, lambda: base_kernel_view(layer), adapters
        return
    experts = zip(*[lanes.each(adapter) for adapter in adapters])
    for e, own in enumerate(experts):
        yield f"{address}/{e}", lambda e=e: base_kernel_view(layer)[e], own


def check_measurable(model, name):
    """The `AdaptedState` of a model whose deltas can be measured."""
    state = state_lib.state_of(model)
    if state.block == "merged":
        # The kernels hold the deltas.
        state_lib.check_no_block(model)
    if name is not None:
        checks.check_names(state, [name])
    elif not state.active:
        raise ValueError(
            f"No adapter of model '{model.name}' is active. Name the adapter "
            "to measure with `name`, or call `keras_randadapt.set_active` "
            f"first. Attached: {sorted(state.records)}"
        )
    for one in state.active if name is None else [name]:
        template = state.records[one].template
        if not (template.mergeable and template.adapts_kernel):
            raise ValueError(
                f"The adapter '{one}' is a `{type(template).__name__}`, which "
                "adds no delta to a kernel that could be measured. Name "
                "another adapter with `name`."
            )
    return state


def base_kernel_view(layer):
    """A site's base kernel view, float32, dequantized if it is quantized."""
    kernel = quantized.float_kernel(layer)
    return keras.ops.cast(supported.as_view(layer, kernel), "float32")


def _gram(base_view, adapters):
    factors = [_factors(adapter) for adapter in adapters]
    if None not in factors:
        return _gram_of_product(factors), 0.0
    if all(_is_additive(adapter) for adapter in adapters):
        delta = sum(_numpy(adapter.delta_kernel()) for adapter in adapters)
        return _gram_of_matrix(delta), 0.0
    base = base_view()
    merged = _numpy(product.fold(adapters, base))
    # The noise is a few roundings of each element of the merged kernel. The
    # norm of this error bounds its effect on every singular value.
    noise = 4 * _EPSILON * float(np.linalg.norm(merged))
    return _gram_of_matrix(merged - _numpy(base)), noise


def _is_additive(adapter):
    if isinstance(adapter, weighted.Weighted):
        return True
    return type(adapter).merged is Adapter.merged


def _factors(adapter):
    """`(left, right)` if the delta is their product, of low rank."""
    factors = adapter.factors() if _is_additive(adapter) else None
    return None if factors is None else tuple(map(_numpy, factors))


def _gram_of_product(factors):
    """A Gram matrix of a product, without forming the product.

    With the QR factors of both sides, `L R = Q1 (R1 R2') Q2'`. The small
    matrix in the middle has the product's singular values.
    """
    left = np.concatenate([a for a, _ in factors], axis=1)
    right = np.concatenate([b for _, b in factors], axis=0)
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return _gram_of_matrix(left @ right)
    middle = np.linalg.qr(left, mode="r") @ np.linalg.qr(right.T, mode="r").T
    return middle.T @ middle


def _gram_of_matrix(matrix):
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    return matrix.T @ matrix


def _numpy(tensor):
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    return array.astype("float64")
