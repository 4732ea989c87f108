"""DyLoRA: a LoRA that can be cut to any rank after training."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import lora
from keras_randadapt.ops import counter
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class DyLoRA(lora.LoRA):
    """LoRA that is trained for all ranks up to its own at once.

    Each training step draws a rank `b`, the same for all sites, from
    `min_rank` to `rank`, uniformly by default. It computes with only the first
    `b` columns of `A` and rows of `B`: `delta = scaling * (rank / b) * A[:, :b]
    B[:b]`. Outside training the delta is that of `LoRA` at the full rank. A
    site has
    `rank * (input_dim + output_dim)` trained weights.

    After training, `keras_randadapt.truncate(model, b)` turns the adapter into
    a `LoRA` of any rank `b` in that range, without further training.

    The compiled step counts the draws. A new rank therefore needs no new
    trace, and training that resumes from a checkpoint draws the ranks that
    uninterrupted training would have drawn.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW), as LoRA.

    Args:
        rank: int. The largest rank.
        min_rank: int, at most `rank`. The smallest rank that is drawn.
        probabilities: Optional sequence of numbers, at least 0: how often each
            of the ranks from `min_rank` to `rank` is drawn, in any unit. It is
            the paper's `p_B`. A rank of 0 is never drawn. The default is the
            same for all.
        frozen: bool. Whether a step trains only the `b`-th column and row,
            which is the paper's "frozen" mode.
        alpha: Optional float. `scaling` is `alpha / rank`, so a training step
            scales its product by `alpha / b`.
        scaling: Optional float. See `LoRA`.
        site_alphas: Optional dict. See `LoRA`.
        a_initializer: The first values of `A`. See `LoRA`.
        b_initializer: The first values of `B`. See `LoRA`.
        regularizer: Optional regularizer of `A` and `B`. See `LoRA`.
        seed: int. It also determines the drawn ranks. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If a rank is no integer.
        ValueError: If an argument is out of range. At injection, if `rank`
            exceeds the smaller dimension of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier, kra.DyLoRA(8), ["query", "value"], keep_trainable="logits"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adamw", loss)
    classifier.fit(x, y, verbose=0)
    kra.truncate(classifier, rank=4)
    ```

    References:
        - Valipour et al., "DyLoRA", EACL 2023, algorithm 1. Its index
          `[:, b, :]` of `W_dw` is taken as `[:b, :]`.
    """

    recommended_learning_rate = 5e-4
    starts_from_kernel = False

    def __init__(
        self,
        rank: int = 8,
        *,
        min_rank: int = 1,
        probabilities: Sequence[float] | None = None,
        frozen: bool = False,
        **kwargs: Any,
    ):
        if kwargs.get("site_ranks"):
            raise ValueError(
                "`DyLoRA` draws one rank for all sites and takes no "
                f"`site_ranks`. Received: site_ranks={kwargs['site_ranks']!r}"
            )
        super().__init__(rank, **kwargs)
        self.min_rank = arguments.check_rank(min_rank, "min_rank")
        if self.min_rank > self.rank:
            raise ValueError(
                f"`min_rank` must be at most {self.rank}, the rank. "
                f"Received: min_rank={min_rank}"
            )
        self.frozen = bool(frozen)
        self.probabilities = _check_probabilities(
            probabilities, self.rank - self.min_rank + 1
        )

    def build(self, site: Site) -> None:
        super().build(site)
        self.add_step_counter()

    def drawn_rank(self) -> Tensor:
        """The rank of the training step that is running: an int32 tensor."""
        words = counter.random_words(self.seed, 0, self.training_step(), 1)
        if self.probabilities is not None:
            shares = np.cumsum(self.probabilities) / np.sum(self.probabilities)
            # Integers are compared, so every backend draws the same ranks.
            last = np.floor(shares[:-1] * 2**31).astype("int64") - 1
            last = ops.convert_to_tensor(last.astype("int32"))
            word = ops.bitwise_and(words[0], 2**31 - 1)
            passed = ops.greater(word, last)
            return self.min_rank + ops.sum(ops.cast(passed, "int32"))
        choices = self.rank - self.min_rank + 1
        return self.min_rank + counter.random_below(words, choices)[0]

    def training_delta_kernel(self) -> Tensor:
        return self._sum(ops.matmul, "float32", training=True)

    def truncated(self, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
        if not self.min_rank <= rank <= self.rank:
            raise ValueError(
                f"`rank` must be from {self.min_rank} to {self.rank}, which "
                f"the adapter was trained for. Received: rank={rank}"
            )
        a = ops.convert_to_numpy(self.lora_a)[:, :rank]
        b = ops.convert_to_numpy(self.lora_b)[:rank]
        return a, b, self.scaling * self.rank / rank

    def _scaled(self, training):
        if not training:
            return super()._scaled(training)
        a = ops.cast(self.lora_a, "float32")
        b = ops.cast(self.lora_b, "float32")
        drawn = self.drawn_rank()
        # B's rows beyond the drawn rank are zeroed, so A needs no mask.
        places = ops.arange(self.rank, dtype="int32")
        if self.frozen:
            trained = ops.equal(places, drawn - 1)
            a = ops.where(trained, a, ops.stop_gradient(a))
            b = ops.where(trained[:, None], b, ops.stop_gradient(b))
        scale = self.scaling * self.rank / ops.cast(drawn, "float32")
        kept = ops.cast(places < drawn, "float32")
        return a, b * (kept * scale)[:, None]

    def get_config(self) -> Config:
        config = {
            **super().get_config(),
            "min_rank": self.min_rank,
            "frozen": self.frozen,
        }
        if self.probabilities is not None:
            config["probabilities"] = self.probabilities
        return config


def _check_probabilities(probabilities, count):
    if probabilities is None:
        return None
    values = [
        arguments.check_non_negative(one, "probabilities")
        for one in probabilities
    ]
    if len(values) != count or not any(values):
        raise ValueError(
            f"`probabilities` must hold {count} numbers, one for each rank "
            "from `min_rank` to `rank`, which are not all 0. "
            f"Received: probabilities={probabilities!r}"
        )
    return values
