"""Masked gradients: each step trains a random part of each rank."""

import re

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.ops import counter
from keras_randadapt.optimizers import wrapper


@keras.saving.register_keras_serializable(package="keras_randadapt")
class MaskedGradient(wrapper.OptimizerWrapper):
    """Lets each step train `update_rank` random directions of low-rank pairs.

    A pair consists of `A`, `(input_dim, rank)`, and `B`, `(rank, output_dim)`,
    the `lora_a` and `lora_b` of a `LoRA`. For each pair, each step draws
    `update_rank` of the `rank` directions, the same ones for the columns of
    `A` and the rows of `B`. The gradients of all other directions become zero,
    including those of regularizers. (In the paper, whose matrices are
    transposed, these are rows of `A` and columns of `B`.) All other variables
    are trained as usual.

    The draw is a function of the seed, of the place of the pair among the
    model's pairs and of the number of updates so far. It is the same on every
    backend, and training that resumes from a checkpoint makes the draws of
    uninterrupted training. See `keras_randadapt.ops.counter`.

    With SGD without momentum, masked directions do not change, bit for bit.
    Momentum, adaptive rates and weight decay still move them, unless
    `mask_updates` is true.

    `RMLoRA` puts this wrapper around the optimizer of a compiled model. In a
    custom loop without `compile`, wrap the optimizer by hand.

    Args:
        optimizer: The optimizer to wrap: any Keras optimizer, including the
            result of `learning_rate_groups`, or a name. Loss scaling belongs
            around the wrapper, where `compile` puts it.
        update_rank: int. The number of directions of each pair that a step
            trains. A pair of that rank is not masked.
        seed: int in `[0, 2**64)`.
        mask_updates: bool. Whether masked directions also keep their values,
            with any optimizer. The optimizer's state still changes, so
            momentum is not lost but applied in later steps. It needs an
            optimizer without `use_ema`.
        paths: Optional string, a regular expression such as `"adapter/fr/"`.
            Only pairs whose paths match are masked.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer or `update_rank` no
            integer.
        ValueError: If an argument is out of range or `optimizer` is a
            `LossScaleOptimizer`. At the first step, if there is no pair, half
            a pair, or a pair of a rank below `update_rank`, if inner
            optimizers disagree on gradient accumulation, or if `mask_updates`
            is combined with `use_ema`.

    Example:

    ```python
    model.compile(
        kra.optimizers.MaskedGradient("adamw", update_rank=1, seed=0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, verbose=0)
    ```

    References:
        - RM-LoRA ([arXiv 2407.12074](https://arxiv.org/abs/2407.12074)),
          algorithm 1, lines 5 to 12. As there and in section 4.3, masks are
          drawn every step.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        update_rank: int,
        seed: int = 0,
        mask_updates: bool = False,
        paths: str | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.update_rank = arguments.check_rank(update_rank, "update_rank")
        self.seed = random.check_seed(seed)
        self.mask_updates = bool(mask_updates)
        self.changes_values = self.mask_updates
        self.paths = None if paths is None else wrapper.check_paths(paths)

    def build_state(self, variables: list[keras.Variable]) -> None:
        pairs = self._find_pairs(variables)
        # For each variable, by its number: the pair that it belongs to and the
        # axis of the rank. Variables can therefore come in any order.
        self._places = {}
        # The pairs of each rank, since one draw serves all pairs of a rank.
        self._pairs: dict[int, list[int]] = {}
        for i, (a, b) in enumerate(pairs):
            # Experts have an axis in front, and share the mask of their site.
            rank = int(variables[b].shape[-2])
            if self.update_rank > rank:
                raise ValueError(
                    f"`update_rank` must be at most {rank}, the rank of "
                    f"'{variables[a].path}'. "
                    f"Received: update_rank={self.update_rank}"
                )
            if self.update_rank < rank:
                self._pairs.setdefault(rank, []).append(i)
                self._places[a] = (i, -1)
                self._places[b] = (i, 0)

    def _find_pairs(self, variables):
        """`(place of A, place of B)` of each pair, in the variables' order."""
        sides = {"lora_a": {}, "lora_b": {}}
        for i, variable in enumerate(variables):
            owner, _, name = variable.path.rpartition("/")
            if name in sides and re.search(self.paths or "", variable.path):
                sides[name][owner] = i
        a, b = sides["lora_a"], sides["lora_b"]
        restriction = f" that match `paths`={self.paths!r}" * bool(self.paths)
        if not a and not b:
            raise ValueError(
                "`MaskedGradient` found no pair of `lora_a` and `lora_b` "
                f"among the {len(variables)} trained variables"
                f"{restriction}. Inject an adapter such as `LoRA` before "
                "training, or use the inner optimizer alone."
            )
        for owner in {**a, **b}:
            if owner not in a or owner not in b:
                raise ValueError(
                    f"Only one of '{owner}/lora_a' and '{owner}/lora_b' is "
                    f"among the trained variables{restriction}: a pair is "
                    "masked together. Leave it out with `paths`."
                )
        return [(i, b[owner]) for owner, i in a.items()]

    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        masks = self._masks(step)
        masked = []
        for gradient, variable in zip(gradients, variables, strict=True):
            place = self._places.get(_compat.variable_index(self, variable))
            if place is not None and gradient is not None:
                gradient = ops.convert_to_tensor(gradient)
                # `where` is used, since a product with 0 would keep NaN.
                gradient = ops.where(
                    self._mask(masks, place), gradient, ops.zeros_like(gradient)
                )
            masked.append(gradient)
        return masked

    def keeps_value(self, variable: keras.Variable) -> bool:
        return (
            self.mask_updates
            and _compat.variable_index(self, variable) in self._places
        )

    def after_update(
        self,
        variables: list[keras.Variable],
        before: list[Tensor | None],
        step: Tensor,
    ) -> None:
        if not self.mask_updates:
            return
        masks = self._masks(step)
        for variable, value in zip(variables, before, strict=True):
            if value is not None:
                place = self._places[_compat.variable_index(self, variable)]
                mask = self._mask(masks, place)
                # JAX's `where` takes a tensor but no variable.
                updated = ops.convert_to_tensor(variable)
                variable.assign(ops.where(mask, updated, value))

    def _masks(self, step):
        """dict from pair to the mask of its trained directions, `(rank,)`."""
        masks = {}
        for rank, pairs in self._pairs.items():
            words = counter.random_words(self.seed, pairs, step, rank)
            subsets = counter.random_subset(words, self.update_rank)
            masks.update({pair: subsets[i] for i, pair in enumerate(pairs)})
        return masks

    def _mask(self, masks, place):
        pair, rank_axis = place
        return ops.expand_dims(masks[pair], -1 - rank_axis)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "update_rank": self.update_rank,
            "seed": self.seed,
            "mask_updates": self.mask_updates,
            "paths": self.paths,
        }
