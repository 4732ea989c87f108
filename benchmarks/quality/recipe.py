"""The parts of the papers' recipes that Keras has no class for.

The RLoRA paper's Table 8 has a linear schedule with 500 warm-up steps and label
smoothing of 0.1 for generation.
"""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="benchmarks")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Rises from 0 to a rate, and falls to 0 at the end of training.

    At step `t` the rate is `rate * min((t + 1) / warmup, (steps - t) / (steps
    - warmup))`, where the first part is left out without a warm-up.

    Args:
        rate: float. The largest rate.
        warmup: int, at least 0 and below `steps`.
        steps: int. The length of the training.

    Raises:
        ValueError: If `warmup` is out of range.
    """

    def __init__(self, rate, warmup, steps):
        if not 0 <= warmup < steps:
            raise ValueError(
                f"`warmup` must be at least 0 and below {steps}, the number "
                f"of steps. Received: warmup={warmup}"
            )
        self.rate = rate
        self.warmup = warmup
        self.steps = steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        left = (self.steps - step) / (self.steps - self.warmup)
        share = ops.clip(left, 0.0, 1.0)
        if self.warmup:
            share = ops.minimum(share, (step + 1) / self.warmup)
        return self.rate * share

    def get_config(self):
        return {"rate": self.rate, "warmup": self.warmup, "steps": self.steps}


@keras.saving.register_keras_serializable(package="benchmarks")
class SmoothedCrossentropy(keras.losses.Loss):
    """Sparse categorical crossentropy of logits with label smoothing.

    A label's probability is `1 - smoothing + smoothing / n` of `n` classes,
    and that of every other class `smoothing / n`. Labels are not made one-hot,
    which would take a vocabulary of numbers for each token.

    Args:
        smoothing: float in `[0, 1)`.
        **kwargs: See `keras.losses.Loss`.

    Raises:
        ValueError: If `smoothing` is out of range.
    """

    def __init__(self, smoothing=0.1, name="smoothed_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        if not 0 <= smoothing < 1:
            raise ValueError(
                "`smoothing` must be at least 0 and below 1. "
                f"Received: smoothing={smoothing}"
            )
        self.smoothing = smoothing

    def call(self, y_true, y_pred):
        logs = ops.log_softmax(ops.cast(y_pred, "float32"), axis=-1)
        labels = ops.expand_dims(ops.cast(y_true, "int32"), -1)
        own = ops.squeeze(ops.take_along_axis(logs, labels, axis=-1), -1)
        return -(1 - self.smoothing) * own - self.smoothing * ops.mean(
            logs, axis=-1
        )

    def get_config(self):
        return {**super().get_config(), "smoothing": self.smoothing}
