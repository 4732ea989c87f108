"""Costs and accuracy of each method on one backbone and one few-shot task.

    KERAS_BACKEND=jax python benchmarks/methods.py --quick    # minutes
    KERAS_BACKEND=jax python benchmarks/methods.py

The model is MiniLM with a classification head. The query and value projections
are adapted, or the method's own default sites. The table has for every method:

- the number of trained weights, without the head, and the bytes of the adapter
  file;
- the time of a training step over that of LoRA, rank 8, and for DoRA over that
  of its inner adapter. Epochs of `fit` of both models take turns in one loop,
  and the times are medians;
- the memory that XLA allocates for the results of a step, without weights and
  their gradients, and the bytes of the optimizer's state (on JAX);
- the accuracy on SST-2 from 100 examples, over paired seeds. The learning rate
  is the method's recommended one or five times that, whichever is better on
  held-out examples.

Every run is a row of `quality/results/methods.csv`, and a run that is there
already is not made again. The table goes into `results/quality_tables.md`.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.append(str(pathlib.Path(__file__).parent / "quality"))

import experiment  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tasks  # noqa: E402

import keras_randadapt as kra  # noqa: E402

REFERENCE = "LoRA(8)"
STEPS = 8
COLUMNS = {
    "parameters": ("trained", ",.0f", 1),
    "file_bytes": ("file, KB", ",.1f", 1e-3),
    "step": ("step / LoRA's", ".2f", 1),
    "step_over_inner": ("step / inner adapter's", ".2f", 1),
    "temporaries": ("step memory, MB", ".0f", 1e-6),
    "state_bytes": ("optimizer state, MB", ".2f", 1e-6),
    "test": ("test accuracy, %", ".1f", 100),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        adapter: Function from a seed to an adapter template, or `None`.
        rate: The recommended learning rate, if there is no adapter.
        whole: Optional function from a rate to the optimizer of the whole
            model, which is trained instead of an adapter.
        callbacks: Optional function from inputs and labels to callbacks.
        targets: See `inject`.
        inner: Optional name of the row of the adapter that DoRA wraps.
    """

    adapter: Callable | None = None
    rate: float | None = None
    whole: Callable | None = None
    callbacks: Callable | None = None
    targets: str | None = None
    inner: str | None = None

    @property
    def rates(self):
        rate = self.rate or self.adapter(0).recommended_learning_rate
        return rate, 5 * rate


def _rank_budget(x, y):
    return [kra.callbacks.RankBudget(8)]


def _galore(rate):
    # Each timed epoch has one decomposition.
    return kra.optimizers.GaLore(
        keras.optimizers.AdamW(rate), rank=32, update_interval=STEPS, scale=1.0
    )


