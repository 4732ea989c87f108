"""AdaLoRA: a budget of ranks, given to the sites that use them."""

import re
from typing import Any

import keras

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt.adapters import gated
from keras_randadapt.optimizers import rank_allocation
from keras_randadapt.optimizers import wrapper
from keras_randadapt.regularizers import Orthogonality


@keras.saving.register_keras_serializable(package="keras_randadapt")
class AdaLoRA(gated.GatedLoRA):
    """Adaptive budget allocation: LoRA that moves ranks between sites.

    The delta `scaling * A diag(l) B` is like a singular value decomposition:
    a penalty, `orthogonality * (||A' A - I||_F^2 + ||B B' - I||_F^2)`, keeps
    `A`'s columns and `B`'s rows nearly orthonormal. Each rank is scored by
    how much the loss depends on its weights. The ranks with the lowest scores
    in the whole model are pruned, which sets their `l_i` to zero, until a
    budget is met. `l` starts at zero, so the delta starts at zero. A site has
    `rank * (input_dim + output_dim + 1)` weights.

    The callback `keras_randadapt.callbacks.RankBudget` sets the budget;
    without it no rank is pruned. Nothing else has to be called: the penalty
    is among the model's losses, and while the adapter is active, a
    `RankAllocation` wraps the optimizer of a compiled model, scores ranks and
    prunes them. After training, `keras_randadapt.compact(model)` drops the
    pruned ranks.

    Train it at a learning rate of 5e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The rank of every site at first. In the paper it is 1.5
            times the average rank at the end.
        orthogonality: float, at least 0. The strength of the penalty.
        score: `"sensitivity"`, by how much the loss depends on the weights of
            a rank, or `"magnitude"`, `|l_i|`, with which the paper compares
            it. See `optimizers.RankAllocation`.
        alpha: Optional float. See `LoRA`. Pruning ranks does not change
            `scaling`.
        scaling: Optional float. See `LoRA`.
        site_alphas: Optional dict. See `LoRA`.
        a_initializer: The first values of `A`, normal with standard deviation
            0.02 by default. See `LoRA` for the forms it may have.
        b_initializer: The first values of `B`, with the same default.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer, or a `regularizer` is given.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds the smaller dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.AdaLoRA(12), ["query", "value"], keep_trainable="logits"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adamw", loss)
    classifier.fit(
        x, y, callbacks=[kra.callbacks.RankBudget(8, interval=1)], verbose=0
    )
    kra.compact(classifier)
    ```

    References:
        - Zhang et al., "AdaLoRA", ICLR 2023, equations 3 and 4 and sections
          3.2 and 3.3. The penalty is the paper's, squared and summed; the
          reference code averages norms that are not squared.
    """

    recommended_learning_rate = 1e-3

    def __init__(
        self,
        rank: int = 12,
        *,
        orthogonality: float = 0.1,
        score: str = "sensitivity",
        a_initializer: Initializer = {"name": "normal", "stddev": 0.02},
        b_initializer: Initializer = {"name": "normal", "stddev": 0.02},
        **kwargs: Any,
    ):
        if "regularizer" in kwargs:
            raise TypeError(
                "`AdaLoRA` has a regularizer of its own, set by "
                "`orthogonality`; use `LoRA` for another one. "
                f"Received: regularizer={kwargs['regularizer']!r}"
            )
        penalty = Orthogonality(
            arguments.check_non_negative(orthogonality, "orthogonality")
        )
        kwargs.setdefault("gate_initializer", "zeros")
        super().__init__(
            rank,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            regularizer=penalty if penalty.strength else None,
            **kwargs,
        )
        self.orthogonality = penalty.strength
        self.score = arguments.check_choice(
            score, rank_allocation.SCORES, "score"
        )

    def wrap_optimizer(
        self, optimizer: keras.optimizers.Optimizer, name: str
    ) -> keras.optimizers.Optimizer:
        if wrapper.chosen_by_user(optimizer, rank_allocation.RankAllocation):
            return optimizer
        return rank_allocation.RankAllocation(
            optimizer,
            paths=f"(^|/)adapter/{re.escape(name)}/",
            score=self.score,
        )

    def get_config(self) -> Config:
        config = super().get_config()
        config.pop("regularizer", None)
        config["orthogonality"] = self.orthogonality
        if self.score != "sensitivity":
            config["score"] = self.score
        return config
