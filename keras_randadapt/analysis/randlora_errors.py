"""`randlora_errors`: theorem 4.1 of the RandLoRA paper in numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keras_randadapt import adapters
from keras_randadapt import arguments
from keras_randadapt.analysis.table import Table
from keras_randadapt.sites.site import Site


class RandLoRAErrors(Table):
    """A row for each term of RandLoRA. See `randlora_errors`.

    The columns are `term`, `norm`, the Frobenius norm of the segment of the
    target, and `error`, `||U_j S_j V_j' - B_j diag(l_j) A diag(g_j)||_F`.

    Attributes:
        epsilon: float. The largest `error`, which is `epsilon` of equation 6.
        bound: float. The number of terms times `epsilon`: equation 7.
        error: float. `||W - sum_j B_j diag(l_j) A diag(g_j)||_F`, which is at
            most `bound`.
        norm: float. `||W||_F`.
        rank: int. The rank of the bases.
        singular_values: float64 array: those of the target, falling.
        lambdas: float64 array `(terms, rank)`: the fitted `l_j`.
        gammas: float64 array `(terms, small)`: the fitted `g_j`, where `small`
            is the smaller side of the target.
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        *,
        error: float,
        rank: int,
        singular_values: np.ndarray,
        lambdas: np.ndarray,
        gammas: np.ndarray,
    ):
        super().__init__(columns)
        self.epsilon = float(np.max(self["error"]))
        self.bound = len(self) * self.epsilon
        self.error = error
        self.norm = float(np.linalg.norm(singular_values))
        self.rank = rank
        self.singular_values = singular_values
        self.lambdas = lambdas
        self.gammas = gammas

    def lora_error(self, rank: int | None = None) -> float:
        """The least error of a LoRA: equation 8.

        It is `sqrt(sum_{i > rank} s_i^2)` for the singular values `s_i` of the
        target. The paper prints the sum, which is the square of the norm.

        Args:
            rank: Optional int. The rank of the LoRA; by default that of the
                bases.

        Returns:
            A float.

        Raises:
            TypeError: If `rank` is no integer.
            ValueError: If `rank` is below 1.
        """
        rank = self.rank if rank is None else arguments.check_rank(rank)
        return float(np.linalg.norm(self.singular_values[rank:]))

    def __repr__(self):
        return (
            f"{super().__repr__()}\n"
            f"error {self.error:.4g} <= bound {self.bound:.4g}, "
            f"LoRA of rank {self.rank} >= {self.lora_error():.4g}, "
            f"norm {self.norm:.4g}"
        )


