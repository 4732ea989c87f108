"""LoRA with a trained factor on each rank."""

from typing import Any

import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt.adapters import lora
from keras_randadapt.sites.site import Site


class GatedLoRA(lora.LoRA):
    """`delta = scaling * A diag(gate) B`, the base of `SoRA` and `AdaLoRA`.

    A site has `rank * (input_dim + output_dim + 1)` weights.

    Args:
        rank: int.
        gate_initializer: The first values of the gate, `(rank,)`.
        **kwargs: See `LoRA`.
    """

    starts_from_kernel = False

    def __init__(
        self, rank: int, *, gate_initializer: Initializer, **kwargs: Any
    ):
        super().__init__(rank, **kwargs)
        self.gate_initializer = arguments.check_initializer(
            gate_initializer, "gate_initializer"
        )

    def build(self, site: Site) -> None:
        super().build(site)
        self.gate = self.add_trainable(
            "gate", (self.rank,), self.gate_initializer
        )

    def _sum_per_example(self, product, dtype, weights):
        gated = weights["lora_b"] * ops.expand_dims(weights["gate"], -1)
        weights = {**weights, "lora_b": gated}
        return super()._sum_per_example(product, dtype, weights)

    def compacted(self) -> tuple[np.ndarray, np.ndarray, float]:
        a = ops.convert_to_numpy(self.lora_a)
        b = ops.convert_to_numpy(self.lora_b)
        gate = ops.convert_to_numpy(self.gate)
        on = np.flatnonzero(gate)
        return a[:, on] * gate[on], b[on], self.scaling

    def _scaled(self, training):
        a, b = super()._scaled(training)
        return a, b * ops.expand_dims(ops.cast(self.gate, "float32"), -1)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "gate_initializer": arguments.serialize_initializer(
                self.gate_initializer
            ),
        }
