"""The window of a convolution's kernel view, for factors that know of it."""

import dataclasses

from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.sites.site import Site


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel view is made of positions and channels.

    Row `(p, i)` of a convolution's view is channel `i` at position `p` of the
    window, and `row_places` counts these positions. A transposed convolution
    has them in its columns, and no layer has both. All other layers have one
    position.

    Attributes:
        row_places: int.
        inputs: int. The number of channels of a row's position.
        column_places: int.
        outputs: int. The number of channels of a column's position.
    """

    row_places: int
    inputs: int
    column_places: int
    outputs: int

    @classmethod
    def of(cls, site: Site) -> "Window":
        """The window of a site, with one position where there is none."""
        inputs, outputs = site.input_channels, site.output_channels
        assert inputs is not None and outputs is not None
        places = site.input_dim // inputs, site.output_dim // outputs
        return cls(places[0], inputs, places[1], outputs)

    @property
    def places(self) -> int:
        """The number of positions."""
        return self.row_places * self.column_places

    def view(self, kernels: Tensor) -> Tensor:
        """A kernel view from a matrix a position.

        Args:
            kernels: Tensor `(places, inputs, outputs)`.

        Returns:
            Tensor `(row_places * inputs, column_places * outputs)`.
        """
        if self.column_places > 1:
            kernels = ops.transpose(kernels, (1, 0, 2))
        return ops.reshape(
            kernels,
            (
                self.row_places * self.inputs,
                self.column_places * self.outputs,
            ),
        )


def tucker(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """`a core[p] b` for each position `p` of a window.

    This is the Tucker form of a kernel whose window is left whole.

    Args:
        a: Tensor `(inputs, rank)`.
        core: Tensor `(places, rank, rank)`.
        b: Tensor `(rank, outputs)`.

    Returns:
        Tensor `(places, inputs, outputs)`.
    """
    return ops.matmul(ops.matmul(a, core), b)
