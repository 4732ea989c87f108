"""`update_posterior`: the Gaussian that random weights make of an update."""

from collections.abc import Mapping

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Tensor
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.analysis.pac_bayes_bound import PACBayesBound
from keras_randadapt.model import checks
from keras_randadapt.model import state as state_lib


class UpdatePosterior:
    """A Gaussian over one site's update. See `update_posterior`.

    The update is `left' diag(alpha) right` with independent `alpha_k` of
    variance `variance[k]`. All arrays are float64.

    Attributes:
        address: The site's structural address.
        left: `(rank, input_dim)`: `A`.
        right: `(rank, output_dim)`: `B' diag(beta)`, times the scaling.
        mean_alpha: `(rank,)`.
        variance: `(rank,)`.
    """

    def __init__(
        self,
        address: str,
        left: np.ndarray,
        right: np.ndarray,
        mean_alpha: np.ndarray,
        variance: np.ndarray,
    ):
        self.address = address
        self.left = left
        self.right = right
        self.mean_alpha = mean_alpha
        self.variance = variance

    @property
    def mean(self) -> np.ndarray:
        """`M`, `(input_dim, output_dim)`: the update at the mean of `alpha`."""
        return (self.left.T * self.mean_alpha) @ self.right

    @property
    def row_covariance(self) -> np.ndarray:
        """`U`, `(input_dim, input_dim)`: `E[(D - M)(D - M)']`.

        `D` is the update. As appendix A chooses the scale, the trace of `V` is
        1, so `U` has the variance of all entries as its trace.
        """
        # E[diag(e) K diag(e)] is K times the variances on its diagonal, and 0
        # elsewhere, since the entries of e are independent.
        return (self.left.T * (self.variance * self._lengths)) @ self.left

    @property
    def column_covariance(self) -> np.ndarray:
        """`V`, `(output_dim, output_dim)`: `E[(D - M)'(D - M)]` , scaled."""
        lengths = np.sum(self.left**2, axis=1)
        covariance = (self.right.T * (self.variance * lengths)) @ self.right
        trace = np.trace(covariance)
        return covariance / trace if trace else covariance

    @property
    def entry_variances(self) -> np.ndarray:
        """`(input_dim, output_dim)`: the variance of each entry."""
        return (self.left.T**2 * self.variance) @ self.right**2

    @property
    def projection(self) -> np.ndarray:
        """`G` of equation 9, `(input_dim * output_dim, rank)`.

        The update, flattened as NumPy's `ravel` does, is `G alpha`, so its
        distribution is `N(G mean_alpha, G diag(variance) G')`: equation 10.
        """
        outer = self.left.T[:, None, :] * self.right.T[None, :, :]
        return outer.reshape(-1, len(self.variance))

    def sample(self, count: int = 1, seed: int = 0) -> np.ndarray:
        """Draws of the update, `(count, input_dim, output_dim)`.

        Args:
            count: int, at least 1.
            seed: int in `[0, 2**64)`.

        Returns:
            A float64 array, the same for a seed on every backend.

        Raises:
            TypeError: If `count` is no integer.
            ValueError: If an argument is out of range.
        """
        count = arguments.check_rank(count, "count")
        drawn = random.normals(
            random.check_seed(seed),
            f"update_posterior/{self.address}",
            (count, len(self.variance)),
        ).astype("float64")
        alpha = self.mean_alpha + drawn * np.sqrt(self.variance)
        return np.einsum("ki,ck,ko->cio", self.left, alpha, self.right)

    @property
    def _lengths(self):
        return np.sum(self.right**2, axis=1)


