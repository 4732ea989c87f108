"""Hydra: a branch beside the layer and one behind it."""

from typing import Any

import keras
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import thin_product
from keras_randadapt.sites.product import Product
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class Hydra(base.Adapter):
    """Multi-head low-rank adaptation: LoRA in parallel and in sequence.

    The output is `y = W x + b + scaling * (B A x + D C (W x + b))`. `A` and
    `B` are LoRA's and work beside the layer; `C`, `(output_dim,
    sequential_rank)`, and `D`, `(sequential_rank, output_dim)`, work behind
    it. A site has `rank * (input_dim + output_dim) + 2 * sequential_rank *
    output_dim` trained weights. `B` and `D` start at zero, so the update
    starts at zero.

    A merge adds `scaling * (A B + W C D)`, in the orientation of the kernel
    view, to the kernel, and `scaling * b C D` to the bias. The update depends
    on the base kernel and is added to those of other active adapters. In a
    grouped convolution, or an einsum that is not one matrix product, `W` is
    the kernel view, so `D` mixes kernels and not outputs.

    The paper adapts the second dense layer of each feed-forward network. Train
    it at a learning rate of 4e-4 to 8e-4 (AdamW).

    Args:
        rank: int. The rank of the parallel branch.
        sequential_rank: Optional int. The rank of the sequential branch. The
            default is `rank`; with 0 there is no such branch and the method
            is LoRA.
        scaling: float. A constant factor of both branches.
        seed: int. See `Adapter`.
        dropout: float. The fraction of a branch's inputs that it does not see
            in training. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If a rank is no integer.
        ValueError: If an argument is out of range. At injection, if a site is
            an embedding, if a rank exceeds a site's dimensions, or if the
            size of a bias is not the layer's number of outputs.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.Hydra(4, sequential_rank=8),
        targets=["query", "value"],
        keep_trainable="logits",
    )
    ```

    References:
        - Kim et al., "Hydra", Neural Networks 178, 2024, equation 8.
    """

    recommended_learning_rate = 5e-4
    additive = False
    depends_on_base = True
    site_kinds = ("product", "convolution")
    adapts_bias = True

    def __init__(
        self,
        rank: int = 8,
        *,
        sequential_rank: int | None = None,
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        if sequential_rank is None:
            sequential_rank = self.rank
        self.sequential_rank = arguments.check_rank(
            sequential_rank, "sequential_rank", least=0
        )
        self.scaling = arguments.check_scaling(scaling)

    def check(self, site: Site) -> None:
        arguments.check_rank_fits(self.rank, site.kernel_view)
        if self.sequential_rank > site.output_dim:
            raise ValueError(
                f"`sequential_rank` must be at most {site.output_dim}, the "
                "number of outputs. Received: "
                f"sequential_rank={self.sequential_rank}"
            )

    def build(self, site: Site) -> None:
        self.check(site)
        self.check_bias_of_outputs(site)
        self.lora_a = self.add_trainable(
            "lora_a", (self.input_dim, self.rank), "kaiming_uniform"
        )
        self.lora_b = self.add_trainable(
            "lora_b", (self.rank, self.output_dim), "zeros"
        )
        if self.sequential_rank:
            self.hydra_c = self.add_trainable(
                "hydra_c",
                (self.output_dim, self.sequential_rank),
                "kaiming_uniform",
            )
            self.hydra_d = self.add_trainable(
                "hydra_d", (self.sequential_rank, self.output_dim), "zeros"
            )

    def adapt(
        self, x: Tensor, linear: Product, training: bool | None = None
    ) -> Tensor:
        y = linear(x)
        parallel = self._thin(
            self.drop(x, training), self.lora_a, self.lora_b, training
        )
        if not self.sequential_rank:
            return y + parallel
        base_y = y if linear.base is linear else linear.base(x)
        sequential = self._thin(
            self.drop(base_y, training), self.hydra_c, self.hydra_d, training
        )
        return y + parallel + sequential

    def merged(
        self, kernel: Tensor, base: Tensor, training: bool = False
    ) -> Tensor:
        del training  # The update is the same in training.
        parallel = matmul(
            ops.cast(self.lora_a, "float32"), self._scaled(self.lora_b)
        )
        kernel = kernel + parallel
        if not self.sequential_rank:
            return kernel
        return kernel + self._thin(base, self.hydra_c, self.hydra_d)

    def merged_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        if not self.sequential_rank:
            return bias
        row = ops.expand_dims(base, 0)
        return bias + self._thin(row, self.hydra_c, self.hydra_d)[0]

    def _thin(self, x, first, second, training=None):
        first = ops.cast(first, x.dtype)
        second = ops.cast(self._scaled(second), x.dtype)
        return matmul(thin_product(x, first, training), second)

    def _scaled(self, variable):
        return ops.cast(variable, "float32") * self.scaling

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "sequential_rank": self.sequential_rank,
            "scaling": self.scaling,
            **super().get_config(),
        }
