"""NOLA: low-rank factors that are combinations of random ones."""

import math
from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import bases
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import site_arguments
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import thin_product
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import taken
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class NOLA(site_arguments.SiteArguments):
    """LoRA whose factors are combinations of frozen random matrices.

    The delta is `scaling * A B`, with `A = A_0 + sum_i alpha_i A_i`,
    `(input_dim, rank)`, and `B = sum_j beta_j B_j`, `(rank, output_dim)`.
    `alpha` and `beta` are trained: a site has `2 * num_bases` weights,
    independent of its dimensions and the rank. Both start at zero, so the
    delta starts at zero.

    The `A_i` and `B_j` are drawn from the seed whenever they are needed, a few
    at a time. This takes hardly any memory but much time: the forward pass and
    the backward pass each draw `num_bases * rank * (input_dim + output_dim)`
    random numbers a site, independent of the batch size.

    Train it at a learning rate of 1e-3 to 1e-2 (AdamW).

    Args:
        rank: int. The rank of the delta.
        num_bases: int. The number of random matrices for each factor.
        alpha: Optional float. `scaling` is `alpha / rank`, and `alpha` is
            `rank` by default.
        scaling: Optional float, instead of `alpha`.
        site_alphas: Optional dict. See `LoRA`.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` or `num_bases` is no integer.
        ValueError: If an argument is out of range, or if both `alpha` and
            `scaling` are given. At injection, if `rank` exceeds the smaller
            dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.NOLA(4, num_bases=64),
        targets=["query", "value"],
        keep_trainable="logits",
    )
    ```

    References:
        - Koohpayegani et al., "NOLA", ICLR 2024, equation 3. `A_0` comes from
          its code: if both factors were zero at first, every gradient would
          be zero. Entries of `A_i` and `B_j` are uniform on `(-1, 1)`,
          divided by `sqrt(num_bases)`; those of `A_0` are LoRA's.
    """

    recommended_learning_rate = 5e-3

    def __init__(
        self,
        rank: int = 8,
        *,
        num_bases: int = 512,
        alpha: float | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.num_bases = arguments.check_rank(num_bases, "num_bases")
        self.scaling = arguments.check_alpha(alpha, scaling, self.rank)

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)

    def build(self, site: Site) -> None:
        self.check(site)
        self.nola_alpha = self.add_trainable(
            "nola_alpha", (self.num_bases,), "zeros"
        )
        self.nola_beta = self.add_trainable(
            "nola_beta", (self.num_bases,), "zeros"
        )
        first = bases.Uniform(
            self.input_dim, self.rank, self.seed, f"NOLA/{self.site.role}/A0"
        )
        self.first_a = self.add_frozen("first_a", first)
        self.bases_a = self._bases("A", self.input_dim)
        self.bases_b = self._bases("B", self.output_dim)

    def _bases(self, side, dim):
        return bases.RegeneratedUniform(
            self.num_bases,
            dim * self.rank,
            self.seed,
            f"NOLA/{self.site.role}/{side}",
        )

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        a, b = (ops.cast(one, x.dtype) for one in self.factors())
        return matmul(thin_product(x, a, training), b)

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        a, b = self._factors(weights["nola_alpha"], weights["nola_beta"])
        y = ops.matmul(x, ops.cast(a, x.dtype))
        return ops.matmul(y, ops.cast(b, x.dtype))

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        a, b = self._factors(weights["nola_alpha"], weights["nola_beta"])
        y = ops.matmul(x, ops.swapaxes(ops.cast(b, x.dtype), -1, -2))
        return ops.matmul(y, ops.swapaxes(ops.cast(a, x.dtype), -1, -2))

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        a, b = self._factors(weights["nola_alpha"], weights["nola_beta"])
        return ops.matmul(ops.cast(taken(a, ids), dtype), ops.cast(b, dtype))

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        a, b = (ops.cast(one, x.dtype) for one in self.factors())
        return matmul(matmul(x, ops.transpose(b)), ops.transpose(a))

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        a, b = self.factors()
        a = ops.cast(ops.take(a, ids, axis=0), dtype)
        return matmul(a, ops.cast(b, dtype))

    def delta_kernel(self) -> Tensor:
        return ops.matmul(*self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        alpha = ops.cast(self.nola_alpha, "float32")
        return self._factors(alpha, ops.cast(self.nola_beta, "float32"))

    def _factors(self, alpha, beta):
        """`A` and `B` of these coefficients, or those of each example."""
        examples = [-1] * (len(alpha.shape) - 1)
        scale = 1 / math.sqrt(self.num_bases)
        # U(-1, 1) divided by sqrt(input_dim) is LoRA's kaiming_uniform.
        a = self.first_a.matrix() / math.sqrt(self.input_dim)
        sums = self.bases_a.combine(alpha * scale)
        a = a + ops.reshape(sums, (*examples, *a.shape))
        b = self.bases_b.combine(beta * (scale * self.scaling))
        return a, ops.reshape(b, (*examples, self.rank, self.output_dim))

    def basis_digest(self) -> str:
        return (
            self.first_a.digest()
            + self.bases_a.digest()
            + self.bases_b.digest()
        )

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "num_bases": self.num_bases,
            "scaling": self.scaling,
            **super().get_config(),
        }