ROWS = {
    "head alone": Row(rate=3e-3),
    "BitFit()": Row(lambda seed: kra.BitFit()),
    "LoRA(8)": Row(lambda seed: kra.LoRA(8, seed=seed)),
    "RMLoRA(8)": Row(lambda seed: kra.RMLoRA(8, seed=seed)),
    "LoRAFA(8)": Row(lambda seed: kra.LoRAFA(8, seed=seed)),
    "MiSS(16)": Row(lambda seed: kra.MiSS(16, seed=seed)),
    "DyLoRA(8)": Row(lambda seed: kra.DyLoRA(8, seed=seed)),
    "AdaLoRA(12)": Row(
        lambda seed: kra.AdaLoRA(12, seed=seed), callbacks=_rank_budget
    ),
    "SoRA(8)": Row(lambda seed: kra.SoRA(8, seed=seed)),
    "DoRA(LoRA(8))": Row(
        lambda seed: kra.DoRA(kra.LoRA(8, seed=seed)), inner="LoRA(8)"
    ),
    "LoRA(8), all linear": Row(
        lambda seed: kra.LoRA(8, seed=seed), targets="all-linear"
    ),
    "DoRA(LoRA(8)), all linear": Row(
        lambda seed: kra.DoRA(kra.LoRA(8, seed=seed)),
        targets="all-linear",
        inner="LoRA(8), all linear",
    ),
    "Hydra(8)": Row(lambda seed: kra.Hydra(8, seed=seed)),
    "RLoRA(384)": Row(lambda seed: kra.RLoRA(384, seed=seed)),
    "DoRA(RLoRA(384))": Row(
        lambda seed: kra.DoRA(kra.RLoRA(384, seed=seed)), inner="RLoRA(384)"
    ),
    "VeRA(256)": Row(lambda seed: kra.VeRA(256, seed=seed)),
    "DoRA(VeRA(256))": Row(
        lambda seed: kra.DoRA(kra.VeRA(256, seed=seed)), inner="VeRA(256)"
    ),
    "SHiRA(8)": Row(lambda seed: kra.SHiRA(8, seed=seed)),
    "HiRA(8)": Row(lambda seed: kra.HiRA(8, seed=seed)),
    "RandLoRA(32)": Row(lambda seed: kra.RandLoRA(32, seed=seed)),
    "NOLA(8)": Row(lambda seed: kra.NOLA(8, num_bases=128, seed=seed)),
    "SAID(1000)": Row(lambda seed: kra.SAID(1000, seed=seed)),
    "Bottleneck(24)": Row(lambda seed: kra.Bottleneck(24, seed=seed)),
    "Bottleneck(24), Pfeiffer": Row(
        lambda seed: kra.Bottleneck(24, placement="pfeiffer", seed=seed)
    ),
    "Bottleneck(24), parallel": Row(
        lambda seed: kra.Bottleneck(24, placement="parallel", seed=seed)
    ),
    "GaLore, all weights": Row(rate=1e-4, whole=_galore),
    "all weights": Row(rate=2e-5, whole=keras.optimizers.AdamW),
}


def accuracy_methods(task):
    """The rows as methods of `experiment.run_all`."""

    def method(name, row):
        def train(seed, final, rate):
            adapter = row.adapter(seed) if row.adapter else None
            task.targets = row.targets
            return task.train(
                seed, final, adapter, rate, row.callbacks, whole=row.whole
            )

        return experiment.Method(name, {"rate": row.rates}, train)

    return [method(name, row) for name, row in ROWS.items()]


def prepare(task, row):
    """Puts a method on a task's model and compiles it.

    Returns:
        The bytes of its file.
    """
    model = task.model
    if kra.sites(model):
        kra.eject(model)
    for layer in model.layers:
        layer.trainable = bool(row.whole) or layer.name == task.head
    rate = row.rates[0]
    if row.adapter:
        report = kra.inject(
            model, row.adapter(0), row.targets, keep_trainable=task.head
        )
        file_bytes = report.file_bytes
        optimizer = kra.optimizers.learning_rate_groups(
            model, "adamw", adapter=rate, head=tasks.HEAD_RATE
        )
    else:
        file_bytes = 4 * count(model.trainable_variables)
        make = row.whole or keras.optimizers.AdamW
        optimizer = make(rate)
    model.compile(optimizer=optimizer, loss=task.loss())
    return file_bytes


def count(variables):
    return sum(math.prod(variable.shape) for variable in variables)


def costs(task, reference, row, repeats):
    """The costs of a method, as a dict of numbers."""
    numbers = {"file_bytes": prepare(task, row)}
    head = task.model.get_layer(task.head).trainable_variables
    numbers["parameters"] = count(task.model.trainable_variables) - count(head)
    medians = times_of_steps(task, reference, row, REFERENCE, repeats)
    numbers["seconds_a_step"] = medians["method"]
    numbers["step"] = medians["method"] / medians["reference"]
    if row.inner:
        medians = times_of_steps(task, reference, row, row.inner, repeats)
        numbers["step_over_inner"] = medians["method"] / medians["reference"]
    numbers["state_bytes"] = sum(
        math.prod(v.shape) * np.dtype("float32").itemsize
        for v in task.model.optimizer.variables
    )
    if keras.config.backend() == "jax":
        numbers["temporaries"] = temporaries(task)
    return numbers


