"""Adapters with other weights for each example of a batch.

While a model computes, a context holds the weights of the batch's examples.
Sites then see each adapter as a `PerExample`, which takes them from there.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from keras import ops

from keras_randadapt._types import Tensor
from keras_randadapt.sites.product import Product

#: The weights of an adapter at one site: a dict from the name of a weight to a
#: tensor `(examples, *shape)`.
Weights = Mapping[str, Tensor]

_batch: contextvars.ContextVar[Mapping[tuple[str, str], Weights] | None] = (
    contextvars.ContextVar("keras_randadapt_per_example", default=None)
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
    `adapt_per_example(x, y, base, weights)`; see `BitFit` for an example.

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
        examples = ops.shape(next(iter(self.weights.values())))[0]
        rows = ops.reshape(x, (examples, -1, self.adapter.input_dim))
        if getattr(self.adapter, "delta_per_example", None) is not None:
            change = self.adapter.delta_per_example(rows, self.weights)
            return linear(x) + ops.reshape(
                change, (-1, self.adapter.output_dim)
            )

        def product(z):
            y = linear(ops.reshape(z, (-1, self.adapter.input_dim)))
            return ops.reshape(y, (examples, -1, self.adapter.output_dim))

        y = self.adapter.adapt_per_example(
            rows, product, linear.bias_view(), self.weights
        )
        return ops.reshape(y, (-1, self.adapter.output_dim))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        return self.adapter.lookup_per_example(ids, dtype, self.weights)


def of_examples(vectors: Tensor, dtype: str) -> Tensor:
    """A vector of each example, to multiply the tokens of the example by.

    Args:
        vectors: Tensor `(examples, size)`.
        dtype: The dtype of the computation.

    Returns:
        Tensor `(examples, 1, size)`.
    """
    return ops.expand_dims(ops.cast(vectors, dtype), 1)
