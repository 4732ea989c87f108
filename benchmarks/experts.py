"""The time that adapters of experts add to a training step of a mixture.

    KERAS_BACKEND=jax python benchmarks/experts.py
    python benchmarks/experts.py --all --experts 16

A step consists of the forward pass, the backward pass and the optimizer step
(AdamW) of a small Mixtral with random weights, whose layers compute all experts
on all tokens. Every method adapts the experts alone and has its own model.
Their steps take turns in one loop, and the table has the medians of that loop
divided by the floor: the same model with one trainable vector at the first
site, so that its backward pass goes through all layers and nothing else is
trained.
"""

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import side_by_side  # noqa: E402
import training_step  # noqa: E402

LENGTH = 64
VOCABULARY = 1000
COLUMNS = [("method", "{}"), ("ms", "{:.1f}"), ("of the floor", "{:.2f}")]


def make_model(arguments):
    """A frozen mixture and the mean of its features."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=arguments.layers,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=arguments.dim,
        intermediate_dim=2 * arguments.dim,
        num_experts=arguments.experts,
        top_k=2,
    )
    backbone.trainable = False
    features = keras.ops.mean(backbone.output, axis=1)
    return keras.Model(backbone.input, features)


def make_step(adapter, targets, arguments):
    import keras

    import keras_randadapt as kra

    model = make_model(arguments)
    if adapter is None:
        first = next(iter(kra.inject(model, kra.LoRA(1), targets).sites))
        kra.eject(model)
        kra.inject(model, training_step.vector(), [first])
    else:
        kra.inject(model, adapter, targets)
    model.compile(keras.optimizers.AdamW(1e-3), "mse")
    rows = arguments.tokens // LENGTH
    ids = np.random.default_rng(0).integers(
        0, VOCABULARY, (rows, LENGTH), "int32"
    )
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids, "bool")}
    y = np.zeros((rows, arguments.dim), "float32")
    return lambda: model.train_on_batch(x, y)


def rows(arguments):
    import keras_randadapt as kra

    adapters = {
        "one vector": (None, "query"),
        "LoRA(8)": (kra.LoRA(8), "experts"),
        "VeRA(64)": (kra.VeRA(64), "experts"),
        "RLoRA(64)": (kra.RLoRA(64), "experts"),
        "DoRA(LoRA(8))": (kra.DoRA(kra.LoRA(8)), "experts"),
    }
    if arguments.only:
        adapters = {
            name: adapter
            for name, adapter in adapters.items()
            if adapter[0] is None or name in arguments.only
        }
    steps = {
        name: make_step(*adapter, arguments)
        for name, adapter in adapters.items()
    }
    clock = time.process_time if arguments.cpu else time.perf_counter
    measured = side_by_side.in_turns(steps, arguments.repeats, clock)
    medians = {n: 1e3 * statistics.median(t) for n, t in measured.items()}
    for name, median in medians.items():
        yield name, median, median / medians["one vector"]


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        experts=dict(type=int, default=8),
        layers=dict(type=int, default=2),
        dim=dict(type=int, default=256),
        tokens=dict(type=int, default=512),
        repeats=dict(type=int, default=9),
        cpu=dict(action="store_true", help="time of all cores of the process"),
        only=dict(nargs="+", metavar="METHOD", help="these methods alone"),
    )
