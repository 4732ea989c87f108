"""Trains a classifier with two methods and measures both."""

import dataclasses
import pathlib
import statistics
import time

import classifier
import keras
import numpy as np

import keras_randadapt as kra


@dataclasses.dataclass
class Run:
    """The reported numbers of one training run."""

    name: str
    adapter_parameters: int
    head_parameters: int
    other_parameters: int = 0
    file_bytes: int = 0
    accuracy: list = dataclasses.field(default_factory=list)
    loss: list = dataclasses.field(default_factory=list)
    seconds: list = dataclasses.field(default_factory=list)

    @property
    def seconds_per_epoch(self):
        # The first epoch compiles, so it does not count.
        return statistics.median(self.seconds[1:] or self.seconds)


class EpochTimer(keras.callbacks.Callback):
    """Measures the time of each epoch without validation."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_test_begin(self, logs=None):
        # JAX returns from a step before it is computed. Reading a weight waits
        # for the last step.
        keras.ops.convert_to_numpy(self.model.trainable_variables[0])
        self.seconds.append(time.perf_counter() - self._start)


def count(weights):
    """The number of scalars in a list of variables."""
    return sum(int(np.prod(weight.shape)) for weight in weights)


def fit(model, run, optimizer, train, validation, epochs, batch_size=32):
    """Compiles and fits the model and writes the measurements into `run`.

    Args:
        model: The classifier with its adapters.
        run: The `Run` to complete.
        optimizer: A Keras optimizer.
        train: A tuple of tokens and labels.
        validation: A tuple of tokens and labels, evaluated after each epoch.
        epochs: The number of epochs.
        batch_size: The number of examples in a step.
    """
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print(
            f"  {run.name}, epoch {epoch + 1} of {epochs}: "
            f"loss {logs['loss']:.3f}, "
            f"validation accuracy {logs['val_accuracy']:.3f}, "
            f"{timer.seconds[-1]:.1f} s",
            flush=True,
        )
    )
    history = model.fit(
        *train,
        validation_data=validation,
        epochs=epochs,
        batch_size=batch_size,
        verbose=0,
        callbacks=[timer, progress],
    )
    run.accuracy = history.history["val_accuracy"]
    run.loss = history.history["loss"]
    run.seconds = timer.seconds


def train_rlora(model, data, epochs, rank, adapter_rate, head_rate, path):
    """Fine-tunes with RLoRA on the query and value projections.

    Args:
        model: The classifier as loaded. Adapters are injected into it and stay
            attached.
        data: Two tuples of tokens and labels: training and validation.
        epochs: The number of epochs.
        rank: The rank of the adapters.
        adapter_rate: The learning rate of the adapters.
        head_rate: The learning rate of the head.
        path: The adapter file to write.

    Returns:
        A `Run`.
    """
    report = kra.inject(
        model,
        kra.RLoRA(rank=rank, seed=0),
        # This means the query and value projections of every encoder.
        targets=None,
        keep_trainable=[classifier.HEAD],
    )
    print(report)
    run = Run(
        f"RLoRA, rank {rank}",
        adapter_parameters=report.adapter_parameters,
        head_parameters=report.head_parameters,
    )
    optimizer = kra.optimizers.learning_rate_groups(
        model, optimizer="adamw", adapter=adapter_rate, head=head_rate
    )
    fit(model, run, optimizer, *data, epochs)
    kra.save_adapter(model, path)
    run.file_bytes = pathlib.Path(path).stat().st_size
    return run


def train_keras_lora(
    model, backbone, data, epochs, rank, adapter_rate, head_rate, path
):
    """Fine-tunes with Keras's and KerasHub's own LoRA.

    Args:
        model: The classifier as loaded.
        backbone: Its backbone, on which LoRA is enabled.
        data: Two tuples of tokens and labels: training and validation.
        epochs: The number of epochs.
        rank: The argument of `enable_lora`.
        adapter_rate: The learning rate of the backbone's trainable weights.
        head_rate: The learning rate of the head.
        path: The `.lora.h5` file to write.

    Returns:
        A `Run`.
    """
    backbone.enable_lora(rank)
    in_backbone = backbone.trainable_weights
    lora = [weight for weight in in_backbone if "lora_" in weight.name]
    run = Run(
        f"enable_lora({rank})",
        adapter_parameters=count(lora),
        head_parameters=count(model.trainable_weights) - count(in_backbone),
        other_parameters=count(in_backbone) - count(lora),
    )
    optimizer = two_rates(in_backbone, adapter_rate, head_rate)
    fit(model, run, optimizer, *data, epochs)
    backbone.save_lora_weights(path)
    run.file_bytes = pathlib.Path(path).stat().st_size
    return run


def two_rates(adapter_weights, adapter_rate, head_rate):
    """AdamW with one rate for some weights and another rate for the rest."""
    paths = {weight.path for weight in adapter_weights}
    adapter = keras.optimizers.AdamW(adapter_rate)
    head = keras.optimizers.AdamW(head_rate)
    return keras.optimizers.MultiOptimizer(
        lambda variable: adapter if variable.path in paths else head
    )
