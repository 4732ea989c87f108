"""`RankBudget`: the schedule of AdaLoRA's budget."""

import numbers

import keras

from keras_randadapt import arguments
from keras_randadapt._types import Logs
from keras_randadapt.optimizers import rank_allocation
from keras_randadapt.optimizers import wrapper


class RankBudget(keras.callbacks.Callback):
    """Shrinks the number of ranks of `AdaLoRA` during `fit`.

    The budget is the number of ranks that all sites have together. During a
    warm-up it is the number at injection. Then it falls along a cubic curve.
    In a final phase it is `target_rank` times the number of sites. The curve
    is `b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))**3`, rounded
    down to an integer. Here `t` counts updates from 1, `t_i` is the length of
    the warm-up, `t_f` that of the final phase and `T` that of the training.
    Ranks are pruned every `interval` updates along the curve, and at every
    update of the final phase, in which scores no longer change.

    All of this happens in the compiled step. The callback sets the schedule
    when training begins, and logs the budget at the end of each epoch as
    `rank_budget`. Resumed training continues the schedule, if the lengths are
    given in updates or `epochs` is the same.

    Args:
        target_rank: int or float, at least 0. The average rank of a site at
            the end.
        warmup: float in `[0, 1)`, a share of the training, or int, a number
            of updates.
        final: See `warmup`.
        interval: int. The number of updates from one pruning to the next.
        total_updates: Optional int. The length of the training. The default
            is that of the `fit`, whose number of steps must be known.

    Raises:
        TypeError: If `interval` or `total_updates` is no integer.
        ValueError: If an argument is out of range. When training begins, if
            the model was not compiled, has no active `AdaLoRA`, or has fewer
            ranks than the target, if the number of steps is unknown, or if
            warm-up and final phase take all of the training.

    Example:

    ```python
    kra.inject(classifier, kra.AdaLoRA(6), keep_trainable="logits")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adamw", loss)
    budget = kra.callbacks.RankBudget(4, interval=2)
    classifier.fit(x, y, epochs=5, callbacks=[budget], verbose=0)
    ```

    References:
        - Zhang et al., "AdaLoRA", ICLR 2023, equation 12.
    """

    def __init__(
        self,
        target_rank: float,
        *,
        warmup: float | int = 0.1,
        final: float | int = 0.3,
        interval: int = 10,
        total_updates: int | None = None,
    ):
        super().__init__()
        self.target_rank = arguments.check_non_negative(
            target_rank, "target_rank"
        )
        self.warmup = _check_length(warmup, "warmup")
        self.final = _check_length(final, "final")
        self.interval = arguments.check_rank(interval, "interval")
        if total_updates is not None:
            total_updates = arguments.check_rank(total_updates, "total_updates")
        self.total_updates = total_updates
        self._allocation: rank_allocation.RankAllocation = None

    def on_train_begin(self, logs: Logs = None) -> None:
        optimizer = getattr(self.model, "optimizer", None)
        self._allocation = _find_allocation(optimizer)
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        allocation = self._allocation
        initial = allocation.initial_budget
        target = int(self.target_rank * allocation.sites)
        if target > initial:
            raise ValueError(
                f"`target_rank` asks for {target} ranks, and the model has "
                f"{initial}. Received: target_rank={self.target_rank}"
            )
        total = self._total(allocation)
        warmup = _updates(self.warmup, total)
        final = _updates(self.final, total)
        if warmup + final >= total:
            raise ValueError(
                f"A warm-up of {warmup} and a final phase of {final} updates "
                f"leave nothing of the {total} of this training. Received: "
                f"warmup={self.warmup}, final={self.final}"
            )
        allocation.set_schedule(
            lambda update: budget(
                update, initial, target, warmup, final, total
            ),
            warmup + 1,
            total - final + 1,
            self.interval,
        )

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if logs is not None:
            logs["rank_budget"] = self._allocation.budget_now()

    def _total(self, allocation):
        if self.total_updates is not None:
            return self.total_updates
        steps = self.params.get("steps")
        if not steps:
            raise ValueError(
                "`fit` does not know how many steps an epoch has. Give "
                "`steps_per_epoch` to `fit`, or `total_updates` to "
                "`RankBudget`."
            )
        micro = allocation.gradient_accumulation_steps or 1
        return steps * self.params["epochs"] // micro


def budget(update, initial, target, warmup, final, total):
    """The number of ranks that the schedule keeps at an update.

    Updates count from 1.
    """
    if update <= warmup:
        return initial
    if update > total - final:
        return target
    length = total - warmup - final
    left = length - (update - warmup)
    # Integers are used, since a float could round up.
    return target + (initial - target) * left**3 // length**3


def _find_allocation(optimizer):
    found = [
        one
        for one in (wrapper.walk(optimizer) if optimizer is not None else ())
        if isinstance(one, rank_allocation.RankAllocation)
    ]
    if not found:
        raise ValueError(
            "`RankBudget` found no `RankAllocation` around the model's "
            "optimizer: compile the model with an active `AdaLoRA`."
        )
    if len(found) > 1:
        raise ValueError(
            "`RankBudget` sets the budget of one `AdaLoRA`, and "
            f"{len(found)} are active."
        )
    return found[0]


def _check_length(value, argument):
    number = arguments.check_non_negative(value, argument)
    is_count = isinstance(value, numbers.Integral)
    if not is_count and number >= 1:
        raise ValueError(
            f"`{argument}` must be a share below 1, or an integer number of "
            f"updates. Received: {argument}={value}"
        )
    return int(value) if is_count else number


def _updates(length, total):
    return length if isinstance(length, int) else int(length * total)
