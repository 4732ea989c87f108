"""Centred kernel alignment: the similarity of two models' activations."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterable

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_randadapt import _compat
from keras_randadapt._types import Axis
from keras_randadapt._types import Data
from keras_randadapt._types import Tensor
from keras_randadapt.analysis import plotting
from keras_randadapt.analysis.table import Table
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch
from keras_randadapt.sites import selection
from keras_randadapt.sites.selection import Targets

ESTIMATORS = ("debiased", "biased", "minibatch")


class Similarity:
    """CKA between the layers of two models.

    Attributes:
        values: float64 array, `(layers of a, layers of b)`.
        layers_a: The addresses of the first model's layers, which are rows.
        layers_b: The addresses of the second model's layers, the columns.
    """

    def __init__(
        self,
        values: np.ndarray,
        layers_a: Iterable[str],
        layers_b: Iterable[str],
    ):
        self.values = values
        self.layers_a = list(layers_a)
        self.layers_b = list(layers_b)

    def table(self) -> Table:
        """A `Table` with a column `layer` and one for each layer of b."""
        return Table(
            {
                "layer": self.layers_a,
                **dict(zip(self.layers_b, self.values.T)),
            }
        )

    def plot(self, axis: Axis | None = None) -> Axis:
        """Draws a heat map, the first model's layers from top to bottom.

        Args:
            axis: Optional matplotlib axis. A new one by default.

        Returns:
            The axis.
        """
        axis = plotting.axis_or_new(axis)
        image = axis.imshow(
            self.values, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        plotting.label_sites(axis.yaxis, self.layers_a)
        plotting.label_sites(axis.xaxis, self.layers_b)
        axis.tick_params(axis="x", labelrotation=90)
        axis.figure.colorbar(image, ax=axis, label="CKA")
        return axis

    def __repr__(self):
        columns = plotting.short_names(self.layers_b)
        return repr(
            Table(
                {
                    "layer": plotting.short_names(self.layers_a),
                    **dict(zip(columns, self.values.T)),
                }
            )
        )


def linear_cka(x: ArrayLike, y: ArrayLike, *, debiased: bool = True) -> float:
    """Linear CKA of two sets of features of the same examples.

    It is `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` for the Gram matrices
    `K = x x'` and `L = y y'`, and is 1 for features that differ by a rotation
    and a scale. With `debiased`, HSIC is estimated without bias. With the usual
    estimator, many features of few examples always appear similar.

    Args:
        x: Array of shape `(examples, ...)`. The features of an example are
            flattened.
        y: Array of shape `(examples, ...)`.
        debiased: Whether HSIC is estimated without bias, which needs at least
            four examples.

    Returns:
        float, at most 1. With `debiased` it is about 0 for unrelated features
        and may be negative. It is NaN if the features of one side do not
        vary.

    Raises:
        ValueError: If the numbers of examples differ, or are too few.

    Example:

    ```python
    a = np.random.normal(size=(50, 8))
    assert kra.analysis.linear_cka(a, 3 * a[:, ::-1]) > 0.999
    ```

    References:
        - [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414),
          equations 3 and 4.
        - Song et al., "Feature selection via dependence maximization", 2012,
          equation 5, for the unbiased HSIC.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
        raise ValueError(
            "`x` and `y` must hold features of the same examples, one a row. "
            f"Received: shapes {x.shape} and {y.shape}"
        )
    _check_examples(len(x), debiased)
    hsic = _unbiased_hsic if debiased else _biased_hsic
    k, other = _gram(x), _gram(y)
    return float(_ratio(hsic(k, other), hsic(k, k), hsic(other, other)))


