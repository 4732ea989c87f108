"""LoRA: low-rank adaptation."""

from collections.abc import Collection
from typing import Any
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt._types import Layers
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import site_arguments
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import plus_products
from keras_randadapt.ops.fast_products import thin_product
from keras_randadapt.ops.fast_products import thin_products
from keras_randadapt.sites import lanes
from keras_randadapt.sites import supported
from keras_randadapt.sites.per_example import Weights
from keras_randadapt.sites.per_example import taken
from keras_randadapt.sites.site import Site

_FROM_KERNEL = ("pissa", "olora", "olora_v1")

# How configs spell initializations. Files of earlier versions say "olora" and
# mean the decomposition that is "olora_v1" now.
_SPELLINGS = {"olora": "olora_v2", "olora_v1": "olora"}
_READ = {spelling: name for name, spelling in _SPELLINGS.items()}


@keras.saving.register_keras_serializable(package="keras_randadapt")
class LoRA(site_arguments.SiteArguments):
    """Low-rank adaptation: `delta = scaling * A B`.

    `A`, `(input_dim, rank)`, and `B`, `(rank, output_dim)`, are trained, which
    makes `rank * (input_dim + output_dim)` weights a site. `B` starts at zero,
    so the delta starts at zero.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The rank of the delta.
        alpha: Optional float. `scaling` is `alpha / rank`, and `alpha` is
            `rank` by default, as in Keras's own `enable_lora`.
        scaling: Optional float, instead of `alpha`.
        rslora: bool. Whether `scaling` is `alpha / sqrt(rank)`, so that large
            ranks still learn.
        initialization: How `A` and `B` start. With `"default"` the two
            initializers below give their first values. With `"gaussian"` `A`
            is normal with standard deviation `1 / rank`. With `"orthogonal"`
            both are nonzero and `A B = 0` up to rounding; the rank must be
            even. With `"pissa"` `scaling * A B` is the kernel's best
            approximation of that rank, from its singular value
            decomposition. With `"olora"` they come from the QR decomposition
            of the kernel's transpose, the weight in the papers' orientation:
            `B'` is the leading columns of `Q`, which are orthonormal, and `A'`
            the leading rows of `R`. `"olora_v1"` decomposes the kernel itself,
            as earlier versions did. With these, the delta is
            `scaling * (A B - A_0 B_0)`: it is zero at first, and the base
            kernel does not change. `A_0` and `B_0` are computed from the
            kernel whenever the adapter is attached, so an adapter file fits
            only the kernels that it was trained on.
        a_initializer: The first values of `A`: `"kaiming_uniform"` (the
            default, `U(-1/sqrt(input_dim), 1/sqrt(input_dim))`), `"normal"`,
            `{"name": "normal", "stddev": 0.02}`, or a Keras initializer.
        b_initializer: The first values of `B`. Anything but zeros makes the
            adapted model differ from the base model from the start.
        regularizer: Optional Keras regularizer of both factors, such as
            `keras_randadapt.regularizers.Orthogonality(0.1)`. It is part of
            the model's losses, so plain `fit` applies it.
        site_ranks: Optional dict to the ranks of some sites, from what
            `targets` of `inject` takes: the name of a layer, the end of its
            path or a `re.Pattern`, or from the layer itself. A later key wins
            over an earlier one, and `scaling` is the same for all sites.
            `"clip"` lowers the rank at sites whose kernel view has a smaller
            dimension than that, such as a head of three classes.
        site_alphas: Optional dict to the `alpha` of some sites, from the same
            keys as those of `site_ranks`. There `scaling` is this `alpha`
            divided by the site's own rank, or by its root with `rslora`.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range, or if both `alpha` and
            `scaling` are given, or `rslora` without `alpha`. At injection,
            if `rank` exceeds the smaller dimension of a kernel view: such a
            LoRA has more weights than the kernel it adapts.

    Example:

    ```python
    kra.inject(
        model, kra.LoRA(8), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - [Hu et al., 2021](https://arxiv.org/abs/2106.09685), equation 3.
        - Kalajdzievski, "A rank stabilization scaling factor", 2023, for
          `rslora`.
        - Meng et al., "PiSSA", NeurIPS 2024, equations 2 to 4.
        - Büyükakyüz, "OLoRA", 2024, algorithm 1.
    """

    recommended_learning_rate = 5e-4

    #: Whether `A` and `B` may start from the kernel.
    starts_from_kernel = True

    site_arguments = ("site_ranks", "site_alphas")

    def __init__(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        rslora: bool = False,
        initialization: str = "default",
        a_initializer: Initializer = "kaiming_uniform",
        b_initializer: Initializer = "zeros",
        regularizer: keras.regularizers.Regularizer | None = None,
        site_ranks: dict[Any, int] | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        #: Whether the rank is lowered at sites that are too small for it.
        self.clips_ranks = isinstance(site_ranks, str) and site_ranks == "clip"
        if self.clips_ranks:
            site_ranks = {}
        self.site_ranks = site_arguments.check(
            site_ranks, "site_ranks", arguments.check_rank, '"clip", '
        )
        self.rslora = bool(rslora)
        # Alone, the `alpha` of some sites leaves the others at a scaling of 1.
        uniform = self.rslora and not (alpha is None and self.site_alphas)
        self.scaling = arguments.check_alpha(alpha, scaling, self.rank, uniform)
        self.initialization = self._check_initialization(initialization)
        self.a_initializer = arguments.check_initializer(
            a_initializer, "a_initializer"
        )
        self.b_initializer = arguments.check_initializer(
            b_initializer, "b_initializer"
        )
        self.regularizer = arguments.check_regularizer(regularizer)

    def _check_initialization(self, initialization):
        choices = ("default", "gaussian", "orthogonal", *_FROM_KERNEL)
        if not self.starts_from_kernel:
            choices = ("default",)
        arguments.check_choice(initialization, choices, "initialization")
        ranks = [self.rank, *self.site_ranks.values()]
        odd = [rank for rank in ranks if rank % 2]
        if initialization == "orthogonal" and odd:
            raise ValueError(
                '`initialization="orthogonal"` needs even ranks. '
                f"Received: {odd[0]}"
            )
        # The update is the difference to factors of the base kernel.
        self.depends_on_base = initialization in _FROM_KERNEL
        factors = [self.scaling, *self.site_alphas.values()]
        if initialization in _FROM_KERNEL and 0 in factors:
            raise ValueError(
                f"`initialization={initialization!r}` divides by the scaling, "
                "which must not be 0."
            )
        return initialization

    def for_site(self, site: Site, name: str) -> Self:
        # The scaling is one of all sites, and a site's own `alpha` is divided
        # by its own rank.
        clone = super().for_site(site, name)
        clone.rank = self.site_ranks.get(site.address, self.rank)
        if site.address in self.site_alphas:
            clone.set_alpha(self.site_alphas[site.address])
        return clone

    def set_alpha(self, alpha: float) -> None:
        self.scaling = arguments.check_alpha(
            alpha, None, self.rank, self.rslora
        )

    def resolved(self, layers: Layers, addresses: Collection[str]) -> Self:
        found = super().resolved(layers, addresses)
        if not self.clips_ranks:
            return found
        ranks = {
            address: min(supported.view_of(layers[address]))
            for address in addresses
        }
        return found._with(
            {"site_ranks": {a: r for a, r in ranks.items() if r < self.rank}}
        )

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)

    def build(self, site: Site) -> None:
        self.check(site)
        self.lora_a = self.add_trainable(
            "lora_a",
            (self.input_dim, self.rank),
            self._initializer_of_a(),
            self.regularizer,
        )
        self.lora_b = self.add_trainable(
            "lora_b",
            (self.rank, self.output_dim),
            self.b_initializer,
            self.regularizer,
        )
        if self.initialization == "orthogonal":
            if site.stack is None:
                self._start_orthogonal("")
            else:
                experts = [f"/{e}" for e in range(site.stack)]
                lanes.assign_each(self, LoRA._start_orthogonal, experts)
        if self.initialization in _FROM_KERNEL:
            self.start_a = self.add_derived(
                "start_a", (self.input_dim, self.rank)
            )
            self.start_b = self.add_derived(
                "start_b", (self.rank, self.output_dim)
            )

    def _initializer_of_a(self):
        if self.initialization == "gaussian":
            return {"name": "normal", "stddev": 1 / self.rank}
        return self.a_initializer

    def _start_orthogonal(self, expert):
        """`A = R_1 Q_1 / 10` and `B = Q_2' R_2 / 10`, with `Q_1 Q_2' = 0`."""

        def normals(role, *shape):
            role = f"initial/orthogonal/{self.site.address}/{role}{expert}"
            return random.normals(self.seed, role, shape).astype("float64")

        q, _ = np.linalg.qr(normals("Q", self.rank, self.rank))
        half = self.rank // 2
        a = normals("A", self.input_dim, half) @ q[0::2]
        b = q[1::2].T @ normals("B", half, self.output_dim)
        self.lora_a.assign(a / 10)
        self.lora_b.assign(b / 10)

    def start_from(self, kernel: np.ndarray) -> None:
        if self.initialization not in _FROM_KERNEL:
            return
        kernel = kernel.astype("float64") / self.scaling
        rank = self.rank
        if self.initialization == "pissa":
            u, s, v = np.linalg.svd(kernel, full_matrices=False)
            root = np.sqrt(s[:rank])
            a, b = u[:, :rank] * root, root[:, None] * v[:rank]
        elif self.initialization == "olora":
            q, r = np.linalg.qr(kernel.T)
            a, b = r[:rank].T, q[:, :rank].T
        else:
            q, r = np.linalg.qr(kernel)
            a, b = q[:, :rank], r[:rank]
        for variable in (self.lora_a, self.start_a):
            variable.assign(a.astype("float32"))
        for variable in (self.lora_b, self.start_b):
            variable.assign(b.astype("float32"))

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self._sum(
            lambda a, b: matmul(thin_product(x, a, training), b),
            x.dtype,
            training,
        )

    def delta_of_stack(
        self,
        x: Tensor,
        training: bool | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        # `A` and `B` have the axis of experts in front.
        pairs = self._pairs(x.dtype, training)
        if onto is not None and len(pairs) == 1:
            ((a, b),) = pairs
            return plus_products(onto, thin_products(x, a, training), b)
        delta = self._sum(
            lambda a, b: matmul(thin_products(x, a, training), b),
            x.dtype,
            training,
        )
        return delta if onto is None else onto + ops.cast(delta, onto.dtype)

    def delta_per_example(self, x: Tensor, weights: Weights) -> Tensor:
        def product(a, b):
            return ops.matmul(ops.matmul(x, a), b)

        return self._sum_per_example(product, x.dtype, weights)

    def delta_transpose_per_example(
        self, x: Tensor, weights: Weights
    ) -> Tensor:
        def product(a, b):
            y = ops.matmul(x, ops.swapaxes(b, -1, -2))
            return ops.matmul(y, ops.swapaxes(a, -1, -2))

        return self._sum_per_example(product, x.dtype, weights)

    def lookup_per_example(
        self, ids: Tensor, dtype: str, weights: Weights
    ) -> Tensor:
        def product(a, b):
            shared = len(a.shape) == 2
            rows = ops.take(a, ids, axis=0) if shared else taken(a, ids)
            return ops.matmul(rows, b)

        return self._sum_per_example(product, dtype, weights)

    def _sum_per_example(self, product, dtype, weights):
        a, b = weights["lora_a"], weights["lora_b"] * self.scaling
        y = product(ops.cast(a, dtype), ops.cast(b, dtype))
        if self.initialization in _FROM_KERNEL:
            b = ops.cast(self.start_b * self.scaling, dtype)
            y = y - product(ops.cast(self.start_a, dtype), b)
        return y

    def delta_transpose(
        self, x: Tensor, training: bool | None = None
    ) -> Tensor:
        def product(a, b):
            y = matmul(x, ops.transpose(b))
            return matmul(y, ops.transpose(a))

        return self._sum(product, x.dtype, training)

    def lookup(
        self, ids: Tensor, dtype: str, training: bool | None = None
    ) -> Tensor:
        def product(a, b):
            return matmul(ops.cast(ops.take(a, ids, axis=0), dtype), b)

        return self._sum(product, dtype, training)

    def delta_kernel(self) -> Tensor:
        return self._sum(ops.matmul, "float32")

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = self._pairs("float32")
        if len(pairs) == 1:
            return pairs[0]
        # `A B - A_0 B_0` is as large as the kernel twice, less itself. The
        # same sum is written in the changes of `A` and `B`, which are small.
        (a, b), (start_a, _) = pairs
        change_b = ops.cast(self.lora_b, "float32") - self.start_b
        return (
            ops.concatenate([a - start_a, start_a], axis=1),
            ops.concatenate([b, change_b * self.scaling], axis=0),
        )

    def _sum(self, product, dtype, training=None):
        """A product with `A` and `B`, less that with `A_0` and `B_0`, if any.

        The two products are computed apart, and not as one pair of twice the
        rank: at first they are equal to the last bit, so the sum is exactly 0.
        """
        first, *others = self._pairs(dtype, training)
        y = product(*first)
        for pair in others:
            y = y - product(*pair)
        return y

    def _pairs(self, dtype, training=None):
        a, b = self._scaled(training)
        pairs = [(ops.cast(a, dtype), ops.cast(b, dtype))]
        if self.initialization in _FROM_KERNEL:
            b = ops.cast(self.start_b, "float32") * self.scaling
            pairs.append((ops.cast(self.start_a, dtype), ops.cast(b, dtype)))
        return pairs

    def _scaled(self, training):
        """`A`, unchanged, and the scaled `B`, float32."""
        # B is scaled instead of the output, because B is smaller.
        b = ops.cast(self.lora_b, "float32")
        return self.lora_a, b if self.scaling == 1 else b * self.scaling

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        if "initialization" in config:
            name = config["initialization"]
            # Damaged files hold what is no name.
            if isinstance(name, str):
                config["initialization"] = _READ.get(name, name)
        return cls(**config)

    def get_config(self) -> Config:
        config = {
            "rank": self.rank,
            "scaling": self.scaling,
            "a_initializer": arguments.serialize_initializer(
                self.a_initializer
            ),
            "b_initializer": arguments.serialize_initializer(
                self.b_initializer
            ),
            **super().get_config(),
        }
        if self.initialization != "default":
            config["initialization"] = _SPELLINGS.get(
                self.initialization, self.initialization
            )
        if self.clips_ranks:
            config["site_ranks"] = "clip"
        if self.site_alphas and self.rslora:
            config["rslora"] = True
        if self.regularizer is not None:
            config["regularizer"] = keras.regularizers.serialize(
                self.regularizer
            )
        return config
