"""RandLoRA: full-rank adaptation by combinations of random bases."""

import math
from typing import Any
from typing import Self

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import bases
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import mixing
from keras_randadapt.adapters import site_arguments
from keras_randadapt.bases import versions
from keras_randadapt.ops import fence
from keras_randadapt.ops import with_gradient
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.product import kernel_to_change
from keras_randadapt.sites.site import Site

VARIANTS = ("full", "averaged", "half")
COMPUTE = ("auto", "factored", "materialized")
RESCALE = ("sqrt", "none")


@keras.saving.register_keras_serializable(package="keras_randadapt")
class RandLoRA(site_arguments.SiteArguments):
    """Full-rank adaptation by random bases.

    The delta is `scaling * sum_j B_j diag(lambda_j) A diag(gamma_j)`. If the
    output is at least as large as the input, this is the paper's orientation
    and the transpose of the kernel view; otherwise it has the orientation of
    the kernel view. `d_min` and `d_max` are the smaller and larger dimension
    of the kernel view. `A`, `(rank, d_min)`, and the `n = ceil(d_min / rank)`
    matrices `B_j`, `(d_max, rank)`, are frozen and random; a seed determines
    them and a file stores only the seed. `lambda`, `(n, rank)`, and `gamma`,
    `(n, d_min)`, are trained. A site has `n * (rank + d_min)` weights, fewer
    for a larger rank, and the delta has full rank. `lambda` starts at zero, so
    the delta starts at zero.

    All sites of one shape share one `A` and one `B`. They take `d_max * d_min`
    numbers of four bytes, of one byte with a sparse basis, and no memory with
    `basis="hadamard"`.

    Train it at a learning rate of 1e-4 to 1e-2 (AdamW). In this library's own
    experiment (docs/evidence.md) it beat a LoRA with as many weights where the
    update to learn had half of the full rank or more and equal singular
    values, and LoRA won elsewhere.

    Args:
        rank: int. The rank of each of the `n` terms.
        basis: The random matrices `A` and `B_j`, with entries of variance 1.
            `"gaussian"` and `"uniform"` have independent entries. `"sparse"`
            and `"very_sparse"` have ternary entries, kept as int8, of which
            one in 3, or one in `sqrt(d_min)`, is not zero; few entries are
            changed so that the delta has full rank (see
            `bases.SparseTernary`). `"hadamard"` means randomized Hadamard
            transforms, which take no memory. `"sparse_v1"` and
            `"very_sparse_v1"` are the sparse bases of earlier versions, whose
            variance and rank may be others.
        variant: `"full"`, or an ablation of the paper. `"averaged"` is
            `sum_j B_j diag(lambda_j)` times `sum_j A diag(gamma_j)`, of rank
            `rank`; `"half"` has half of the terms.
        alpha: Optional float, `2 * rank` by default. See `rescale`.
        rescale: With `"sqrt"`, `scaling` is `alpha / rank / sqrt(n)` with the
            `n` of the site, as in the paper's code and appendix. With
            `"none"`, it is `alpha / rank`, as in Hugging Face's PEFT (whose
            `alpha` is 640 at rank 32).
        site_alphas: Optional dict. See `LoRA`.
        compute: `"factored"` multiplies each input twice in addition to the
            site's own product. `"materialized"` forms the delta in every step
            and adds it to the kernel, and multiplies each input once.
            `"auto"` takes the form with fewer multiply-adds for the number of
            inputs. The results are equal up to rounding. With dropout in
            training, and in 16 bits, where the kernel would absorb a small
            delta, a formed delta is not added to the kernel but multiplied
            apart.
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
        kra.RandLoRA(rank=32, seed=0),
        targets=["query", "value"],
        keep_trainable=["logits"],
    )
    ```

    References:
        - Albert et al., "RandLoRA", ICLR 2025, equation 4. The frozen
          matrices of a site depend on its shape only, not on which other
          sites are adapted.
        - Achlioptas, 2003, and Li, Hastie and Church, 2006: sparse bases. The
          Hadamard basis is this library's own.
    """

    recommended_learning_rate = 1e-3
    factors_are_cheap = False

    def __init__(
        self,
        rank: int = 32,
        *,
        basis: str = "uniform",
        variant: str = "full",
        alpha: float | None = None,
        rescale: str = "sqrt",
        compute: str = "auto",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.basis = versions.check_version(basis)
        self.variant = arguments.check_choice(variant, VARIANTS, "variant")
        self.alpha = arguments.check_scaling(
            2 * self.rank if alpha is None else alpha, "alpha"
        )
        self.rescale = arguments.check_choice(rescale, RESCALE, "rescale")
        self.compute = arguments.check_choice(compute, COMPUTE, "compute")

    def set_alpha(self, alpha: float) -> None:
        self.alpha = alpha

    def build(self, site: Site) -> None:
        small, large = sorted(site.kernel_view)
        self.terms = -(-small // self.rank)
        if self.variant == "half":
            self.terms = -(-self.terms // 2)
        self._wide = self.input_dim <= self.output_dim
        self.randlora_lambda = self.add_trainable(
            "randlora_lambda", (self.terms, self.rank), "zeros"
        )
        self.randlora_gamma = self.add_trainable(
            "randlora_gamma",
            (self.terms, small),
            keras.initializers.Constant(1.0 / small),
        )
        self.basis_a = self._add_basis("A", small, self.rank, expand=False)
        # B_1 ... B_n side by side.
        self.basis_b = self._add_basis(
            "B", large, self.terms * self.rank, expand=True
        )
        self.scaling = self.alpha / self.rank
        if self.rescale == "sqrt":
            self.scaling /= math.sqrt(self.terms)
        self._mixing_of = mixing.Mixing(
            self.basis_a,
            self.terms,
            self.scaling * self.basis_a.scale * self.basis_b.scale,
        )

    def _add_basis(self, side, dim, rank, expand):
        basis = versions.make_version(
            self.basis,
            dim,
            rank,
            self.seed,
            f"RandLoRA/{side}",
            expand=expand,
            smaller_dim=min(self.input_dim, self.output_dim),
            # For generic vectors the delta has full rank only if no subspace
            # of dimension u holds more than n * u columns of A. Sparse bases
            # are filled so that it has; see `bases.regular_blocks`. A
            # Hadamard A of one stage fulfils the condition, since its rows are
            # orthogonal and its entries have one size; with two stages it may
            # have zeros.
            fill_v1=side == "A",
            stages=1 if side == "A" else 2,
        )
        return self.add_frozen(f"basis_{side.lower()}", basis)

    # Let B = [B_1 ... B_n], (large, p), and let the mixing matrix be
    # N = [(diag(lambda_j) A diag(gamma_j))' ...], (small, p). Then the delta
    # is N B' if `_wide` and B N' otherwise.

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        dropped = bool(training and self.dropout)
        kernel = kernel_to_change(linear, x, dropped)
        if kernel is not None and self._materializes(x, training, True):
            return self._materialized(x, training, self._wide, kernel)
        return linear(x) + self.delta(self.drop(x, training), training)

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._product(x, training, self._wide)

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        return self._product(x, training, not self._wide)

    def delta_kernel(self) -> Tensor:
        delta = self.basis_b.matvec(self._mixing())
        return delta if self._wide else ops.transpose(delta)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        lambdas, gamma, *a = self._mixing_arguments()
        small = min(self.input_dim, self.output_dim)
        if self.variant == "averaged" and self.rank < small:
            # All terms have one `A diag(gamma)`, so the sum is over the
            # `B_j diag(lambda_j)` alone.
            ones = ops.ones_like(lambdas)
            thin = self._mixing_of.form(ones, gamma, *a)[:, : self.rank]
            wide = ops.transpose(self.basis_b.matrix())
            wide = ops.reshape(wide, (self.terms, self.rank, -1))
            wide = ops.sum(wide * ops.expand_dims(lambdas, -1), axis=0)
        elif self.variant == "half" and self.terms * self.rank < small:
            thin = self._mixing()
            wide = ops.transpose(self.basis_b.matrix())
        else:
            return None
        if self._wide:
            return thin, wide
        return ops.transpose(wide), ops.transpose(thin)

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        if self._wide:
            rows = ops.take(self._mixing(), ids, axis=0)
            return ops.cast(self.basis_b.matvec(rows), dtype)
        if self.basis == "hadamard":
            # A transform cannot compute single rows.
            return super().lookup(ids, dtype, training)
        rows = self.basis_b.take(ids, "float32", axis=0)
        return ops.cast(self._mix(rows, training, wide=False), dtype)

    def _product(self, x, training, wide):
        if keras.backend.standardize_dtype(x.dtype) == "float16":
            # N's first values, lambda times gamma, underflow in float16.
            x = ops.cast(x, "float32")
            return ops.cast(self._product(x, training, wide), "float16")
        if self._materializes(x, training, False):
            return self._materialized(x, training, wide)
        if wide:
            return self.basis_b.matvec(self._mix(x, training, wide))
        return self._mix(self.basis_b.adjoint(x), training, wide)

    def _materializes(self, x, training, into_kernel):
        """Whether to form the delta for these inputs.

        Let `t` be the number of inputs, `b` the multiply-adds of one input's
        product with B, and `m = small * p` those with N. Beyond the base
        product, the forward pass takes these multiply-adds:

            factored                        t (b + m)
            materialized into the kernel    small b
            materialized apart              small b + t large small

        The backward pass takes those below. There the factored form computes
        the gradients of the input and of N. The materialized form computes
        the delta again and the gradients of the delta and of N; apart from
        the kernel, it also computes the gradient of the input.

            factored                        t (b + m) + t m (+ t b if not wide)
            materialized into the kernel    2 small b + t large small
            materialized apart              2 small b + 2 t large small
        """
        if self.compute != "auto":
            return self.compute == "materialized"
        t = 1
        for size in x.shape[:-1]:
            if not isinstance(size, int):
                # An unknown batch size is taken as large in training and as
                # small in inference.
                return bool(training)
            t *= size
        small, large = sorted((self.input_dim, self.output_dim))
        b = self.basis_b.cost
        m = small * self.terms * self.rank
        apart = 0 if into_kernel else t * large * small
        factored = t * (b + m)
        materialized = small * b + apart
        if training:
            factored += t * (b + 2 * m) + (0 if self._wide else t * b)
            materialized += 2 * small * b + t * large * small + apart
        return materialized <= factored

    def _mixing(self):
        """N, float32."""
        of_terms = self._mixing_of

        def backward(arguments, upstream):
            return of_terms.gradients(fence(upstream, *arguments), upstream)

        return with_gradient(of_terms.form, backward, *self._mixing_arguments())

    def _mix(self, x, training, wide):
        """`x N`, or `x N'` if not `wide`.

        The backward pass keeps `x` and not N.
        """
        of_terms = self._mixing_of

        def forward(x, *arguments):
            n = ops.cast(
                of_terms.form(*_in_turn(x, arguments, training)), x.dtype
            )
            return matmul(x, n if wide else ops.transpose(n))

        def backward(arguments, upstream):
            x, *arguments = arguments
            arguments = fence(upstream, *arguments)
            n = ops.cast(of_terms.form(*arguments), x.dtype)
            of_x = matmul(upstream, ops.transpose(n) if wide else n)
            of_n = _outer(x, upstream) if wide else _outer(upstream, x)
            return of_x, *of_terms.gradients(arguments, of_n)

        dim = self.terms * self.rank if wide else of_terms.dim
        return _on_rows(
            lambda x: with_gradient(
                forward, backward, x, *self._mixing_arguments()
            ),
            x,
            dim,
        )

    def _materialized(self, x, training, wide, kernel=None):
        """`x (kernel + delta)`, or `x delta` without a kernel.

        The backward pass keeps `x` and the kernel, and not the delta.
        """
        of_terms, basis_b = self._mixing_of, self.basis_b
        kernels = () if kernel is None else (kernel,)
        of_b = basis_b.operands()

        def split(arguments):
            first, second = len(kernels), len(kernels) + len(of_b)
            return (
                arguments[:first],
                arguments[first:second],
                arguments[second:],
            )

        def form(dtype, kernels, of_b, of_mixing):
            delta = basis_b.matvec(of_terms.form(*of_mixing), of_b)
            delta = delta if wide else ops.transpose(delta)
            return ops.cast(sum(kernels, delta), dtype)

        def forward(x, *arguments):
            kernels, of_b, of_mixing = split(arguments)
            of_mixing = _in_turn(x, of_mixing, training)
            return matmul(x, form(x.dtype, kernels, of_b, of_mixing))

        def backward(arguments, upstream):
            x, *arguments = arguments
            kernels, of_b, of_mixing = split(arguments)
            of_b = bases.fence_operands(upstream, of_b)
            of_mixing = fence(upstream, *of_mixing)
            whole = form(x.dtype, kernels, of_b, of_mixing)
            of_x = matmul(upstream, ops.transpose(whole))
            of_whole = _outer(x, upstream)
            of_n = basis_b.adjoint(
                of_whole if wide else ops.transpose(of_whole), of_b
            )
            return (
                of_x,
                *[of_whole for _ in kernels],
                *[None for _ in of_b],
                *of_terms.gradients(of_mixing, of_n),
            )

        return _on_rows(
            lambda x: with_gradient(
                forward, backward, x, *kernels, *of_b, *self._mixing_arguments()
            ),
            x,
            basis_b.shape[0] if wide else of_terms.dim,
        )

    def _mixing_arguments(self):
        gamma = _as_float32(self.randlora_gamma)
        if self.variant == "averaged":
            total = ops.sum(gamma, axis=0, keepdims=True)
            gamma = ops.broadcast_to(total, gamma.shape)
        return (
            _as_float32(self.randlora_lambda),
            gamma,
            *self.basis_a.operands(),
        )

    def basis_digest(self) -> str:
        return self.basis_a.digest() + self.basis_b.digest()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**versions.read_spelling(config))

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "basis": versions.spelling(self.basis),
            "variant": self.variant,
            "alpha": self.alpha,
            "rescale": self.rescale,
            "compute": self.compute,
            **super().get_config(),
        }


def _in_turn(x, tensors, training):
    """The tensors, unchanged, but in training not available before `x`.

    Without this, XLA would compute the products of these tensors for many
    layers at the start of a step and hold them all in memory. In inference
    that is wanted, because a loop over tokens then computes them once.
    """
    return fence(x, *tensors) if training else tensors


def _outer(x, y):
    """`x' y` of two matrices of rows, float32."""
    return _as_float32(matmul(ops.transpose(x), y))


def _on_rows(function, x, dim):
    """Applies a function of `(rows, _)` to `(rows, dim)` to any batch shape."""
    if len(x.shape) == 2:
        return function(x)
    batch = ops.shape(x)[:-1]
    y = function(reshape(x, (-1, x.shape[-1])))
    return reshape(y, (*batch, dim))


def _as_float32(x):
    return ops.cast(x, "float32")
