"""RLoRA: a LoRA whose projections are randomized Hadamard transforms."""

from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import bases
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.bases import randomized_hadamard
from keras_randadapt.ops import fence
from keras_randadapt.ops import with_gradient
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.per_example import rows_of_basis
from keras_randadapt.sites.site import Site

_ALPHA_INITIALIZER = {"name": "normal", "stddev": 0.1}


@keras.saving.register_keras_serializable(package="keras_randadapt")
class RLoRA(base.Adapter):
    """Randomized low-rank adaptation.

    The delta is `delta(x) = scaling * beta * B (alpha * (A x))`. `A`, `(rank,
    input_dim)`, and `B`, `(output_dim, rank)`, are randomized Hadamard
    transforms that a seed determines and no file stores. `alpha`, `(rank,)`,
    and `beta`, `(output_dim,)`, are trained, which makes `rank + output_dim`
    weights a site. `beta` starts at zero, so the delta starts at zero.

    With `hadamard="exact"` and `rank` up to both dimensions, `A` has
    orthonormal rows and `B` orthonormal columns: for `beta = 1` the singular
    values of the delta are `|alpha|` times `scaling`.

    Train it at a learning rate of 1e-2 to 1e-1 (AdamW), at least ten times
    LoRA's, and train any head at 1e-4 to 1e-3: see
    `keras_randadapt.optimizers.learning_rate_groups`.

    Args:
        rank: int. A rank above a dimension stacks independent transforms. A
            high rank costs little: each rank is one weight.
        scaling: float. A constant factor.
        stages: 1, 2 or 3. The number of sign flips and transforms on each
            side. With one stage `B` has few distinct rows; three stages gain
            little over two.
        rows: The coordinates of a transform that are kept: `"random"` or
            `"leading"`.
        hadamard: `"exact"`, which is orthogonal for any dimension, or `"pad"`,
            which reads the paper literally: it pads with zeros to a power of
            two and crops. For a dimension that is not a power of two, `"pad"`
            loses information, and with leading rows it is rank deficient.
        alpha_initializer: The first values of `alpha`: normal with standard
            deviation 0.1 by default. See `LoRA` for the forms it may have.
        beta_initializer: The first values of `beta`. Anything but zeros makes
            the adapted model differ from the base model from the start.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.RLoRA(rank=512, seed=0),
        targets=["query", "value"],
        keep_trainable=["logits"],
    )
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equations 3
          and 4. Each transform is orthonormal here, and rows are subsampled
          without rescaling.
    """

    recommended_learning_rate = 5e-2
    factors_are_cheap = False

    def __init__(
        self,
        rank: int = 512,
        *,
        scaling: float = 1.0,
        stages: int = 2,
        rows: str = "random",
        hadamard: str = "exact",
        alpha_initializer: Initializer | None = None,
        beta_initializer: Initializer = "zeros",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.scaling = arguments.check_scaling(scaling)
        arguments.check_choice(stages, (1, 2, 3), "stages")
        arguments.check_choice(rows, randomized_hadamard.ROWS, "rows")
        arguments.check_choice(
            hadamard, randomized_hadamard.HADAMARD, "hadamard"
        )
        self.stages = int(stages)
        self.rows = rows
        self.hadamard = hadamard
        if alpha_initializer is None:
            alpha_initializer = dict(_ALPHA_INITIALIZER)
        self.alpha_initializer = arguments.check_initializer(
            alpha_initializer, "alpha_initializer"
        )
        self.beta_initializer = arguments.check_initializer(
            beta_initializer, "beta_initializer"
        )

    def build(self, site: Site) -> None:
        self.alpha = self.add_trainable(
            "alpha", (self.rank,), self.alpha_initializer
        )
        self.beta = self.add_trainable(
            "beta", (self.output_dim,), self.beta_initializer
        )
        self.basis_a = self._basis(self.input_dim, "A", expand=False)
        self.basis_b = self._basis(self.output_dim, "B", expand=True)

    def _basis(self, dim, side, expand):
        return bases.RandomizedHadamard(
            dim,
            self.rank,
            self.seed,
            f"RLoRA/{self.site.role}/{side}",
            self.stages,
            self.rows,
            self.hadamard,
            expand,
        )

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return with_gradient(
            self._expand,
            self._expand_gradient,
            self.basis_a.matvec(x),
            ops.cast(self.alpha, x.dtype),
            self._scaled_beta(x.dtype),
        )

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        z = self.basis_a.matvec(x)
        return self._expand_per_example(z, weights)

    def _expand_per_example(self, z, weights):
        alpha, beta = self._of_examples(weights, z.dtype)
        return self.basis_b.matvec(z * alpha) * beta

    def _of_examples(self, weights, dtype):
        return (
            of_examples(weights["alpha"], dtype),
            of_examples(weights["beta"] * self.scaling, dtype),
        )

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        alpha, beta = self._of_examples(weights, x.dtype)
        return self.basis_a.adjoint(self.basis_b.adjoint(x * beta) * alpha)

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        z = rows_of_basis(self.basis_a, ids, dtype)
        return self._expand_per_example(z, weights)

    # The gradient of `beta` needs the expanded features, `output_dim` numbers
    # a token. They are computed again from `rank` numbers a token, which are
    # kept.

    def _expand(self, z, alpha, beta):
        return self.basis_b.matvec(z, before=alpha, after=beta)

    def _expand_gradient(self, kept, upstream):
        z, alpha, beta = kept
        z, alpha = fence(upstream, z, alpha)
        pulled = self.basis_b.adjoint(upstream, before=beta)
        tokens = tuple(range(len(upstream.shape) - 1))
        return (
            pulled * alpha,
            ops.sum(pulled * z, tokens),
            ops.sum(upstream * self.basis_b.matvec(z, before=alpha), tokens),
        )

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        v = self.basis_b.adjoint(x * self._scaled_beta(x.dtype))
        return self.basis_a.adjoint(v * ops.cast(self.alpha, x.dtype))

    def delta_kernel(self) -> Tensor:
        # B transforms the rows of diag(alpha), then A' transforms the other
        # axis: these are rank + output_dim transforms for any input_dim.
        rows = self.basis_b.matvec(ops.diag(self._float(self.alpha)))
        columns = ops.transpose(rows * self._scaled_beta("float32"))
        return ops.transpose(self.basis_a.adjoint(columns))

    @property
    def inputs_to_form(self) -> int:
        """The number of inputs whose products cost as much as the update.

        The update takes a transform for each rank and each output.
        """
        return self.rank + self.output_dim

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.rank >= min(self.input_dim, self.output_dim):
            return None
        rows = ops.transpose(self.basis_b.matrix())
        rows = rows * ops.expand_dims(self._float(self.alpha), -1)
        left = ops.transpose(self.basis_a.matrix())
        return left, rows * self._scaled_beta("float32")

    def vector_form(self) -> tuple[Tensor, keras.Variable, Tensor]:
        """`left`, `alpha` and `right` of `delta = left' diag(alpha) right`."""
        right = ops.transpose(self.basis_b.matrix())
        right = right * self._scaled_beta("float32")
        return self.basis_a.matrix(), self.alpha, right

    def basis_digest(self) -> str:
        return self.basis_a.digest() + self.basis_b.digest()

    def _scaled_beta(self, dtype):
        beta = self._float(self.beta)
        if self.scaling != 1.0:
            beta = beta * self.scaling
        return ops.cast(beta, dtype)

    def _float(self, variable):
        return ops.cast(variable, "float32")

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "scaling": self.scaling,
            "stages": self.stages,
            "rows": self.rows,
            "hadamard": self.hadamard,
            "alpha_initializer": arguments.serialize_initializer(
                self.alpha_initializer
            ),
            "beta_initializer": arguments.serialize_initializer(
                self.beta_initializer
            ),
            **super().get_config(),
        }
