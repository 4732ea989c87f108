"""The gradient of every example's loss, on every backend.

Each backend has a module with two functions. `strategies` returns ways to
compute the gradients of a chunk, the fastest first; all are exact.
`intermediate_bytes` returns the memory of one pass.
"""

import contextlib
import importlib
import inspect
import re
import warnings

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning

if keras.config.backend() == "numpy":
    # It has no gradients, so Keras can't train there: nothing asks for these.
    _backend = None
else:
    _backend = importlib.import_module(
        "keras_randadapt.per_example." + keras.config.backend()
    )

#: The bytes that a chunk's gradients and intermediates may take.
MEMORY = 256 << 20

# The scales of losses in half precision: the usual one, and smaller ones that
# are tried if the gradient of an example overflows.
_HALF_SCALES = (2.0**15, 2.0**11, 2.0**7, 2.0**3, 1.0)


class PerExampleGradients:
    """Gradients of `model.compute_loss` for batches of one example.

    Dropout is off, and regularizers of weights do not count. Neither the model
    nor any random state changes.

    Args:
        model: A compiled Keras model.
        variables: list of the variables to differentiate by.
        chunk_size: Optional int. The number of examples that are computed at
            once. The default is as many as fit into `MEMORY`, with a row of
            gradients and all intermediates of the forward pass for each.
    """

    def __init__(self, model, variables, chunk_size=None):
        self.model = model
        self.variables = list(variables)
        self.chunk_size = chunk_size
        self.row_bytes = 4 * sum(int(np.prod(v.shape)) for v in variables)
        self.scales = (1.0,)
        layers = _compat.flatten_layers(model)
        if any(layer.compute_dtype == "float16" for layer in layers):
            self.scales = _HALF_SCALES
        self._strategies = None
        self._structure = None
        self._intermediate_bytes = 0

    def prepare(self, batch):
        """Checks the loss on an example, and chooses the chunk's size.

        Args:
            batch: Nest `(x, y, sample_weight)` of arrays with a leading axis.
        """
        self._structure = Structure(batch)
        loss = ExampleLoss(self.model, self.variables, self._structure)
        self._strategies = _backend.strategies(loss)
        arrays = [array[:1] for array in self._structure.flatten(batch)]
        with without_regularizers(self.model):
            one = _backend.intermediate_bytes(loss, arrays)
            two = _backend.intermediate_bytes(
                loss, [np.repeat(array, 2, axis=0) for array in arrays]
            )
        # The difference is the memory of one example. Other intermediates,
        # such as casts of weights, occur once in a chunk.
        self._intermediate_bytes = max(two - one, 0)
        if self.chunk_size is None:
            example = self.row_bytes + self._intermediate_bytes
            self.chunk_size = max(1, int(MEMORY // max(1, example)))

    def working_bytes(self, samples):
        """The bytes of a chunk's gradients and intermediates."""
        example = self.row_bytes + self._intermediate_bytes
        return min(self.chunk_size or 1, samples) * example

    def __call__(self, batch):
        """Yields arrays `(examples, weights)`, float32.

        Args:
            batch: Nest `(x, y, sample_weight)` of arrays with a leading axis.
        """
        if self._strategies is None:
            self.prepare(batch)
        arrays = self._structure.flatten(batch)
        examples = len(arrays[0])
        # All chunks have one size, since a smaller last chunk would need
        # another compilation.
        chunks = -(-examples // self.chunk_size)
        size = -(-examples // chunks)
        for start in range(0, examples, size):
            chunk = [array[start : start + size] for array in arrays]
            count = len(chunk[0])
            if count < size:
                chunk = [_pad(array, size) for array in chunk]
            yield self._rows(chunk)[:count]

    def _rows(self, chunk):
        for scale in self.scales:
            with without_regularizers(self.model):
                gradients = self._compute(chunk, np.float32(scale))
            rows = np.concatenate(
                [
                    np.asarray(g, "float32").reshape(len(chunk[0]), -1)
                    for g in gradients
                ],
                axis=1,
            )
            if np.all(np.isfinite(rows)):
                break
        return rows / np.float32(scale)

    def _compute(self, chunk, scale):
        while True:
            name, function = self._strategies[0]
            try:
                return function(chunk, scale)
            except Exception as error:
                # Any operation of a model may lack a rule for batching or
                # tracing, so all errors are caught. An error of the user's
                # code is raised by the last strategy, a loop.
                if len(self._strategies) == 1:
                    raise
                self._strategies = self._strategies[1:]
                warnings.warn(
                    f"Gradients of single examples of model "
                    f"'{self.model.name}' can't be computed {name}: "
                    f"{type(error).__name__}: {_summary(error)} They are "
                    f"computed {self._strategies[0][0]} instead, which is as "
                    "exact and slower.",
                    AdapterWarning,
                    stacklevel=2,
                )


class Structure:
    """The nest of a batch; backends see only its flat list of arrays."""

    def __init__(self, batch):
        leaves = keras.tree.flatten(batch)
        self.present = [leaf is not None for leaf in leaves]
        self.template = keras.tree.map_structure(lambda leaf: 0, batch)

    def flatten(self, batch):
        return [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]

    def pack(self, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if there else None for there in self.present]
        return keras.tree.pack_sequence_as(self.template, leaves)


class ExampleLoss:
    """The loss of one example, as a pure function of the weights.

    Attributes:
        model: The model.
        variables: list of variables to differentiate by.
        others: list of all other variables that the loss may read.
    """

    def __init__(self, model, variables, structure):
        self.model = model
        self.variables = list(variables)
        self.structure = structure
        own = {id(v) for v in variables}
        self.others = []
        for variable in [*model.variables, *model.metrics_variables]:
            if id(variable) not in own:
                own.add(id(variable))
                self.others.append(variable)

    def __call__(self, values, other_values, example, scale):
        """The loss of an example.

        Args:
            values: list of tensors, the values of `variables`.
            other_values: list of tensors, the values of `others`. It may be
                empty if the backend can read the variables themselves.
            example: list of tensors without a batch axis.
            scale: float, a factor of the loss.
        """
        batch = [keras.ops.expand_dims(tensor, 0) for tensor in example]
        return self.of_batch(values, other_values, batch) * scale

    def of_batch(self, values, other_values, batch):
        """The loss of a batch, a float32 scalar."""
        x, y, sample_weight = self.structure.pack(batch)
        state = [*zip(self.variables, values), *zip(self.others, other_values)]
        arguments = {"y": y, "sample_weight": sample_weight}
        if _takes_training(self.model.compute_loss):
            arguments["training"] = False
        with keras.StatelessScope(state, collect_losses=True):
            y_pred = self.model(x, training=False)
            loss = self.model.compute_loss(x=x, y_pred=y_pred, **arguments)
        return keras.ops.cast(loss, "float32")


@contextlib.contextmanager
def without_regularizers(model):
    """Removes the regularizers of all weights of a model during a block."""
    before = [
        (variable, variable.regularizer)
        for variable in model.trainable_variables
        if variable.regularizer is not None
    ]
    for variable, _ in before:
        variable.regularizer = None
    try:
        yield
    finally:
        for variable, regularizer in before:
            variable.regularizer = regularizer


def _takes_training(compute_loss):
    parameters = inspect.signature(compute_loss).parameters
    return "training" in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


def _pad(array, size):
    """An array whose last example is repeated until there are `size`."""
    return np.concatenate(
        [array, np.repeat(array[-1:], size - len(array), axis=0)]
    )


def _summary(error):
    """The message of an error, without the text that Keras adds."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    text = text.partition("Arguments received by")[0]
    return " ".join(text.split())[:300]