def times_of_steps(task, reference, row, other, repeats):
    """The median seconds of a step of a method and of another row."""
    if reference.prepared != other:
        prepare(reference, ROWS[other])
        reference.prepared = other
    x, y = task.batches
    times = {"reference": [], "method": []}
    for repeat in range(repeats + 1):
        for name, one in (("reference", reference), ("method", task)):
            callbacks = row.callbacks if one is task else None
            start = time.perf_counter()
            one.model.fit(
                x,
                y,
                batch_size=task.batch_size,
                verbose=0,
                callbacks=callbacks(x, y) if callbacks else None,
            )
            # The first repetition compiles.
            if repeat:
                times[name].append((time.perf_counter() - start) / STEPS)
    return {name: statistics.median(t) for name, t in times.items()}


def temporaries(task):
    """The bytes that XLA allocates for one loss and its gradients."""
    import jax

    model = task.model

    def loss(trained, fixed, x, y):
        logits, _, losses = model.stateless_call(
            trained, fixed, x, training=True, return_losses=True
        )
        return task.loss()(y, logits) + sum(losses)

    x, y = keras.tree.map_structure(
        lambda array: keras.ops.convert_to_tensor(array[: task.batch_size]),
        task.batches,
    )
    trained = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    program = jax.jit(jax.grad(loss)).lower(trained, fixed, x, y).compile()
    return program.memory_analysis().temp_size_in_bytes


def measure(results, setting, make_task, repeats):
    """The costs of all methods, as a dict from name to numbers."""
    task, reference = None, None
    measured = {}
    for name, row in ROWS.items():
        key = {
            "setting": setting,
            "method": name,
            "phase": "costs",
            "seed": 0,
            "config": "{}",
        }
        numbers = results.find(**key)
        if numbers is None:
            if task is None:
                task, reference = make_task(), make_task()
            numbers = costs(task, reference, row, repeats)
            results.add(numbers, **key)
            shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            print(f"{name}: {shown}", flush=True)
        measured[name] = numbers
    return measured


def make_task(per_class=50, epochs=8, held_out=500, test=1000):
    task = tasks.SentenceTask("sst2", per_class, epochs, held_out, test)
    task.load()
    x, y = task.examples(0)
    size = STEPS * task.batch_size

    def repeated(array):
        return np.resize(array, (size, *array.shape[1:]))

    task.prepared = None
    task.batches = keras.tree.map_structure(repeated, (x, y))
    return task


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="takes minutes")
    parser.add_argument("--costs", action="store_true", help="no accuracy")
    arguments = parser.parse_args()
    folder = pathlib.Path(__file__).parent / "quality" / "results"
    sizes, seeds, repeats = {}, 3, 5
    if arguments.quick:
        folder = pathlib.Path("outputs", "quality")
        sizes = dict(per_class=8, epochs=1, held_out=50, test=50)
        seeds, repeats = 1, 1
    results = experiment.Results(folder / "methods.csv")
    cores = len(os.sched_getaffinity(0))
    print(f"{keras.config.backend()}, {cores} cores, {os.getloadavg()[0]:.1f}")
    measured = measure(
        results, keras.config.backend(), lambda: make_task(**sizes), repeats
    )
    if arguments.costs:
        return
    task = make_task(**sizes)
    title = f"SST-2, {2 * task.per_class}"
    outcome = experiment.run_all(
        results, title, accuracy_methods(task), range(seeds)
    )
    joined = {
        name: (config, [{**run, **measured[name]} for run in runs])
        for name, (config, runs) in outcome.items()
    }
    text = (
        f"{keras.config.backend()}; accuracy on {title} examples, "
        f"{task.epochs} epochs, {seeds} seeds:\n\n"
        + experiment.table(joined, COLUMNS)
    )
    print(f"\n{text}", flush=True)
    if not arguments.quick:
        experiment.publish(experiment.PAGE, "methods", text)


if __name__ == "__main__":
    main()
