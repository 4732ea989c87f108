"""LoRA-FA: a LoRA whose first factor is frozen."""

import math
from typing import Any
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import site_arguments
from keras_randadapt.bases import versions
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import rows_of_basis
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class LoRAFA(site_arguments.SiteArguments):
    """LoRA with a frozen first factor.

    The delta is `scaling * A B`. `A`, `(input_dim, rank)`, is a frozen random
    matrix that a seed determines and no file stores. `B`, `(rank,
    output_dim)`, is trained, which makes `rank * output_dim` weights a site.
    `B` starts at zero, so the delta starts at zero. The backward pass needs
    only `x A` of a site's input `x`, and not `x` itself.

    Layers of one name and shape share one `A`. For example, the queries of
    all blocks of a transformer share it, but a block's query and value do not.

    Train it at the learning rates of LoRA, 1e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The rank of the delta.
        alpha: Optional float. `scaling` is `alpha / rank`, and `alpha` is
            `rank` by default.
        scaling: Optional float, instead of `alpha`.
        site_alphas: Optional dict. See `LoRA`.
        basis: The random matrix `A`: `"uniform"` or `"gaussian"` for
            independent entries; `"sparse"` or `"very_sparse"` for ternary
            entries, kept as int8, of which few are changed so that `A` has
            full rank (see `bases.SparseTernary`); `"hadamard"` for a
            randomized Hadamard transform, which takes no memory. With every
            basis, entries have the variance of LoRA's, 1 / (3 input_dim).
            `"sparse_v1"` and `"very_sparse_v1"` are the sparse bases of
            earlier versions, whose variance is larger for small ranks.
        precondition: bool. Whether the gradient of `B` is multiplied by
            `(A' A)^-1 / scaling**2`. A step of plain gradient descent then
            changes the delta by the kernel's own gradient, projected onto
            the columns of `A`. Adaptive optimizers undo most of this.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range, if both `alpha` and
            `scaling` are given, or `precondition` with `scaling=0`. At
            injection, if `rank` exceeds the smaller dimension of a kernel
            view.

    Example:

    ```python
    kra.inject(
        classifier, kra.LoRAFA(8), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Zhang et al., "LoRA-FA", 2023
          ([arXiv 2308.03303](https://arxiv.org/abs/2308.03303)), equation 4.
        - Wang et al., "LoRA-Pro", 2024, section 3, with `A` held fixed, for
          `precondition`.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        basis: str = "uniform",
        precondition: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.scaling = arguments.check_alpha(alpha, scaling, self.rank)
        self.basis = versions.check_version(basis)
        self.precondition = bool(precondition)
        if self.precondition and 0 in (
            self.scaling,
            *self.site_alphas.values(),
        ):
            raise ValueError(
                "`precondition` divides by the scaling, which must not be 0. "
                f"Received: scaling={scaling}, alpha={alpha}, "
                f"site_alphas={self.site_alphas}"
            )

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)

    def build(self, site: Site) -> None:
        self.check(site)
        basis = versions.make_version(
            self.basis,
            self.input_dim,
            self.rank,
            self.seed,
            f"LoRAFA/{self.site.role}/A",
            smaller_dim=min(site.kernel_view),
            fill_v1=True,
        )
        # Only some bases have `take`.
        self.basis_a: Any = self.add_frozen("basis_a", basis)
        self.lora_b = self.add_trainable(
            "lora_b", (self.rank, self.output_dim), "zeros"
        )
        # B takes the scale of A's entries, because B is smaller than x.
        self._scale = self.scaling * basis.scale / math.sqrt(3 * self.input_dim)
        self._preconditioner = None
        if self.precondition:
            self._preconditioner = self._inverse_gram()

    def _inverse_gram(self):
        """`(A' A)^-1 / scaling**2`, float32."""
        a = self.basis_a.dense()
        if self.basis == "hadamard":
            a = a * self.basis_a.scale
        a = a / math.sqrt(3 * self.input_dim)
        inverse = np.linalg.pinv(a @ a.T) / self.scaling**2
        return inverse.astype("float32")

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return matmul(self.basis_a.matvec(x), self._scaled_b(x.dtype))

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        b = self._b_of_examples(weights, x.dtype)
        return ops.matmul(self.basis_a.matvec(x), b)

    def _b_of_examples(self, weights, dtype):
        return ops.cast(weights["lora_b"] * self._scale, dtype)

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        b = self._b_of_examples(weights, x.dtype)
        return self.basis_a.adjoint(ops.matmul(x, ops.swapaxes(b, -1, -2)))

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        a = rows_of_basis(self.basis_a, ids, dtype)
        return ops.matmul(a, self._b_of_examples(weights, dtype))

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        b = self._scaled_b(x.dtype)
        return self.basis_a.adjoint(matmul(x, ops.transpose(b)))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        if self.basis == "hadamard":
            # A transform cannot compute single rows.
            return super().lookup(ids, dtype, training)
        a = self.basis_a.take(ids, dtype, axis=1)
        return ops.matmul(a, self._scaled_b(dtype))

    def delta_kernel(self) -> Tensor:
        return ops.matmul(*self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        a = ops.transpose(self.basis_a.matrix())
        return a, self._scaled_b("float32")

    def basis_digest(self) -> str:
        return self.basis_a.digest()

    def _scaled_b(self, dtype):
        b = ops.cast(self.lora_b, "float32")
        if self._preconditioner is not None:
            # The value is B's; only its gradient is preconditioned.
            change = b - ops.stop_gradient(b)
            b = ops.stop_gradient(b) + ops.matmul(self._preconditioner, change)
        return ops.cast(b * self._scale, dtype)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**versions.read_spelling(config))

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "scaling": self.scaling,
            "basis": versions.spelling(self.basis),
            "precondition": self.precondition,
            **super().get_config(),
        }
