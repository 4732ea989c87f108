"""`ModulePart`: the part of a site that a module of transformers holds."""

import dataclasses

import keras
import numpy as np

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
            transposed), `"embedding"` or `"conv"`.
        weight_shape: The shape of the module's weight.
        columns: Integer array, the columns of the kernel view.
        inputs: Integer array, an input of the module for each row of the view.
        outputs: Integer array, an output of the module for each of `columns`.
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


def splits(layer, index, shapes):
    """How the tensors of a checkpoint make up the kernel view of a layer.

    Args:
        layer: A layer of a supported class.
        index: Integer array of the kernel's shape; see `shapes.Origin`. `None`
            where the kernel is the one tensor itself.
        shapes: The tensors' shapes.

    Returns:
        A list with `(kind, columns, inputs, outputs)` for each tensor, or
        `None` if the outputs of a tensor are not outputs of the view, or its
        inputs not inputs. A low-rank update can't go from one to the other
        then.
    """
    if index is None:
        if len(shapes[0]) != 2 or not isinstance(layer, keras.layers.Embedding):
            index = np.arange(int(np.prod(shapes[0]))).reshape(shapes[0])
        else:
            # A vocabulary is large, and the index would be larger.
            rows, columns = map(np.arange, shapes[0])
            return [("embedding", columns, rows, columns)]
    view = _view_of(layer, index)
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # Each column must come from one tensor.
    owners = np.searchsorted(starts, view[0], side="right") - 1
    found = []
    for i, shape in enumerate(shapes):
        columns = np.flatnonzero(owners == i)
        part = view if len(columns) == view.shape[1] else view[:, columns]
        split = _split(layer, part - starts[i], shape, sizes[i])
        if split is None:
            return None
        found.append((split[0], columns, *split[1:]))
    return found


def _view_of(layer, index):
    if isinstance(layer, keras.layers.Embedding):
        return index
    tensor = keras.ops.convert_to_tensor(np.ascontiguousarray(index))
    return keras.ops.convert_to_numpy(supported.as_view(layer, tensor))


def _split(layer, view, shape, size):
    # PyTorch's convolutions have as many axes as Keras's.
    axes = len(layer.kernel.shape) if isinstance(layer, _CONVOLUTIONS) else 2
    if len(shape) != axes or not view.size:
        return None
    width = size // shape[0]
    # The corner tells most of those that do not fit.
    if not _factors(view[:3, :3], width) or not _factors(view, width):
        return None
    if view.min() < 0 or view.max() >= size:
        return None
    firsts, others = np.divmod(view[:, 0], width)
    first_of_columns, other_of_columns = np.divmod(view[0], width)
    by_row = len(view) == 1 or firsts[0] == firsts[-1]
    if isinstance(layer, keras.layers.Embedding):
        if by_row and len(view) > 1:
            return None
        return "embedding", firsts, other_of_columns
    if by_row:
        kind = "linear" if len(shape) == 2 else "conv"
        return kind, others, first_of_columns
    if len(shape) != 2:
        return None
    return "conv1d", firsts, other_of_columns


def _factors(view, width):
    """Whether rows and columns of a weight depend on one axis each."""
    first, other = np.divmod(view, width)
    return bool(
        (np.all(first == first[:1]) and np.all(other == other[:, :1]))
        or (np.all(first == first[:, :1]) and np.all(other == other[:1]))
    )
