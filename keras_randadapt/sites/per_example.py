"""Adapters with other weights for each example of a batch.

While a model computes, a context holds the weights of the batch's examples.
Sites then see each adapter as a `PerExample`, which takes them from there.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NoReturn

from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.sites.product import Product

#: The weights of an adapter at one site: a dict from the name of a weight to a
#: tensor `(examples, *shape)`.
Weights = Mapping[str, Tensor]

_batch: contextvars.ContextVar[Mapping[tuple[str, str], Weights] | None] = (
    contextvars.ContextVar("keras_randadapt_per_example", default=None)
)
_noted: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "keras_randadapt_noted_layers", default=None
)


@contextlib.contextmanager
def weights_of_batch(
    weights: Mapping[tuple[str, str], Weights],
) -> Iterator[None]:
    """Within this block, adapters compute with these weights.

    Args:
        weights: dict from a site's address and an adapter's name to its
            `Weights`. The examples are the first axis of the model's inputs.
    """
    token = _batch.set(weights)
    try:
        yield
    finally:
        _batch.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """Within this block, the messages of `refuse` are noted too.

    Yields:
        list of messages.
    """
    found: list[str] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def check_examples(layer: Any, inputs: Tensor) -> None:
    """Raises `ValueError` unless examples are the first axis of an input.

    Args:
        layer: A site.
        inputs: Its input.
    """
    batch = _batch.get()
    if batch is None:
        return
    weights = next(iter(batch.values()))
    examples = next(iter(weights.values())).shape[0]
    first = inputs.shape[0] if len(inputs.shape) else 1
    if None in (first, examples) or int(first) % int(examples) == 0:
        return
    refuse(
        f"The layer '{layer.path}' gets an input of the shape "
        f"{tuple(inputs.shape)} in a batch of {examples} examples, so nothing "
        "tells which example a number belongs to. Leave the layer out of the "
        "adapters of a bank."
    )


def refuse(message: str) -> NoReturn:
    """Raises `ValueError`; see `noted`."""
    found = _noted.get()
    if found is not None:
        # Backends may raise an error of their own in the place of this one.
        found.append(message)
    raise ValueError(message)


def of_batch(adapter: Any) -> Any:
    """The adapter itself, or a `PerExample` inside `weights_of_batch`."""
    batch = _batch.get()
    if batch is None:
        return adapter
    return PerExample(adapter, batch[adapter.site.address, adapter.name])


class PerExample:
    """An adapter as a site sees it, with weights of each example's own.

    A method supports it with one of two methods. An additive one has
    `delta_per_example(x, weights)`, which takes `(examples, tokens, input_dim)`
    and returns `(examples, tokens, output_dim)`. Any other has
    `adapt_per_example(x, product, bias, weights)`; see `IA3` for an example.
    Embeddings take `lookup_per_example(ids, dtype, weights)`, from `(examples,
    tokens)` to `(examples, tokens, output_dim)`, and for tied heads
    `delta_transpose_per_example(x, weights)`. Normalizations take
    `bias_per_example(weights)`, `(examples, size)`.

    Args:
        adapter: A built adapter.
        weights: Its `Weights`.
    """

    #: The change of the bias is part of `adapt`.
    adapts_bias = False

    def __init__(self, adapter: Any, weights: Weights):
        self.adapter = adapter
        self.weights = weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        rows = self._rows(x, self.adapter.input_dim)
        if getattr(self.adapter, "delta_per_example", None) is not None:
            change = self.adapter.delta_per_example(rows, self.weights)
            return linear(x) + ops.reshape(
                change, (-1, self.adapter.output_dim)
            )

        def product(z):
            y = linear(ops.reshape(z, (-1, self.adapter.input_dim)))
            return self._rows(y, self.adapter.output_dim)

        y = self.adapter.adapt_per_example(
            rows, product, linear.bias_view(), self.weights
        )
        return ops.reshape(y, (-1, self.adapter.output_dim))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        rows = ops.reshape(ids, (self._examples(), -1))
        y = self.adapter.lookup_per_example(rows, dtype, self.weights)
        return ops.reshape(y, (*ops.shape(ids), self.adapter.output_dim))

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        rows = self._rows(x, self.adapter.output_dim)
        y = self.adapter.delta_transpose_per_example(rows, self.weights)
        return ops.reshape(y, (*ops.shape(x)[:-1], self.adapter.input_dim))

    def adapt_norm(self, y: Tensor) -> Tensor:
        """The output of a normalization, with offsets of each example's own.

        Args:
            y: Tensor `(..., size)`.
        """
        change = of_examples(
            self.adapter.bias_per_example(self.weights), y.dtype
        )
        rows = self._rows(y, change.shape[-1]) + change
        return ops.reshape(rows, ops.shape(y))

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        refuse(
            f"The layer around '{self.adapter.site.address}' does not call it "
            "but reads its kernel, and the examples of a batch have no kernel "
            "in common. Leave it out of the adapters of a bank."
        )

    def _examples(self):
        return ops.shape(next(iter(self.weights.values())))[0]

    def _rows(self, x, size):
        return ops.reshape(x, (self._examples(), -1, size))


def check_bias(adapter: Any) -> None:
    """Raises `ValueError` if a bias that is read differs by example.

    Args:
        adapter: An adapter, or a `PerExample`.
    """
    if isinstance(adapter, PerExample) and adapter.adapter.adapts_bias:
        refuse(
            f"The layer around '{adapter.site.address}' does not call it but "
            "reads its bias, and the examples of a batch have no bias in "
            "common. Leave it out of the adapters of a bank."
        )


def of_examples(vectors: Tensor, dtype: str) -> Tensor:
    """A vector of each example, to multiply the tokens of the example by.

    Args:
        vectors: Tensor `(examples, size)`.
        dtype: The dtype of the computation.

    Returns:
        Tensor `(examples, 1, size)`.
    """
    return ops.expand_dims(ops.cast(vectors, dtype), 1)


def taken(matrices: Tensor, ids: Tensor) -> Tensor:
    """Rows of a matrix of each example.

    Args:
        matrices: Tensor `(examples, rows, columns)`.
        ids: Integer tensor `(examples, tokens)`.

    Returns:
        Tensor `(examples, tokens, columns)`.
    """
    return ops.take_along_axis(matrices, ops.expand_dims(ids, -1), axis=1)


def rows_of_basis(basis: Any, ids: Tensor, dtype: str) -> Tensor:
    """Columns of a frozen basis `(rank, dim)`, which are rows of its transpose.

    Args:
        basis: A basis of `bases`.
        ids: Integer tensor.
        dtype: The dtype of the result.

    Returns:
        Tensor `(*ids.shape, rank)`.
    """
    if hasattr(basis, "take"):
        return basis.take(ids, dtype, axis=1)
    # A transform can't compute single rows.
    matrix = ops.transpose(basis.matrix())
    return ops.cast(ops.take(matrix, ids, axis=0), dtype)
