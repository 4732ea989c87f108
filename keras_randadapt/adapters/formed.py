"""`FormedAdapter`: adapters that form their whole delta in every step."""

import abc

from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.formed_products import formed_product
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import taken
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.product import kernel_to_change


class FormedAdapter(base.Adapter):
    """An adapter without factors that an input could be multiplied by.

    A step forms the delta, adds it to the kernel where the kernel may be
    changed, and multiplies each input once. The backward pass forms it again.
    """

    @abc.abstractmethod
    def _terms(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The arguments of `_formed`, as `formed_product` takes them.

        Returns:
            Tuple of those that need no gradient and of the trained ones.
        """

    @abc.abstractmethod
    def _formed(self, *terms: Tensor) -> Tensor:
        """The delta of all terms, `(input_dim, output_dim)`, float32."""

    @abc.abstractmethod
    def _gradients(
        self, terms: tuple[Tensor, ...], of_delta: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each term.

        Args:
            terms: The arguments of `_formed`.
            of_delta: The gradient of the delta, of its shape, float32.

        Returns:
            Tuple with a gradient or `None` for each term.
        """

    @abc.abstractmethod
    def _kernels(self, weights: Weights, dtype: str) -> Tensor:
        """The delta of each example, `(examples, input_dim, output_dim)`."""

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        dropped = bool(training and self.dropout)
        kernel = kernel_to_change(linear, x, dropped)
        if kernel is None:
            return linear(x) + self.delta(self.drop(x, training), training)
        return self._product(x, kernel)

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._product(x)

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        return self._product(x, transposed=True)

    def delta_kernel(self) -> Tensor:
        fixed, trained = self._terms()
        return self._formed(*fixed, *trained)

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        return ops.matmul(x, self._kernels(weights, x.dtype))

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        kernels = self._kernels(weights, x.dtype)
        return ops.matmul(x, ops.swapaxes(kernels, -1, -2))

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        return taken(self._kernels(weights, dtype), ids)

    def _product(self, x, kernel=None, transposed=False):
        """`x (kernel + delta)`, `x delta`, or `x delta'`."""
        kernels = () if kernel is None else (kernel,)
        count, dtype = len(kernels), x.dtype

        def form(*arguments):
            whole = self._formed(*arguments[count:])
            whole = ops.transpose(whole) if transposed else whole
            return ops.cast(sum(arguments[:count], whole), dtype)

        def gradients(arguments, of_matrix):
            whole = ops.transpose(of_matrix) if transposed else of_matrix
            whole = ops.cast(whole, "float32")
            of_terms = self._gradients(arguments[count:], whole)
            return (*[of_matrix for _ in kernels], *of_terms)

        fixed, trained = self._terms()
        return formed_product(
            x, form, gradients, (*kernels, *fixed), tuple(trained)
        )
