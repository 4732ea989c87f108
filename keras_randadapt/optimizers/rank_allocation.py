"""Rank allocation: scores ranks by gradients and prunes them to a budget."""

import math
import re
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.optimizers import wrapper

_NEVER = 2**31 - 1
_PARTS = ("lora_a", "gate", "lora_b")
SCORES = ("sensitivity", "magnitude")


@keras.saving.register_keras_serializable(package="keras_randadapt")
class RankAllocation(wrapper.OptimizerWrapper):
    """Prunes the ranks of `AdaLoRA` to a budget that shrinks during training.

    Before each update, the sensitivity of a weight `w` with gradient `g` is
    `|w g|`. Two averages are kept: `I` is the sensitivity smoothed by `beta1`,
    and `U` is the sensitivity's distance to `I` smoothed by `beta2`. A rank's
    score is `I * U` of its gate plus the means of `I * U` over its column of
    `A` and over its row of `B`. After an update at which the schedule prunes,
    only the `b` ranks with the largest scores in the whole model keep their
    gates; the gates of all others become zero. Between equal scores the
    earlier rank is kept, so exactly `b` are. `A` and `B` are not changed and
    are still trained, so a rank may come back. With `score="magnitude"` a
    rank's score is `|l_i|`, its gate before the update.

    `AdaLoRA` puts this wrapper around the optimizer of a compiled model, and
    `keras_randadapt.callbacks.RankBudget` sets the schedule. Without a
    schedule no rank is pruned. With gradient accumulation, every micro-step is
    scored.

    Args:
        optimizer: The optimizer to wrap: any Keras optimizer without
            `use_ema`, including the result of `learning_rate_groups`, or a
            name.
        beta1: float in `[0, 1)`. See above.
        beta2: float in `[0, 1)`. See above.
        score: `"sensitivity"` or `"magnitude"`. See above.
        paths: Optional string, a regular expression. Only adapters whose
            paths match are pruned.
        name: Optional string.

    Raises:
        TypeError: If `optimizer` is no Keras optimizer.
        ValueError: If an argument is out of range or `optimizer` is a
            `LossScaleOptimizer`. At the first step, if there is no `AdaLoRA`,
            or if the inner optimizer keeps moving averages.

    References:
        - Zhang et al., "AdaLoRA", ICLR 2023, algorithm 1 and equations 5 to
          10. As there, weights are scored before the update; the reference
          code multiplies new weights by old gradients.
    """

    changes_values = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        beta1: float = 0.85,
        beta2: float = 0.85,
        paths: str | None = None,
        name: str | None = None,
        score: str = "sensitivity",
    ):
        super().__init__(optimizer, name=name)
        self.beta1 = _check_beta(beta1, "beta1")
        self.beta2 = _check_beta(beta2, "beta2")
        self.paths = None if paths is None else wrapper.check_paths(paths)
        self.score = arguments.check_choice(score, SCORES, "score")

    def build_state(self, variables: list[keras.Variable]) -> None:
        self._owners = self._find_ranks(variables)
        # The sensitivity and the uncertainty of each variable, by its place, or
        # the magnitude of each gate.
        self._averages: dict[int, tuple[keras.Variable, ...]] = {}
        self.initial_budget = 0
        for places in self._owners:
            # Experts have an axis in front, and each has ranks of its own.
            self.initial_budget += math.prod(variables[places["gate"]].shape)
            for part, place in places.items():
                shape = variables[place].shape
                if self.score == "magnitude":
                    if part == "gate":
                        magnitude = self.add_variable(shape, name="magnitude")
                        self._averages[place] = (magnitude,)
                    continue
                self._averages[place] = (
                    self.add_variable(shape, name="sensitivity"),
                    self.add_variable(shape, name="uncertainty"),
                )
        # `thresholds[n]` is the update from which on the budget is at most `n`
        # ranks. These are exact integers for every curve. They get their first
        # values from initializers, because TensorFlow may build the state
        # while it traces a step, where an assignment would be part of the step.
        self._thresholds = self._integers(
            "thresholds", self.initial_budget, _NEVER
        )
        # The first update that prunes, and the first of the final phase.
        self._phases = self._integers("phases", 2, _NEVER)
        self._interval = self._integers("interval", 1, 1)

    def _integers(self, name, n, value):
        initializer = keras.initializers.Constant(value)
        return self.add_variable(
            (n,), initializer=initializer, dtype="int32", name=name
        )

    def _find_ranks(self, variables):
        """A dict from part to place for each adapter, in their order."""
        owners = {}
        for i, variable in enumerate(variables):
            owner, _, name = variable.path.rpartition("/")
            if name in _PARTS and re.search(self.paths or "", variable.path):
                owners.setdefault(owner, {})[name] = i
        owners = [parts for parts in owners.values() if len(parts) == 3]
        if not owners:
            raise ValueError(
                "`RankAllocation` found no adapter with `lora_a`, `gate` and "
                f"`lora_b` among the {len(variables)} trained variables. "
                "Inject an `AdaLoRA` before training."
            )
        return owners

    def set_schedule(
        self,
        budget: Callable[[int], int],
        start: int,
        final: int,
        interval: int,
    ) -> None:
        """Sets how many ranks are kept, and when ranks are pruned.

        Updates count from 1. Call it before `fit`, or when `fit` begins.

        Args:
            budget: Function from an update to the number of ranks, an integer
                that never grows.
            start: int. The first update that may prune.
            final: int. The first update of the final phase, in which every
                update prunes and scores do not change.
            interval: int. The number of updates between prunings before that.
        """
        thresholds = np.full(self.initial_budget, _NEVER, np.int64)
        update = start
        for count in range(self.initial_budget - 1, budget(final) - 1, -1):
            while budget(update) > count:
                update += 1
            thresholds[count] = update
        self._thresholds.assign(thresholds.astype("int32"))
        self._phases.assign(np.array([start, final], "int32"))
        self._interval.assign(np.array([interval], "int32"))

    def transform_gradients(
        self,
        gradients: list[Tensor | None],
        variables: list[keras.Variable],
        step: Tensor,
    ) -> list[Tensor | None]:
        update = ops.cast(step, "int32") + 1
        is_scored = update < ops.convert_to_tensor(self._phases)[1]
        for gradient, variable in zip(gradients, variables, strict=True):
            averages = self._averages.get(
                _compat.variable_index(self, variable)
            )
            if averages is None or gradient is None:
                continue
            if self.score == "magnitude":
                size = ops.abs(ops.cast(variable, "float32"))
                last = ops.convert_to_tensor(averages[0])
                averages[0].assign(ops.where(is_scored, size, last))
                continue
            sensitivity, uncertainty = map(ops.convert_to_tensor, averages)
            # On TensorFlow, the gradient of looked-up rows may be sparse.
            gradient = ops.cast(ops.convert_to_tensor(gradient), "float32")
            now = ops.abs(ops.cast(variable, "float32") * gradient)
            smooth = self.beta1 * sensitivity + (1 - self.beta1) * now
            distance = ops.abs(now - smooth)
            spread = self.beta2 * uncertainty + (1 - self.beta2) * distance
            averages[0].assign(ops.where(is_scored, smooth, sensitivity))
            averages[1].assign(ops.where(is_scored, spread, uncertainty))
        return gradients

    def after_update(
        self,
        variables: list[keras.Variable],
        before: list[Tensor | None],
        step: Tensor,
    ) -> None:
        update = ops.cast(step, "int32") + 1
        start, final = ops.unstack(ops.convert_to_tensor(self._phases), 2)
        interval = ops.convert_to_tensor(self._interval)[0]
        prunes = ops.logical_or(
            update >= final,
            ops.logical_and(update >= start, ops.mod(update, interval) == 0),
        )
        is_update = self.is_update_step()
        if is_update is not True:
            prunes = ops.logical_and(prunes, is_update)
        kept = ops.logical_or(
            self._kept(self.budget(update)), ops.logical_not(prunes)
        )
        by_place = {_compat.variable_index(self, v): v for v in variables}
        first = 0
        for places in self._owners:
            shape = self._averages[places["gate"]][0].shape
            last = first + math.prod(shape)
            gate = by_place.get(places["gate"])
            if gate is not None:
                value = ops.convert_to_tensor(gate)
                mask = ops.reshape(kept[first:last], shape)
                gate.assign(ops.where(mask, value, ops.zeros_like(value)))
            first = last

    @property
    def sites(self) -> int:
        """The number of adapters that share the budget, one an expert."""
        gates = [self._averages[one["gate"]][0] for one in self._owners]
        return sum(math.prod(gate.shape[:-1]) for gate in gates)

    def budget_now(self) -> int:
        """The budget of the last update, an int."""
        return int(ops.convert_to_numpy(self.budget(self.iterations)))

    def budget(self, update: Tensor) -> Tensor:
        """The number of ranks that the schedule keeps, an int32 tensor."""
        later = ops.convert_to_tensor(self._thresholds) > update
        return ops.sum(ops.cast(later, "int32"))

    def scores(self) -> Tensor:
        """The scores of all ranks, in the order of the model's adapters."""
        if self.score == "magnitude":
            gates = [self._averages[p["gate"]][0] for p in self._owners]
            return ops.concatenate([ops.reshape(g, (-1,)) for g in gates])
        scores = []
        for places in self._owners:
            a, gate, b = (self._score(places[part]) for part in _PARTS)
            score = gate + ops.mean(a, axis=-2) + ops.mean(b, axis=-1)
            scores.append(ops.reshape(score, (-1,)))
        return ops.concatenate(scores)

    def _score(self, place):
        sensitivity, uncertainty = self._averages[place]
        return ops.multiply(sensitivity, uncertainty)

    def _kept(self, budget):
        scores = self.scores()
        # Sorting twice gives each rank's position. The sorts are stable, so
        # equal scores keep their order.
        order = ops.argsort(-scores)
        position = ops.argsort(order)
        return ops.cast(position, "int32") < budget

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "beta1": self.beta1,
            "beta2": self.beta2,
            "paths": self.paths,
            "score": self.score,
        }


def _check_beta(beta, argument):
    value = arguments.check_non_negative(beta, argument)
    if value >= 1:
        raise ValueError(
            f"`{argument}` must be below 1. Received: {argument}={beta}"
        )
    return value