def cka(
    model_a: keras.Model,
    model_b: keras.Model | None,
    x: Data,
    layers: Targets = None,
    layers_b: Targets = None,
    *,
    estimator: str = "debiased",
    batch_size: int = 32,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Similarity:
    """Linear CKA between the activations of two models' layers.

    The models compute `x` in inference. They do not change and need not be
    compiled. Each example's activation of a layer is flattened, with all
    positions of a sequence; `reduce` replaces this.

    Args:
        model_a: A built Keras model.
        model_b: Another model, or `None`. `None` means `model_a` with its
            adapters disabled, so the result shows the adapters' effect.
        x: Inputs of both models: an array, or a dict or list of arrays.
        layers: The layers to compare: names, ends of paths, or patterns, as
            `inject` takes them. The default is the outer layers that have
            weights, are called and return one tensor. A layer that is called
            several times counts several times.
        layers_b: The second model's layers, if they are others.
        estimator: `"debiased"` and `"biased"`, see `linear_cka`, keep the
            activations of all examples in memory. `"minibatch"` averages the
            unbiased HSIC over batches and keeps only one batch's activations;
            the numerator and the denominators have the same expectation.
        batch_size: int. The examples in a forward pass. With `"minibatch"` it
            is also the number in an estimate, and a last batch that is too
            small for an estimate is left out.
        reduce: Optional function of a layer's output that returns the tensor
            to compare, of shape `(examples, ...)`, such as
            `lambda hidden: hidden[:, 0]` for the first position.

    Returns:
        A `Similarity`: `values[i, j]` compares layer `i` of `model_a` with
        layer `j` of `model_b`. `plot` draws a heat map.

    Raises:
        TypeError: If a model is no Keras model, or `x` holds no arrays.
        ValueError: If a layer is not found, is never called, or gives several
            tensors; if the examples are too few; if `model_b` is `None` and
            `model_a` has no adapter.

    Example:

    ```python
    similarity = kra.analysis.cka(model, None, x, layers=["query", "value"])
    print(similarity)
    similarity.plot()
    ```

    References:
        - [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414).
        - [Nguyen et al., 2021](https://arxiv.org/abs/2010.15327), equations 2
          and 3, for the estimate from minibatches.
    """
    state_lib.check_is_model(model_a)
    off: contextlib.AbstractContextManager[None]
    if model_b is None:
        state_lib.state_of(model_a)
        state_lib.check_no_block(model_a)
        model_b, off = model_a, switch.disabled(model_a)
    else:
        state_lib.check_is_model(model_b)
        off = contextlib.nullcontext()
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"`estimator` must be one of {ESTIMATORS}. "
            f"Received: estimator={estimator!r}"
        )
    batches = _batches(x, batch_size, estimator)
    chosen_a = _choose(model_a, layers, "layers")
    if layers_b is None:
        chosen_b = _choose(model_b, layers, "layers")
    else:
        chosen_b = _choose(model_b, layers_b, "layers_b")
    whole = estimator != "minibatch"
    grams_a = _grams(model_a, batches, chosen_a, reduce, whole)
    with off:
        grams_b = _grams(model_b, batches, chosen_b, reduce, whole)
    hsic = _biased_hsic if estimator == "biased" else _unbiased_hsic
    own_a = [_mean_hsic(hsic, k, k) for k in grams_a.values()]
    own_b = [_mean_hsic(hsic, k, k) for k in grams_b.values()]
    values = np.array(
        [
            [
                _ratio(_mean_hsic(hsic, k, other), self_a, self_b)
                for other, self_b in zip(grams_b.values(), own_b)
            ]
            for k, self_a in zip(grams_a.values(), own_a)
        ]
    )
    return Similarity(values, grams_a, grams_b)


# HSIC.


def _gram(features):
    features = np.reshape(features, (len(features), -1)).astype("float64")
    # CKA does not depend on means, and products are more accurate without.
    centred = features - features.mean(axis=0)
    # The computed mean of equal numbers may differ from them.
    centred[:, np.all(features == features[:1], axis=0)] = 0.0
    return centred @ centred.T


def _biased_hsic(k, other):
    # The features are centred already, and the factor 1 / (n - 1)^2 cancels.
    return np.sum(k * other)


def _unbiased_hsic(k, other):
    n = len(k)
    k = k - np.diag(np.diag(k))
    other = other - np.diag(np.diag(other))
    cross = np.sum(k * other)
    sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * k.sum(axis=0) @ other.sum(axis=0)
    return (cross + sums - rows) / (n * (n - 3))


def _mean_hsic(hsic, grams, others):
    return np.mean([hsic(k, other) for k, other in zip(grams, others)])


def _ratio(cross, own_a, own_b):
    # The similarity of an activation that does not vary is undefined.
    if own_a <= 0 or own_b <= 0:
        return np.nan
    return cross / np.sqrt(own_a * own_b)


def _check_examples(n, debiased):
    least = 4 if debiased else 2
    if n < least:
        raise ValueError(
            f"CKA needs at least {least} examples"
            + (" without bias" if debiased else "")
            + f". Received: {n}"
        )


# Activations.


