"""SoRA: a LoRA that learns which of its ranks it needs."""

import re
from typing import Any

import keras

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt.adapters import gated
from keras_randadapt.optimizers import proximal_l1
from keras_randadapt.optimizers import wrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class SoRA(gated.GatedLoRA):
    """Sparse low-rank adaptation: a gate on each rank of LoRA.

    The delta is `scaling * A diag(g) B`, with LoRA's `A` and `B` and a trained
    gate `g`, `(rank,)`. A site has `rank * (input_dim + output_dim + 1)`
    weights. After each update of the gate comes the proximal step of an L1
    penalty. It closes the gates, `g_i = 0`, of ranks that lower the loss too
    little. A closed gate may open again. After training,
    `keras_randadapt.compact(model)` drops the ranks whose gates are closed.

    `compile` and `fit` do the proximal steps: while the adapter is active, a
    `ProximalL1` wraps the optimizer of a compiled model. (In a custom loop
    without `compile`, wrap the optimizer by hand. A `ProximalL1` of your own
    replaces the automatic one.)

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW), as LoRA.

    Args:
        rank: int. The largest rank of the delta.
        sparsity: float, at least 0. The strength of the penalty: each step
            moves gates towards 0 by the learning rate times `sparsity`.
            Adam's own steps are about as large as the learning rate, so below
            1 a gate with a steady gradient can grow, and above 1 all gates
            close.
        alpha: Optional float. See `LoRA`.
        scaling: Optional float. See `LoRA`.
        site_alphas: Optional dict. See `LoRA`.
        gate_initializer: The first values of the gates. The default is
            normal, as in the reference code. See `LoRA` for other forms.
        a_initializer: The first values of `A`. See `LoRA`.
        b_initializer: The first values of `B`. See `LoRA`.
        regularizer: Optional regularizer of `A` and `B`. See `LoRA`.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds the smaller dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.SoRA(8), ["query", "value"], keep_trainable="logits"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adamw", loss)
    classifier.fit(x, y, verbose=0)
    kra.compact(classifier)
    ```

    References:
        - Ding et al., "Sparse low-rank adaptation", EMNLP 2023, equations 5
          to 8. The threshold is soft, as in the paper, and is the learning
          rate times `sparsity`; the reference code closes all gates up to
          twice its threshold.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        sparsity: float = 0.5,
        gate_initializer: Initializer = "normal",
        **kwargs: Any,
    ):
        super().__init__(rank, gate_initializer=gate_initializer, **kwargs)
        self.sparsity = arguments.check_non_negative(sparsity, "sparsity")

    def wrap_optimizer(
        self, optimizer: keras.optimizers.Optimizer, name: str
    ) -> keras.optimizers.Optimizer:
        if wrapper.chosen_by_user(optimizer, proximal_l1.ProximalL1):
            return optimizer
        # The wrapper is used even if `sparsity` is 0, because it also keeps
        # weight decay off the gates.
        return proximal_l1.ProximalL1(
            optimizer,
            self.sparsity,
            paths=f"(^|/)adapter/{re.escape(name)}/(.*/)?gate$",
        )

    def get_config(self) -> Config:
        return {**super().get_config(), "sparsity": self.sparsity}
