"""VeRA: vector-based random matrix adaptation."""

import math
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any
from typing import Self

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.bases import versions
from keras_randadapt.bases.slice import Slice
from keras_randadapt.sites import supported
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import of_examples
from keras_randadapt.sites.per_example import rows_of_basis
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class VeRA(base.Adapter):
    """Vector-based random matrix adaptation.

    The delta is `delta(x) = scaling * b * B (d * (A x))`. `A`, `(rank,
    input_dim)`, and `B`, `(output_dim, rank)`, are frozen random matrices that
    a seed determines and no file stores. `d`, `(rank,)`, and `b`,
    `(output_dim,)`, are trained, which makes `rank + output_dim` weights a
    site. `b` starts at zero, so the delta starts at zero.

    All sites of one shape share one pair of matrices. It takes `rank *
    (input_dim + output_dim)` numbers of four bytes, of one byte with a sparse
    basis, and no memory with `basis="hadamard"`. The values at a site then do
    not depend on which other sites are adapted. With `shared=True` all sites
    share slices of one pair of the largest size, as in the paper.

    Train it at a learning rate of 4e-3 to 3e-2 (AdamW), ten times LoRA's, and
    train any head at 1e-4 to 1e-2: see
    `keras_randadapt.optimizers.learning_rate_groups`.

    Args:
        rank: int. It may exceed the dimensions: each rank is one weight.
        basis: The frozen random matrices. `"uniform"` and `"gaussian"` have
            independent entries. `"sparse"` and `"very_sparse"` have ternary
            entries, kept as int8, of which one in 3, or one in
            `sqrt(min(input_dim, output_dim))`, is not zero; few entries are
            changed so that the delta has the full rank, `min(rank, input_dim,
            output_dim)` (see `bases.SparseTernary`). `"hadamard"` means
            randomized Hadamard transforms, which take no memory. With every
            basis, entries have the variance of `kaiming_uniform`: 2 /
            input_dim in `A`, 2 / rank in `B`. `"sparse_v1"` and
            `"very_sparse_v1"` are the sparse bases of earlier versions, which
            may have empty rows and columns.
        shared: bool, or `(input_dim, output_dim)`. Whether all sites share one
            pair, or the size of that pair. With `True`, injection takes the
            largest dimensions of the sites; files and configs hold them. The
            entries' variance is then that of the largest site. A Hadamard
            basis has no values that sites could share.
        d_initial: float. The first value of `d`.
        scaling: float. A constant factor.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range. At injection, if a site is
            larger than `shared`.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.VeRA(rank=256, seed=0),
        targets=["query", "value"],
        keep_trainable=["logits"],
    )
    ```

    References:
        - Kopiczko, Blankevoort and Asano, "VeRA", ICLR 2024, equation 2 and
          section 3.2.
    """

    recommended_learning_rate = 1e-2
    factors_are_cheap = False

    def __init__(
        self,
        rank: int = 256,
        *,
        basis: str = "uniform",
        shared: bool | Sequence[int] = False,
        d_initial: float = 0.1,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.basis = versions.check_version(basis)
        self.d_initial = arguments.check_scaling(d_initial, "d_initial")
        self.scaling = arguments.check_scaling(scaling)
        self.shared = _check_shared(shared, self.basis)

    def resolved(self, layers: Layers, addresses: Collection[str]) -> Self:
        if self.shared is not True:
            return self
        views = [tuple(supported.view_of(layers[a])) for a in addresses]
        sizes = [max(dims) for dims in zip(*views)]
        return type(self).from_config({**self.get_config(), "shared": sizes})

    def build(self, site: Site) -> None:
        self._dims = (self.input_dim, self.output_dim)
        if isinstance(self.shared, tuple):
            if any(d > most for d, most in zip(self._dims, self.shared)):
                raise ValueError(
                    "`shared` must be at least the size of every site. The "
                    f"site '{site.address}' has {self._dims}. Received: "
                    f"shared={self.shared}. Give `True`, or the largest "
                    "dimensions."
                )
            self._dims = self.shared
        self.vera_d = self.add_trainable(
            "vera_d",
            (self.rank,),
            keras.initializers.Constant(self.d_initial),
        )
        self.vera_b = self.add_trainable("vera_b", (self.output_dim,), "zeros")
        self.basis_a = self._add_basis("A", self.input_dim, expand=False)
        self.basis_b = self._add_basis("B", self.output_dim, expand=True)

    def _add_basis(self, side, dim, expand):
        basis = versions.make_version(
            self.basis,
            self._dims[1 if expand else 0],
            self.rank,
            self.seed,
            f"VeRA/{side}",
            expand=expand,
            smaller_dim=min(self._dims),
        )
        basis = self.add_frozen(f"basis_{side.lower()}", basis)
        shape = (dim, self.rank) if expand else (self.rank, dim)
        return basis if shape == basis.shape else Slice(basis, *shape)

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        u = self.basis_a.matvec(x) * self._scaled_d(x.dtype)
        return self.basis_b.matvec(u) * self._scaled_b(x.dtype)

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        return self._expand_per_example(self.basis_a.matvec(x), weights)

    def _expand_per_example(self, u, weights):
        d, b = self._of_examples(weights, u.dtype)
        return self.basis_b.matvec(u * d) * b

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        d, b = self._of_examples(weights, x.dtype)
        return self.basis_a.adjoint(self.basis_b.adjoint(x * b) * d)

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        u = rows_of_basis(self.basis_a, ids, dtype)
        return self._expand_per_example(u, weights)

    def _of_examples(self, weights, dtype):
        return (
            of_examples(weights["vera_d"] * self._scale_d(), dtype),
            of_examples(weights["vera_b"] * self._scale_b(), dtype),
        )

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        v = self.basis_b.adjoint(x * self._scaled_b(x.dtype))
        return self.basis_a.adjoint(v * self._scaled_d(x.dtype))

    def delta_kernel(self) -> Tensor:
        # B transforms the rows of diag(d), then A' the other axis.
        rows = self.basis_b.matvec(ops.diag(self._scaled_d("float32")))
        columns = ops.transpose(rows * self._scaled_b("float32"))
        return ops.transpose(self.basis_a.adjoint(columns))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.rank >= min(self.input_dim, self.output_dim):
            return None
        rows = ops.transpose(self.basis_b.matrix())
        rows = rows * ops.expand_dims(self._scaled_d("float32"), -1)
        left = ops.transpose(self.basis_a.matrix())
        return left, rows * self._scaled_b("float32")

    def vector_form(self) -> tuple[Tensor, keras.Variable, Tensor]:
        """`left`, `alpha` and `right` of `delta = left' diag(alpha) right`.

        `alpha` is `d`.
        """
        right = ops.transpose(self.basis_b.matrix())
        right = right * self._scaled_b("float32")
        return self.basis_a.matrix() * self._scale_d(), self.vera_d, right

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        if self.basis == "hadamard":
            # A transform cannot compute single rows.
            return super().lookup(ids, dtype, training)
        u = self.basis_a.take(ids, dtype, axis=1) * self._scaled_d(dtype)
        return self.basis_b.matvec(u) * self._scaled_b(dtype)

    def basis_digest(self) -> str:
        return self.basis_a.digest() + self.basis_b.digest()

    # The bases have unit variance up to their scale. Kaiming's gain multiplies
    # the vectors, because they are the smallest tensors.

    def _scale_d(self):
        return self.basis_a.scale * math.sqrt(2 / self._dims[0])

    def _scale_b(self):
        return self.basis_b.scale * math.sqrt(2 / self.rank) * self.scaling

    def _scaled_d(self, dtype):
        d = ops.cast(self.vera_d, "float32") * self._scale_d()
        return ops.cast(d, dtype)

    def _scaled_b(self, dtype):
        b = ops.cast(self.vera_b, "float32") * self._scale_b()
        return ops.cast(b, dtype)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**versions.read_spelling(config))

    def get_config(self) -> Config:
        config = {
            "rank": self.rank,
            "basis": versions.spelling(self.basis),
            "d_initial": self.d_initial,
            "scaling": self.scaling,
            **super().get_config(),
        }
        if self.shared:
            sizes = self.shared
            config["shared"] = sizes if sizes is True else list(sizes)
        return config


def _check_shared(shared, basis):
    if isinstance(shared, (list, tuple)):
        if len(shared) != 2:
            raise ValueError(
                "`shared` must be a bool or `(input_dim, output_dim)`. "
                f"Received: shared={shared!r}"
            )
        shared = tuple(arguments.check_rank(one, "shared") for one in shared)
    elif not isinstance(shared, bool):
        raise TypeError(
            "`shared` must be a bool or `(input_dim, output_dim)`. "
            f"Received: shared={shared!r}"
        )
    if shared and basis == "hadamard":
        raise ValueError(
            "`shared` is for bases with values. A Hadamard basis has none and "
            'takes no memory: leave `shared` out, or use `basis="uniform"`. '
            f"Received: shared={shared!r}"
        )
    return shared
