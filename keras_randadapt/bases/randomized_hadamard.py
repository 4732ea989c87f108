"""The randomized Hadamard basis."""

import functools
import math

import numpy as np
from keras import ops

from keras_randadapt import hadamard as hadamard_lib
from keras_randadapt import random
from keras_randadapt._types import Tensor
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import program as steps
from keras_randadapt.ops import randomized_transform
from keras_randadapt.ops.fast_products import split_last

#: The choices of `hadamard`: a transform of the dimension itself, or padding.
HADAMARD = ("exact", "pad")
#: The choices of `rows`.
ROWS = ("random", "leading")


class RandomizedHadamard:
    """A frozen random matrix `(rank, dim)` made of Hadamard transforms.

    The matrix is `S H B_k ... H B_1 P`. `P` places `dim` coordinates, each
    stage multiplies by random signs `B_i` and applies the orthonormal Hadamard
    transform `H`, and `S` keeps `rank` coordinates (RLoRA, equation 4, with
    each stage normalized and without the paper's spurious 1/sigma). With
    `expand`, the matrix is `(dim, rank)` instead: `S` comes first and `P` last,
    as on the paper's output side. A rank above the order stacks independent
    blocks.

    With `hadamard="exact"` the order is `dim` itself. Up to a rank of `dim`,
    the rows are then orthonormal; with `expand`, the columns are.

    Args:
        dim: int. The dimension that is transformed.
        rank: int. The number of rows, or of columns with `expand`.
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the basis. Each role has other signs.
        stages: int. The number `k` of sign and transform stages.
        rows: `"random"` or `"leading"`, the coordinates that `S` keeps.
        hadamard: `"exact"`, or `"pad"`, which pads with zeros to the next
            power of two and crops. `"pad"` is not orthogonal and may not have
            full rank.
        expand: bool. See above.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        seed: int,
        role: str,
        stages: int = 2,
        rows: str = "random",
        hadamard: str = "exact",
        expand: bool = False,
    ):
        self.dim = dim
        self.rank = rank
        self.expand = expand
        self._plans = _plans(
            dim, rank, seed, role, stages, rows, hadamard, expand
        )
        self._sizes = [
            plan.input_dim if expand else plan.output_dim
            for plan in self._plans
        ]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.dim, self.rank) if self.expand else (self.rank, self.dim)

    @property
    def scale(self) -> float:
        """The factor that gives the entries variance 1: `sqrt(order)`."""
        return math.sqrt(self._plans[0].order)

    @property
    def cost(self) -> int:
        """The approximate multiply-adds of one `matvec` of one vector."""
        return sum(_cost(plan) for plan in self._plans)

    def operands(self) -> tuple[Tensor, ...]:
        """An empty tuple, since no values are kept.

        See `RandomMatrix.operands`.
        """
        return ()

    def matvec(
        self,
        x: Tensor,
        operands: tuple[Tensor, ...] | None = (),
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """The product with `x`, on its last axis.

        Args:
            x: Tensor `(..., dim)`, or `(..., rank)` with `expand`.
            operands: Ignored; other bases take it.
            before: Optional vector of `x`'s dtype, by which `x` is multiplied.
            after: Optional vector, by which the result is multiplied.

        Returns:
            Tensor `(..., rank)`, or `(..., dim)` with `expand`.
        """
        return self._apply(x, False, self.expand, before, after)

    def adjoint(
        self,
        x: Tensor,
        operands: tuple[Tensor, ...] | None = (),
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """The product with the transpose; it swaps the shapes of `matvec`."""
        return self._apply(x, True, not self.expand, before, after)

    def matrix(self, operands: tuple[Tensor, ...] | None = ()) -> Tensor:
        """The matrix as a float32 tensor."""
        rows, columns = self.shape
        if rows <= columns:
            return self.adjoint(ops.eye(rows))
        return ops.transpose(self.matvec(ops.eye(columns)))

    def dense(self) -> np.ndarray:
        """The matrix as a float64 NumPy array, for tests and analysis."""
        axis = 1 if self.expand else 0
        return np.concatenate([p.dense() for p in self._plans], axis=axis)

    def digest(self) -> str:
        """A short hash of the random draws."""
        return _digest(self._plans)

    def _apply(self, x, adjoint, split, before, after):
        if len(self._plans) == 1:
            (plan,) = self._plans
            return randomized_transform(x, plan, adjoint, before, after)
        if before is not None:
            x = x * before
        parts = [x] * len(self._plans)
        if split:
            parts = split_last(x, self._sizes)
        parts = [
            randomized_transform(part, plan, adjoint)
            for part, plan in zip(parts, self._plans)
        ]
        y = sum(parts[1:], parts[0]) if split else ops.concatenate(parts, -1)
        return y if after is None else y * after


def _cost(plan):
    products = [
        (step.output_dim, factor.matrix.shape[1])
        for step in (getattr(s, "step", s) for s in plan.program)
        if isinstance(step, steps.Kronecker)
        for factor in step.grouped(hadamard_lib.PASS_COST, exact=False)
    ]
    return sum(math.prod(product) for product in products)


@functools.lru_cache(maxsize=1024)
def _plans(dim, rank, seed, role, stages, rows, hadamard, expand):
    """The plans of the blocks. Sites that share a basis share these objects."""
    order = dim
    if hadamard == "pad":
        order = 1 << (dim - 1).bit_length()
    plans = []
    for block, start in enumerate(range(0, rank, order)):
        size = min(order, rank - start)
        block_role = f"{role}/{block}"
        signs = random.signs(seed, f"{block_role}/signs", (stages, order))
        index = None
        if rows == "random" and size < order:
            # The basis needs a random set, in any order. It is sorted, because
            # memory is read fastest in rising order.
            chosen = random.permutation(seed, f"{block_role}/rows", order)
            index = np.sort(chosen[:size])
        if expand:
            plan = RandomizedTransform(
                order, signs, size, dim, input_index=index
            )
        else:
            plan = RandomizedTransform(
                order, signs, dim, size, output_index=index
            )
        plans.append(plan)
    return tuple(plans)


@functools.lru_cache(maxsize=1024)
def _digest(plans):
    draws = []
    for plan in plans:
        draws.append(plan.signs.astype("int64").ravel())
        for index in (plan.input_index, plan.output_index):
            if index is not None:
                draws.append(index)
    return random.digest(np.concatenate(draws))