def randlora_errors(
    target: ArrayLike,
    adapter: adapters.RandLoRA,
    *,
    sweeps: int = 50,
) -> RandLoRAErrors:
    """How well RandLoRA can reach an update, and how well LoRA can.

    Let `W`, `(large, small)`, be the update, or its transpose, and `n` the
    number of terms of RandLoRA. The singular value decomposition of `W` is cut
    into `n` segments of `rank` singular values, `U_j S_j V_j'`. This function
    fits `B_j diag(l_j) A diag(g_j)` to each segment by alternating least
    squares, with the frozen bases that the adapter has at a site of this
    shape. By the triangle inequality the whole error is at most `n` times the
    largest error of a segment: theorem 4.1.

    The theorem does not say how large this `epsilon` is. Where the bound is
    above `||W||_F`, an update of zero is as good. The errors here
    are those of fits to single segments; training fits all terms together.

    Args:
        target: Array `(input_dim, output_dim)`: the update of a kernel view,
            such as a difference of two results of `kernels`.
        adapter: A `RandLoRA` template: its rank, basis and seed count.
        sweeps: int. The number of times that `l_j` and `g_j` are solved for in
            turn, from each of three starts.

    Returns:
        A `RandLoRAErrors` table.

    Raises:
        TypeError: If `adapter` is no `RandLoRA` or `sweeps` no integer.
        ValueError: If `target` is no finite matrix, if `sweeps` is below 1, or
            if the adapter's variant has other terms than the paper's equation
            4.

    Example:

    ```python
    before = kra.analysis.kernels(model)
    model.fit(x, y, verbose=0)
    after = kra.analysis.kernels(model)
    site = next(iter(kra.sites(model)))
    errors = kra.analysis.randlora_errors(
        after[site] - before[site], kra.RandLoRA(16), sweeps=5
    )
    print(errors.error, errors.bound, errors.lora_error())
    ```

    References:
        - RandLoRA ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987)),
          theorem 4.1 and equations 5 to 8.
    """
    if not isinstance(adapter, adapters.RandLoRA):
        raise TypeError(
            "`adapter` must be a `RandLoRA` template. "
            f"Received: adapter of type {type(adapter).__name__}"
        )
    if adapter.variant != "full":
        raise ValueError(
            "`adapter` must have `variant='full'`, whose terms are those of "
            f"the theorem. Received: variant={adapter.variant!r}"
        )
    sweeps = arguments.check_rank(sweeps, "sweeps")
    matrix = np.asarray(target, "float64")
    if matrix.ndim != 2 or not matrix.size or not np.all(np.isfinite(matrix)):
        raise ValueError(
            "`target` must be a matrix (input_dim, output_dim) of finite "
            f"numbers. Received: shape {matrix.shape}"
        )
    built = type(adapter).from_config(adapter.get_config())
    built.build_at(
        Site(
            input_dim=matrix.shape[0],
            output_dim=matrix.shape[1],
            address="target",
        )
    )
    if matrix.shape[0] <= matrix.shape[1]:
        matrix = matrix.T
    a = built.basis_a.dense()
    rank = a.shape[0]
    b = built.basis_b.dense().reshape(len(matrix), built.terms, rank)

    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rows, lambdas, gammas = [], [], []
    rest = matrix.copy()
    for j in range(built.terms):
        part = slice(j * rank, (j + 1) * rank)
        segment = (left[:, part] * values[part]) @ right[part]
        factors = _fit(segment, b[:, j], a, sweeps)
        fitted = _term(b[:, j], a, factors)
        rest -= fitted
        rows.append(
            (j, np.linalg.norm(segment), np.linalg.norm(segment - fitted))
        )
        lambdas.append(factors[0])
        gammas.append(factors[1])
    columns = dict(zip(("term", "norm", "error"), zip(*rows)))
    return RandLoRAErrors(
        columns,
        error=float(np.linalg.norm(rest)),
        rank=rank,
        singular_values=values,
        lambdas=np.stack(lambdas),
        gammas=np.stack(gammas),
    )


def _fit(segment, b, a, sweeps):
    """`l` and `g` that make `b diag(l) a diag(g)` close to `segment`.

    Alternating least squares ends in a local minimum, so it starts thrice.
    """
    # If the segment can be reached, these ratios are exactly `l g'`.
    inner = np.linalg.pinv(b) @ segment
    ratios = np.divide(inner, a, out=np.zeros_like(a), where=a != 0)
    starts = [
        np.ones(a.shape[1]),
        np.linalg.svd(ratios, full_matrices=False)[2][0],
        np.linalg.svd(inner * a, full_matrices=False)[2][0],
    ]
    found = [_alternate(segment, b, a, gamma, sweeps) for gamma in starts]
    return min(
        found, key=lambda one: np.linalg.norm(segment - _term(b, a, one))
    )


def _term(b, a, factors):
    return (b * factors[0]) @ a * factors[1]


def _alternate(segment, b, a, gamma, sweeps):
    gram = b.T @ b
    for _ in range(sweeps):
        scaled = a * gamma
        # With `g` fixed the normal equations of `l` have these coefficients.
        right = np.sum((b.T @ segment) * scaled, axis=1)
        lam = np.linalg.lstsq(gram * (scaled @ scaled.T), right)[0]
        # With `l` fixed each column has a factor of its own.
        product = (b * lam) @ a
        lengths = np.sum(product**2, axis=0)
        along = np.sum(product * segment, axis=0)
        gamma = np.divide(
            along, lengths, out=np.zeros_like(along), where=lengths > 0
        )
    return lam, gamma
