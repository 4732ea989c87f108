"""`Site`: the place of an adapter, as its method sees it."""

import dataclasses
from typing import NoReturn

from keras_randadapt.sites.kernel_view import KernelView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """The description of a site from which a method builds its adapter.

    A layer with several kernels has one site for each kernel. The address of
    such a site is the layer's address, a slash, and the kernel's name.

    Attributes:
        input_dim: int. The number of rows of the kernel view.
        output_dim: int. The number of its columns.
        address: string. The structural address: the path of the layer's
            weights in a weights file.
        kernel_name: Optional string. The layer's attribute that holds the
            kernel, without underscore, such as `"kernel"` or `"embeddings"`;
            `None` for normalizations, which have no kernel.
        bias_shape: Optional tuple of ints. The shape of the layer's bias.
        source_dim: Optional int. The number of features of the argument `x`
            of `Adapter.adapt_output`.
        number: int. The place of the site among those of the injection, in
            the order of the model's layers.
        stack: Optional int. The number of kernels that are stacked in one
            variable, as the experts of a mixture are.
        input_channels: Optional int. The number of features of one position
            of the input. A convolution's kernel view has `input_channels` rows
            for each position of the window, and of a grouped one it is the
            number in each group. For all other layers it is `input_dim`.
        output_channels: Optional int. The number of features of one position
            of the output. A transposed convolution's kernel view has
            `output_channels` columns for each position of the window. For all
            other layers it is `output_dim`.
    """

    input_dim: int
    output_dim: int
    address: str = ""
    kernel_name: str | None = "kernel"
    bias_shape: tuple[int, ...] | None = None
    source_dim: int | None = None
    number: int = 0
    stack: int | None = None
    input_channels: int | None = None
    output_channels: int | None = None

    def __post_init__(self) -> None:
        if self.source_dim is None:
            object.__setattr__(self, "source_dim", self.input_dim)
        if self.input_channels is None:
            object.__setattr__(self, "input_channels", self.input_dim)
        if self.output_channels is None:
            object.__setattr__(self, "output_channels", self.output_dim)

    def __iter__(self) -> NoReturn:
        # In earlier versions `build` got the pair `(input_dim, output_dim)`.
        raise TypeError(
            "A `Site` can't be unpacked. Read its fields: `site.input_dim` and "
            "`site.output_dim` are the dimensions of the kernel view."
        )

    @property
    def kernel_view(self) -> KernelView:
        """The shape of the kernel seen as a matrix."""
        return KernelView(self.input_dim, self.output_dim)

    @property
    def shape(self) -> str:
        """The kernel view's shape as files spell it: `"8x4"`, or `"3x8x4"`.

        The first number of three is `stack`.
        """
        sizes = f"{self.input_dim}x{self.output_dim}"
        return sizes if self.stack is None else f"{self.stack}x{sizes}"

    @property
    def role(self) -> str:
        """The last part of the address.

        It is part of the role of a basis: the layers of a deep model share
        bases, but the projections inside one layer do not.
        """
        return self.address.rpartition("/")[2]
