"""SoRA: LoRA that learns which of its ranks it needs."""

import re

import keras

from keras_randadapt import arguments
from keras_randadapt.adapters import gated
from keras_randadapt.optimizers import proximal_l1
from keras_randadapt.optimizers import wrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class SoRA(gated.GatedLoRA):
    """Sparse low-rank adaptation: a gate on each rank of LoRA.

    `delta = scaling * A diag(g) B`, with LoRA's `A` and `B` and a trained gate
    `g`, `(rank,)`: `rank * (input_dim + output_dim + 1)` weights a site. Each
    update of the gate is followed by the proximal step of an L1 penalty, which
    closes gates, `g_i = 0`, whose rank does not earn its keep. A gate that is
    closed may open again. After training, `keras_randadapt.compact(model)`
    drops what is closed for good.

    Plain `compile` and `fit` do the proximal steps: the optimizer of a
    compiled model is put inside a `ProximalL1` for as long as the adapter is
    active. (In a custom loop without `compile`, wrap the optimizer by hand. A
    `ProximalL1` of your own replaces the automatic one.)

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW), as LoRA.

    Args:
        rank: int. The largest rank of the delta.
        sparsity: float, at least 0. The strength of the penalty: each step
            moves gates towards 0 by the learning rate times this. With Adam,
            whose own steps are about the learning rate, values below 1 let
            a gate with a steady gradient grow; above 1 all gates close.
        alpha: Optional float. See `LoRA`.
        scaling: Optional float. See `LoRA`.
        gate_initializer: The first values of the gates: normal, as in the
            reference code, by default. See `LoRA` for the forms it may have.
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
          to 8. The threshold is the learning rate times `sparsity`, and soft
          as in the paper; the reference code closes all gates up to twice
          its threshold.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        sparsity: float = 0.5,
        gate_initializer="normal",
        **kwargs,
    ):
        super().__init__(rank, gate_initializer=gate_initializer, **kwargs)
        self.sparsity = arguments.check_non_negative(sparsity, "sparsity")

    def wrap_optimizer(self, optimizer, name):
        if wrapper.chosen_by_user(optimizer, proximal_l1.ProximalL1):
            return optimizer
        # Without `sparsity` too: it also keeps weight decay off the gates.
        return proximal_l1.ProximalL1(
            optimizer,
            self.sparsity,
            paths=f"(^|/)adapter/{re.escape(name)}/(.*/)?gate$",
        )

    def get_config(self):
        return {**super().get_config(), "sparsity": self.sparsity}