def _batches(x, batch_size, estimator):
    """The inputs, cut into batches along the first axis."""
    arrays = keras.tree.flatten(x)
    if not arrays or not all(hasattr(a, "shape") for a in arrays):
        raise TypeError(
            "`x` must be an array or a dict or list of arrays, as "
            "`model(x)` takes them. "
            f"Received: x of type {type(x).__name__}"
        )
    lengths = {int(a.shape[0]) if len(a.shape) else 0 for a in arrays}
    if len(lengths) > 1:
        raise ValueError(
            "The arrays in `x` must hold equally many examples. "
            f"Received: {sorted(lengths)}"
        )
    if isinstance(batch_size, bool) or not isinstance(
        batch_size, (int, np.integer)
    ):
        raise TypeError(
            "`batch_size` must be an integer. "
            f"Received: batch_size={batch_size!r}"
        )
    least = 4 if estimator == "minibatch" else 1
    if batch_size < least:
        raise ValueError(
            f"`batch_size` must be at least {least}. "
            f"Received: batch_size={batch_size}"
        )
    (n,) = lengths
    _check_examples(n, estimator != "biased")
    starts = range(0, n, batch_size)
    if estimator == "minibatch":
        starts = [start for start in starts if n - start >= 4]
    return [
        keras.tree.map_structure(lambda a: a[i : i + batch_size], x)
        for i in starts
    ]


def _choose(model, names, argument):
    """dict from address to `(layer, whether an argument names it)`."""
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built. Call it once on data first."
        )
    layers = state_lib.layers_of(model)
    if names is not None:
        found = selection.match(layers, names, argument)
        return {a: (layers[a], True) for a in found}
    outer = {id(layer) for layer in _outer_layers(model)}
    return {a: (x, False) for a, x in layers.items() if id(x) in outer}


def _outer_layers(model):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _outer_layers(layer)
        elif layer.weights:
            yield layer


def _grams(model, batches, layers, reduce, whole):
    """dict from layer to its Gram matrices: one if `whole`, or one a batch."""
    collected = {}
    for batch in batches:
        for name, features in _activations(model, batch, layers, reduce):
            features = features if whole else _gram(features)
            collected.setdefault(name, []).append(features)
    if whole:
        return {
            name: [_gram(np.concatenate(parts))]
            for name, parts in collected.items()
        }
    return collected


def _activations(model, x, layers, reduce):
    """`(name, array)` of every call of these layers, in `layers`' order."""
    calls = {address: [] for address in layers}
    with contextlib.ExitStack() as hooks:
        for address, (layer, _) in layers.items():
            hooks.enter_context(_recording(layer, calls[address].append))
        model(keras.tree.map_structure(_tensor, x), training=False)
    n = len(keras.tree.flatten(x)[0])
    found = []
    for address, outputs in calls.items():
        wanted = layers[address][1]
        if not outputs and wanted:
            raise ValueError(
                f"Layer '{address}' is not called when model '{model.name}' "
                "runs on `x`. Leave it out of `layers`."
            )
        for i, output in enumerate(outputs):
            if reduce is None and not wanted and _is_several(output):
                continue
            features = _features(address, output, reduce)
            if features.ndim < 1 or len(features) != n:
                raise ValueError(
                    f"The activation of '{address}' has shape "
                    f"{features.shape} for {n} examples: one row an example "
                    "is needed. Leave it out of `layers`, or give `reduce`."
                )
            found.append((f"{address}[{i}]" if i else address, features))
    return found


@contextlib.contextmanager
def _recording(layer, record):
    """Passes every output of a layer to `record` during a block.

    Keras reads `call`, or `quantized_call` if the layer is quantized, from the
    layer. An attribute of the instance takes precedence over the class's
    method and can be removed again.
    """

    def recorded(method):
        def call(*args, **kwargs):
            outputs = method(*args, **kwargs)
            record(outputs)
            return outputs

        return call

    hooks = {"call": recorded(layer.call)}
    if getattr(layer, "quantization_mode", None) is not None:
        hooks = {"quantized_call": recorded(layer.quantized_call)}
    with _compat.instance_attributes(layer, **hooks):
        yield


def _is_several(output):
    return len(keras.tree.flatten(output)) != 1


def _features(address, output, reduce):
    if reduce is not None:
        output = reduce(output)
    tensors = keras.tree.flatten(output)
    if len(tensors) != 1:
        raise ValueError(
            f"Layer '{address}' gives {len(tensors)} tensors. Compare a layer "
            "that gives one, or choose with `reduce`."
        )
    try:
        return keras.ops.convert_to_numpy(tensors[0])
    except Exception as error:
        raise ValueError(
            f"The activation of '{address}' can't be read: it is computed in "
            "a compiled part of the model, such as a rematerialized layer. "
            "Compare a layer around it."
        ) from error


def _tensor(array):
    return keras.ops.convert_to_tensor(array)
