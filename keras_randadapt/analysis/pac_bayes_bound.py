"""`pac_bayes_bound`: the value of the RLoRA paper's generalization bound."""

import hashlib
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Data
from keras_randadapt.analysis import point_values
from keras_randadapt.analysis.table import SiteTable
from keras_randadapt.model import state as state_lib
from keras_randadapt.per_example import PerExampleGradients
from keras_randadapt.per_example import example_source
from keras_randadapt.regularizers import pac_bayes

PRIORS = ("fisher", "bootstrap")


class PACBayesBound(SiteTable):
    """A row for each site, and the value of the bound. See `pac_bayes_bound`.

    The columns are `site`, `layer`, `weights`, their number, `distance`,
    `||d||` of the site's weights, and `information`, the site's own part of
    equation 18.

    Attributes:
        examples: int. `N`, the number of training examples.
        damping: float. The damping `c` of the Hessian.
        information: float. `I(w; S)` of equation 18, on the scale of `N`
            examples.
        quadratic: float. `d' Sigma^-1 d` of equation 13.
        divergence: float. The Kullback-Leibler divergence of equation 12,
            which is also the right-hand side of equation 2 as it is printed.
        gap: float. `sqrt(divergence / (2 N))`, which bounds the risk less the
            training loss for losses from 0 to 1.
        variances: dict from site to float64 array: the posterior's variance
            of each of the site's weights where all others keep their values.
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        *,
        examples: int,
        damping: float,
        information: float,
        quadratic: float,
        divergence: float,
        variances: dict[str, np.ndarray],
    ):
        super().__init__(columns, "information")
        self.examples = examples
        self.damping = damping
        self.information = information
        self.quadratic = quadratic
        self.divergence = divergence
        self.variances = variances

    @property
    def gap(self) -> float:
        return math.sqrt(self.divergence / (2 * self.examples))

    def __repr__(self):
        return (
            f"{super().__repr__()}\n"
            f"examples {self.examples}, information {self.information:.4g}, "
            f"divergence {self.divergence:.4g}, gap {self.gap:.4g}"
        )


def pac_bayes_bound(
    model: keras.Model,
    x: Data,
    y: Data = None,
    *,
    sample_weight: Data = None,
    reference: str | os.PathLike | Sequence[Any] = "zero",
    prior: str = "fisher",
    damping: float | None = None,
    posterior_scale: float = 1.0,
    resamples: int = 100,
    examples: int | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
) -> PACBayesBound:
    """The PAC-Bayes bound of the RLoRA paper at the weights of now.

    The weights `w` are those of the active adapters that are trained, `d = w -
    reference`, and `g_t` is the gradient of the loss of training example `t`
    by `w`. The prior is `N(reference, Sigma)` and the posterior is `N(w,
    posterior_scale * Sigma)`. With `P` weights, equation 12 is

        divergence = (P (s - 1 - log s) + d' Sigma^-1 d) / 2

    for `s = posterior_scale`. With `s = 1` this is half of equation 13.

    With `F = (1 / N) sum_t g_t g_t'`, the empirical Fisher matrix, and `H = F
    + c I`, the Hessian of lemma 3.1 as equation 17 has it, `Sigma` is one of

    - `"fisher"`: `(N H)^-1`, equation 17. Without damping, `divergence` is
      exactly half of equation 18, `I(w; S) = sum_t (d . g_t)^2`.
    - `"bootstrap"`: `(1 / K) sum_i m_i m_i' + (c / N) H^-2`, equation 15 over
      `K` resampled training sets. Lemma 3.1 gives the change of the weights,
      `m_i = H^-1 (1 / N) sum_t (psi_it - 1) g_t`; example `t` is `psi_it`
      times in the set, a Poisson number of mean 1. The second term makes
      `Sigma` regular. The sum tends to the other prior's `Sigma` as `K` grows.

    What equation 2 prints, a risk difference of at most the divergence, does
    not depend on `N`, and the paper gives no proof. `gap` is what is proven
    for the expected divergence over training sets and for losses from 0 to 1
    (Xu and Raginsky, 2017). It is a bound for a real model only as far as
    these assumptions hold: the reference does not depend on the data, weights
    are drawn from the posterior instead of fixed, one training set stands for
    the mean over sets, posterior and prior are Gaussians with proportional
    covariances, and the Fisher matrix is the Hessian, which it is at a
    minimum of a likelihood. Use it to compare runs, and not as a guarantee.

    Gradients are those of `callbacks.PACBayes`: the loss of a batch of one,
    without dropout and regularizers. Nothing in the model changes. It takes
    the time of some passes over `x`, and with `"bootstrap"` 8 bytes for each
    weight and resampled set.

    Args:
        model: A compiled, adapted model.
        x: The training examples, as `fit` takes them: arrays in any nest, or a
            data set that ends and can be read again. Each example is used
            once.
        y: Targets, if `x` is arrays.
        sample_weight: Weights of the examples, if `x` is arrays.
        reference: The mean of the prior: `"zero"`, as in section 3.3.2, the
            values of `model.trainable_variables` from before training, or the
            path of an adapter file with these.
        prior: `"fisher"` or `"bootstrap"`.
        damping: float, at least 0: `c`. The default is 0 for `"fisher"` and a
            hundredth of the mean of `F`'s diagonal for `"bootstrap"`, which
            needs some.
        posterior_scale: float, above 0. The covariance of the posterior
            divided by that of the prior.
        resamples: int. `K`.
        examples: Optional int, `N`, if `x` is only a part of the training set.
        seed: int. It determines the resampled sets.
        chunk_size: Optional int. See `callbacks.PACBayes`.

    Returns:
        A `PACBayesBound`, a table of the sites with the totals as attributes.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, if the model is not
            compiled or has no active adapter that is trained, if `x` is no
            data that ends, or if a gradient is not finite.

    Example:

    ```python
    start = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.fit(x, y, verbose=0)
    bound = kra.analysis.pac_bayes_bound(model, x, y, reference=start)
    print(bound.information, bound.gap)
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equations 2, 12
          to 18 and appendix B. Equation 12 is taken with the usual order of
          the two Gaussians, the factor 1/2 and the number of weights.
        - Xu and Raginsky, "Information-theoretic analysis of generalization
          capability of learning algorithms", NeurIPS 2017, theorem 1.
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled, so it has no loss: call "
            "`model.compile(loss=...)` first."
        )
    arguments.check_choice(prior, PRIORS, "prior")
    if damping is not None:
        damping = arguments.check_non_negative(damping, "damping")
    if prior == "bootstrap" and damping == 0:
        raise ValueError(
            "`damping` must be above 0 with `prior='bootstrap'`: resampled "
            "sets change no weights across the directions of all gradients, "
            "so the prior's covariance would be singular. "
            f"Received: damping={damping}"
        )
    scale = arguments.check_non_negative(posterior_scale, "posterior_scale")
    if not scale:
        raise ValueError(
            "`posterior_scale` must be above 0. Received: posterior_scale=0"
        )
    resamples = arguments.check_rank(resamples, "resamples")
    if examples is not None:
        examples = arguments.check_rank(examples, "examples")
    if chunk_size is not None:
        chunk_size = arguments.check_rank(chunk_size, "chunk_size")
    seed = random.check_seed(seed)
    source = example_source.source_of(x, y, sample_weight)
    flat = pac_bayes.FlatWeights(_weights(model, state))
    distance = _distance(model, flat, reference)

    sums = _Sums(flat, distance, resamples if prior == "bootstrap" else 0, seed)
    digest = hashlib.sha256(f"pac_bayes_bound {seed}".encode()).digest()
    gradients = PerExampleGradients(model, flat.variables, chunk_size)
    with example_source.own_random_state(
        int.from_bytes(digest[:4], "little"), x
    ):
        for batch in source.every():
            batch = example_source.preprocess(model, batch)
            for rows in gradients(batch):
                sums.add(rows)
    return sums.bound(state, prior, damping, scale, examples)


def _weights(model, state):
    weights = state.trainable_by_site()
    trained = {id(v) for v in model.trainable_variables}
    weights = {
        address: [v for v in variables if id(v) in trained]
        for address, variables in weights.items()
    }
    weights = {address: found for address, found in weights.items() if found}
    if not weights:
        raise ValueError(
            f"Model '{model.name}' has no active adapter that is trained, so "
            f"the bound has no weights. Active: {list(state.active)}. See "
            "`keras_randadapt.set_active`."
        )
    return weights


def _distance(model, flat, reference):
    values = flat.values().astype("float64")
    if isinstance(reference, str) and reference == "zero":
        return values
    point = point_values.read(
        model, reference, "reference", '`reference` must be "zero",'
    )
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}
    chosen = [np.ravel(point[places[id(v)]]) for v in flat.variables]
    return values - np.concatenate(chosen)


class _Sums:
    """Sums over the gradients of examples, a chunk at a time.

    Attributes:
        count: The number of examples so far.
        squares: `sum_t g_ti^2`, `(weights,)`.
        slope: `sum_t (d . g_t) g_t`, `(weights,)`.
        resampled: `sum_t (psi_it - 1) g_t`, `(resamples, weights)`.
    """

    def __init__(self, flat, distance, resamples, seed):
        self.flat = flat
        self.distance = distance
        self.count = 0
        self.information = 0.0
        self.site_information = np.zeros(len(flat.blocks))
        self.squares = np.zeros(flat.size)
        self.slope = np.zeros(flat.size)
        self.resampled = np.zeros((resamples, flat.size))
        key = np.array([seed, 0], "uint64")
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def add(self, rows):
        rows = np.asarray(rows, "float64")
        if not np.all(np.isfinite(rows)):
            raise ValueError(
                "The gradient of a training example in `x` is not finite. Has "
                "training diverged, or does the loss overflow in half "
                "precision?"
            )
        self.count += len(rows)
        along = np.stack(
            [rows[:, b] @ self.distance[b] for b in self.flat.blocks], axis=1
        )
        joint = np.sum(along, axis=1)
        self.information += float(joint @ joint)
        self.site_information += np.sum(along**2, axis=0)
        self.squares += np.sum(rows**2, axis=0)
        self.slope += joint @ rows
        if len(self.resampled):
            counts = self._generator.poisson(
                1.0, (len(rows), len(self.resampled))
            )
            self.resampled += (counts - 1.0).T @ rows

    def bound(self, state, prior, damping, scale, examples):
        if not self.count:
            raise ValueError("`x` must hold training examples, but gave none.")
        n = self.count if examples is None else examples
        diagonal = self.squares / self.count
        if damping is None:
            damping = 0.0
            if prior == "bootstrap":
                # Without any gradient every damping gives a divergence of 0
                # but for the damping's own part.
                damping = 0.01 * float(np.mean(diagonal)) or 1.0
        factor = n / self.count
        squared_distance = float(self.distance @ self.distance)
        if prior == "fisher":
            quadratic = factor * self.information
            quadratic += n * damping * squared_distance
        else:
            quadratic = self._bootstrap_quadratic(damping, n)
        spread = self.flat.size * (scale - 1 - math.log(scale))
        with np.errstate(divide="ignore"):
            variances = scale / (n * (diagonal + damping))
        owners, blocks = self.flat.owners, self.flat.blocks
        columns = {
            "site": owners,
            "layer": [state.layers[a].path for a in owners],
            "weights": [b.stop - b.start for b in blocks],
            "distance": [np.linalg.norm(self.distance[b]) for b in blocks],
            "information": factor * self.site_information,
        }
        return PACBayesBound(
            columns,
            examples=n,
            damping=damping,
            information=factor * self.information,
            quadratic=quadratic,
            divergence=(spread + quadratic) / 2,
            variances={owner: variances[b] for owner, b in zip(owners, blocks)},
        )

    def _bootstrap_quadratic(self, damping, n):
        """`d' Sigma^-1 d`, by the matrix inversion lemma.

        `Sigma = H^-1 ((1 / K) V' V + (c / N) I) H^-1`, where the rows of `V`
        are `(1 / N) sum_t (psi_it - 1) g_t`.
        """
        moved = self.slope / self.count + damping * self.distance
        # For a part of the training set, the variance of the mean gradient is
        # that of `n` examples.
        rows = self.resampled / math.sqrt(self.count * n)
        ridge = damping / n
        if len(rows) > len(moved):
            middle = rows.T @ rows / len(rows) + ridge * np.eye(len(moved))
            return float(moved @ np.linalg.solve(middle, moved))
        along = rows @ moved
        gram = rows @ rows.T + len(rows) * ridge * np.eye(len(rows))
        solved = np.linalg.solve(gram, along)
        return float(moved @ moved - along @ solved) / ridge