def update_posterior(
    model: keras.Model,
    variance: float | Mapping[str, ArrayLike] | PACBayesBound,
    name: str | None = None,
) -> dict[str, UpdatePosterior]:
    """The Gaussian over each site's update if `alpha` is Gaussian.

    The update of `RLoRA` is `D = A' diag(alpha) B' diag(beta)`, `(input_dim,
    output_dim)`. With `beta` as it is and `alpha ~ N(alpha, diag(variance))`,
    `vec(D) = G alpha` is Gaussian on a space of `rank` dimensions: equations 9
    and 10. The same holds for `VeRA`, whose `d` is `alpha` and whose `b` is
    `beta`.

    `row_covariance` and `column_covariance` are `U` and `V` of equations 11
    and 20, computed from their definition. Equation 7, a matrix Gaussian with
    covariance `V (x) U`, has these two covariances too, but it is another
    distribution, of rank up to `rank**2`: the paper's "equivalent" holds for
    `U` and `V` alone. Where `A` has orthonormal rows, `V` is `right'
    diag(variance) right` over its trace.

    Args:
        model: An adapted model.
        variance: The variances of `alpha`, at least 0: a number, a dict from
            site to one number or `rank` numbers, or the result of
            `pac_bayes_bound`, whose posterior has variances for each weight.
        name: Optional string. The name of an adapter; by default the only one.

    Returns:
        dict from site to `UpdatePosterior`.

    Raises:
        TypeError: If the adapter is neither `RLoRA` nor `VeRA`.
        ValueError: If there is no adapter of this name, if the sites of
            `variance` are others, or if a variance is negative or infinite.

    Example:

    ```python
    kra.inject(model, kra.RLoRA(8), keep_trainable="logits")
    posteriors = kra.analysis.update_posterior(model, 0.01)
    posterior = next(iter(posteriors.values()))
    print(posterior.mean.shape, posterior.sample(3).shape)
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equations 7 and
          9 to 11 and appendix A. The trailing factors of equation 11's first
          root, `S' diag(beta)`, are left out, as in equation 23.
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    name = checks.one_name(state, name)
    found = state.adapters(name)
    if isinstance(variance, PACBayesBound):
        variances = _alpha_variances(found, variance)
    elif isinstance(variance, Mapping):
        variances = dict(variance)
    else:
        variances = dict.fromkeys(found, np.asarray(variance))
    if set(variances) != set(found):
        different = sorted(set(variances) ^ set(found))
        raise ValueError(
            "`variance` must have the sites of the adapter as keys. They "
            f"differ in {different[:5]}"
        )
    return {
        address: _posterior(address, adapter, variances[address])
        for address, adapter in found.items()
    }


def _form(adapter: Adapter) -> tuple[Tensor, keras.Variable, Tensor]:
    if hasattr(adapter, "vector_form"):
        return adapter.vector_form()
    raise TypeError(
        "`update_posterior` is for `RLoRA` and `VeRA`, whose update is linear "
        f"in a vector. The adapter is of type {type(adapter).__name__}"
    )


def _alpha_variances(found, bound):
    variances = {}
    for address, adapter in found.items():
        if address not in bound.variances:
            raise ValueError(
                f"`variance` is a bound without the site '{address}'. Compute "
                "it with this adapter active and trained."
            )
        _, alpha, _ = _form(adapter)
        start = 0
        for variable in adapter.trainable_variables:
            size = int(np.prod(variable.shape))
            if variable is alpha:
                break
            start += size
        variances[address] = bound.variances[address][start : start + size]
    return variances


def _posterior(address, adapter, variance):
    left, alpha, right = map(_numpy, _form(adapter))
    variance = np.asarray(variance, "float64")
    if variance.shape not in ((), alpha.shape):
        raise ValueError(
            f"`variance['{address}']` must be a number or have shape "
            f"{alpha.shape}. Received: shape {variance.shape}"
        )
    if not np.all(np.isfinite(variance) & (variance >= 0)):
        raise ValueError(
            f"`variance` of '{address}' must be finite and at least 0. The "
            "loss of no example may depend on a weight: give "
            "`pac_bayes_bound` some `damping`."
        )
    variance = np.broadcast_to(variance, alpha.shape).copy()
    return UpdatePosterior(address, left, right, alpha, variance)


def _numpy(tensor):
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    return array.astype("float64")
