"""RM-LoRA: a LoRA with orthogonal factors and randomly masked gradients."""

import hashlib
import math
import re
from typing import Any

import keras

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt.adapters import lora
from keras_randadapt.optimizers import masked_gradient
from keras_randadapt.optimizers import wrapper
from keras_randadapt.regularizers import Orthogonality


@keras.saving.register_keras_serializable(package="keras_randadapt")
class RMLoRA(lora.LoRA):
    """LoRA whose factors are kept orthogonal and trained in random parts.

    The delta is `scaling * A B` as in `LoRA`. Training differs in two ways.
    The loss gets the penalty `orthogonality * (||A' A - I||_F^2 +
    ||B B' - I||_F^2)` for each pair. Each step trains only `update_rank`
    random directions of each pair, which are the same columns of `A` and rows
    of `B`; every step draws new ones. Both keep the update from collapsing to
    fewer directions than its rank. The paper reports that this raises the test
    accuracy; this library's own experiment refutes it (docs/evidence.md).

    `compile` and `fit` do both: the penalty is among the model's losses, and
    while the adapter is active, a `MaskedGradient` wraps the optimizer of a
    compiled model. (In a custom loop without `compile`, wrap the optimizer by
    hand. A `MaskedGradient` of your own, also one given to `compile`,
    replaces the automatic one.)

    Two settings are the paper's ablations: `update_rank=rank` has only the
    regularizer (R-LoRA), and `orthogonality=0` only the masks (GM-LoRA).

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW), as LoRA. Masked
    directions get no gradient, but momentum and weight decay move them; with
    `mask_updates=True` they do not change.

    Args:
        rank: int. The rank of the delta.
        orthogonality: float, at least 0. The strength of the penalty. The
            paper does not state it; AdaLoRA searches 0.1 to 0.5 for the same
            term.
        update_rank: Optional int, at most `rank`. The number of directions
            that a step trains. The default is half, `max(1, rank // 2)`.
        mask_updates: bool. See `MaskedGradient`.
        alpha: Optional float. See `LoRA`.
        scaling: Optional float. See `LoRA`. 1 by default, as in the paper.
        site_alphas: Optional dict. See `LoRA`.
        a_initializer: The first values of `A`: by default normal with
            standard deviation `1 / sqrt(input_dim)`. Its columns then have
            unit length on average and are nearly orthogonal, so that the
            penalty starts at about `orthogonality * rank**2 / input_dim`.
            With the paper's unscaled Gaussian it would be `input_dim**2`
            times larger, and training would diverge.
        b_initializer: The first values of `B`. See `LoRA`.
        seed: int. It also determines the masks. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If a rank is no integer, or a `regularizer` is given.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds the smaller dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.RMLoRA(8), ["query", "value"], keep_trainable="logits"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adamw", loss)
    classifier.fit(x, y, verbose=0)
    ```

    References:
        - RM-LoRA ([arXiv 2407.12074](https://arxiv.org/abs/2407.12074)),
          algorithm 1, with three corrections: masks cover whole rows and
          columns, one minibatch serves all pairs of a step, and any optimizer
          can be used.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        orthogonality: float = 0.1,
        update_rank: int | None = None,
        mask_updates: bool = False,
        a_initializer: Initializer | None = None,
        **kwargs: Any,
    ):
        if "regularizer" in kwargs:
            raise TypeError(
                "`RMLoRA` has a regularizer of its own, set by "
                "`orthogonality`; use `LoRA` for another one. "
                f"Received: regularizer={kwargs['regularizer']!r}"
            )
        penalty = Orthogonality(
            arguments.check_non_negative(orthogonality, "orthogonality")
        )
        super().__init__(
            rank,
            a_initializer="normal" if a_initializer is None else a_initializer,
            regularizer=penalty if penalty.strength else None,
            **kwargs,
        )
        if a_initializer is None:
            # The default's scale depends on the site: see `_initializer_of_a`.
            self.a_initializer = None
        self.orthogonality = penalty.strength
        if update_rank is None:
            update_rank = max(1, self.rank // 2)
        self.update_rank = arguments.check_rank(update_rank, "update_rank")
        smallest = min([self.rank, *self.site_ranks.values()])
        if self.update_rank > smallest:
            raise ValueError(
                f"`update_rank` must be at most {smallest}, the smallest rank "
                "of a site. If it is equal to the rank, nothing is masked. "
                f"Received: update_rank={self.update_rank}"
            )
        self.mask_updates = bool(mask_updates)

    def wrap_optimizer(
        self, optimizer: keras.optimizers.Optimizer, name: str
    ) -> keras.optimizers.Optimizer:
        largest = max([self.rank, *self.site_ranks.values()])
        if self.update_rank == largest or wrapper.chosen_by_user(
            optimizer, masked_gradient.MaskedGradient
        ):
            return optimizer
        # The name is hashed too, so two adapters of one seed draw different
        # masks.
        digest = hashlib.sha256(f"masks\n{self.seed}\n{name}".encode()).digest()
        return masked_gradient.MaskedGradient(
            optimizer,
            self.update_rank,
            seed=int.from_bytes(digest[:8], "little"),
            mask_updates=self.mask_updates,
            paths=f"(^|/)adapter/{re.escape(name)}/",
        )

    def _initializer_of_a(self):
        if self.a_initializer is not None or self.initialization != "default":
            return super()._initializer_of_a()
        return {"name": "normal", "stddev": 1 / math.sqrt(self.input_dim)}

    def get_config(self) -> Config:
        config = super().get_config()
        config.pop("regularizer", None)
        return {
            "rank": config.pop("rank"),
            "orthogonality": self.orthogonality,
            "update_rank": self.update_rank,
            "mask_updates": self.mask_updates,
            **config,
        }
