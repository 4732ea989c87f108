"""Where the weights of a tenant are in one row of numbers."""

import dataclasses
import math

import numpy as np

#: The name of the weights of a tenant's adapter, and of its heads, in a model.
ADAPTER = "tenant"
HEADS = "tenant_heads"


@dataclasses.dataclass(frozen=True)
class Part:
    """One weight of one site: a part of the row.

    Attributes:
        key: The site's address and the adapter's name in the model.
        weight: The name of the weight.
        shape: tuple of ints.
        start: int. Where the part begins in the row.
    """

    key: tuple[str, str]
    weight: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self):
        return self.start + math.prod(self.shape)


class Layout:
    """The parts of a row, in its order.

    Args:
        weights: list of `(key, weight, shape)`.
    """

    def __init__(self, weights):
        self.parts = []
        start = 0
        for key, weight, shape in weights:
            part = Part(key, weight, tuple(shape), start)
            self.parts.append(part)
            start = part.stop
        self.size = start

    def row(self, values):
        """A row of these values.

        Args:
            values: dict from `(key, weight)` to array.
        """
        row = np.empty(self.size, "float32")
        for part in self.parts:
            row[part.start : part.stop] = np.ravel(
                values[part.key, part.weight]
            )
        return row

    def weights(self, rows, reshape):
        """The weights of a batch; see `sites.per_example`.

        Args:
            rows: Tensor `(examples, size)`.
            reshape: Function of a tensor and a shape.
        """
        found = {}
        for part in self.parts:
            values = reshape(rows[:, part.start : part.stop], part.shape)
            found.setdefault(part.key, {})[part.weight] = values
        return found
