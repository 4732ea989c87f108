"""`ModulePart`: the part of a site that a module of transformers holds."""

import dataclasses

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.sites import dense
from keras_randadapt.sites import supported

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ModulePart:
    """One module of transformers, and what of a site's kernel view it holds.

    Number `[i, j]` of the kernel view, with `j = columns[n]`, is the module's
    weight from its input `inputs[i]` to its output `outputs[n]`.

    Attributes:
        module: The module's name in transformers, from the task class on, such
            as `"model.layers.0.self_attn.q_proj"`.
        file_module: Its name in files of checkpoints, which differs for some
            models that transformers 5 renamed.
        kind: `"linear"`, `"conv1d"` (GPT-2's linear layer, whose weight is
            transposed), `"embedding"`, `"conv"`, or `"experts"`. The module
            of the last is a parameter of transformers 5, with the kernels of
            all experts, and what is said of the kernel view is so for each.
        weight_shape: The shape of the module's weight. That of experts is
            `(experts, outputs, inputs)`, whatever order it has.
        columns: Integer array, the columns of the kernel view.
        inputs: Integer array, an input of the module for each row of the view.
        outputs: Integer array, an output of the module for each of `columns`.

    Example:

    ```python
    names = kra.peft.name_map(classifier)
    for part in next(iter(names.parts.values())):
        print(part.module, part.kind, part.dims, part.describe())
    ```
    """

    module: str
    file_module: str
    kind: str
    weight_shape: tuple[int, ...]
    columns: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray

    @property
    def dims(self) -> tuple[int, int]:
        """The module's numbers of inputs and of outputs."""
        if self.kind == "experts":
            return self.weight_shape[2], self.weight_shape[1]
        first = self.weight_shape[0]
        others = int(np.prod(self.weight_shape[1:]))
        if self.kind in ("conv1d", "embedding"):
            return first, others
        return others, first

    def describe(self) -> str:
        """How indices go, in words."""
        n_in, n_out = self.dims
        order = (
            ""
            if np.array_equal(self.inputs, np.arange(n_in))
            else ", inputs in another order"
        )
        first, last = int(self.outputs.min()), int(self.outputs.max())
        if not np.array_equal(self.outputs, np.arange(first, last + 1)):
            return f"outputs in another order{order}"
        if (first, last + 1) == (0, n_out):
            return f"all outputs{order}"
        return f"outputs {first} to {last}{order}"


def splits(layer, origin):
    """How the tensors of a checkpoint make up the kernel view of a layer.

    Args:
        layer: A layer of a supported class.
        origin: A `shapes.Origin` of its kernel.

    Returns:
        A list with a `(kind, columns, inputs, outputs)` for each tensor, or
        `None` if the outputs of a tensor are not outputs of the view, or its
        inputs not inputs. A low-rank update can't go from one to the other
        then.
    """
    if origin.coordinates is None:
        if axes_of(layer) != len(origin.shapes[0]):
            return None
        ones = np.eye(len(origin.shapes[0]), dtype=int)
        coordinates = [
            np.broadcast_to(
                np.arange(n, dtype=np.int32).reshape(n * one + 1 - one), shape
            )
            for shape in origin.shapes
            for n, one in zip(shape, ones)
        ]
    else:
        coordinates = origin.coordinates
    views = [_view_of(layer, one) for one in coordinates]
    if origin.owner is None:
        owners = np.zeros(views[0].shape[1], np.int32)
    else:
        owner = _view_of(layer, origin.owner)
        # Each column must come from one tensor.
        if not _is_constant(owner, 0):
            return None
        owners = owner[0]
    found = []
    for i, shape in enumerate(origin.shapes):
        columns = np.flatnonzero(owners == i)
        parts = views
        if len(columns) < len(owners):
            parts = [view[:, columns] for view in views]
        split = _split(layer, parts, shape)
        if split is None:
            return None
        found.append((split[0], columns, *split[1:]))
    return found


def axes_of(layer):
    """The number of axes of a layer's weight in PyTorch."""
    if isinstance(layer, _CONVOLUTIONS):
        # PyTorch's convolutions have as many axes as Keras's.
        return layer.rank + 2
    return 2


def _view_of(layer, array):
    """A layer's kernel view of an array, without copying it if possible."""
    if isinstance(layer, keras.layers.EinsumDense):
        array = array.transpose(dense.einsum_plan_of(layer).view_axes)
    return array.reshape(supported.view_of(layer))


def _split(layer, views, shape):
    if len(shape) != axes_of(layer) or not views[0].size:
        return None
    first, *others = views
    if _compat.holds_table(layer):
        return _oriented("embedding", first, others, shape, by_rows=True)
    kind = "linear" if len(shape) == 2 else "conv"
    found = _oriented(kind, first, others, shape, by_rows=False)
    if found is None and len(shape) == 2:
        found = _oriented("conv1d", first, others, shape, by_rows=True)
    return found


def _oriented(kind, first, others, shape, by_rows):
    """The split if the weight's first axis is along the view's rows, or not."""
    along, across = (1, 0) if by_rows else (0, 1)
    if not _is_constant(first, along) or not all(
        _is_constant(other, across) for other in others
    ):
        return None
    line = first[:, 0] if by_rows else first[0]
    rest = [other[0] if by_rows else other[:, 0] for other in others]
    rest = np.ravel_multi_index(tuple(rest), shape[1:])
    inputs, outputs = (line, rest) if by_rows else (rest, line)
    n_in = shape[0] if by_rows else int(np.prod(shape[1:]))
    # Every input once, and no output twice.
    if len(np.unique(inputs)) != n_in or len(inputs) != n_in:
        return None
    if len(np.unique(outputs)) != len(outputs):
        return None
    return kind, np.asarray(inputs), np.asarray(outputs)


def _is_constant(view, axis):
    """Whether a matrix has equal numbers along an axis."""
    if view.strides[axis] == 0 or view.shape[axis] == 1:
        return True
    # The corner tells most matrices that are not.
    for part in (view[:3, :3], view):
        if np.any(part != np.take(part, [0], axis=axis)):
            return False
    return True
