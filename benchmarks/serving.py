"""What a batch of many tenants costs over the same batch under one adapter.

    KERAS_BACKEND=jax python benchmarks/serving.py
    python benchmarks/serving.py --all --tenants 10000 --only RLoRA VeRA

The model has the shape of RoBERTa-base with random weights and a head of two
classes, and the adapters are at the query and value projections. A batch has 32
examples of 64 tokens, each of another tenant. Four functions take turns in one
loop:

- one adapter: `predict_on_batch` of the model with one adapter, as
  `kra.inject` leaves it;
- the bank with 10 tenants, the bank with `--tenants`: `AdapterBank.predict`.
  The latter draws its 32 tenants anew for every batch;
- the base model, without any adapter.

Each is another model of the same weights. A column has the median of a round's
time over that of "one adapter" in the same round. `add` is timed for 20 tenants
in the full bank, file reading included, and "bytes" is what the process grew by
for all tenants of the bank.
"""

import gc
import pathlib
import statistics
import tempfile
import time

import numpy as np
import side_by_side

EXAMPLES = 32
LENGTH = 64
#: As many different adapter files; a bank of more tenants repeats them.
FILES = 32
ADDED = 20


def make_model(layers):
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=1000,
        num_layers=layers,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=LENGTH,
        dropout=0.0,
    )
    features = keras.ops.mean(backbone.output, axis=1)
    logits = keras.layers.Dense(2, name="logits")(features)
    return keras.Model(backbone.input, logits)


def templates():
    import keras_randadapt as kra

    return {
        "RLoRA(512)": kra.RLoRA(512),
        "VeRA(256)": kra.VeRA(256),
        "LoRA(8)": kra.LoRA(8),
    }


def write_files(template, layers, folder):
    """Adapter files of random weights, each with a head of its own."""
    import keras_randadapt as kra

    model = make_model(layers)
    kra.inject(model, template, ["query", "value"], keep_trainable="logits")
    files = []
    for seed in range(FILES):
        rng = np.random.default_rng(seed)
        for weight in model.trainable_variables:
            weight.assign(0.05 * rng.standard_normal(weight.shape, "float32"))
        files.append(folder / f"{seed}.safetensors")
        kra.save_adapter(model, files[-1])
    return model, files


def make_bank(layers, files, tenants):
    """A bank, and the bytes by which the process grew for its tenants."""
    import keras_randadapt as kra

    bank = kra.serving.AdapterBank(make_model(layers), capacity=tenants + ADDED)
    bank.add("0", files[0])
    gc.collect()
    before = resident()
    for number in range(1, tenants):
        bank.add(str(number), files[number % FILES])
    gc.collect()
    return bank, resident() - before


def resident():
    """The bytes of memory that the process has now."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("This system does not tell the memory of a process.")


def rows(arguments):
    for name, template in templates().items():
        if arguments.only and not any(t in name for t in arguments.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield name, *measured(template, arguments, pathlib.Path(folder))
        gc.collect()


def measured(template, arguments, folder):
    layers, tenants = arguments.layers, arguments.tenants
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (EXAMPLES, LENGTH), "int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids, "bool")}
    base = make_model(layers)
    one, files = write_files(template, layers, folder)
    few, _ = make_bank(layers, files, 10)
    many, grown = make_bank(layers, files, tenants)

    def of_few():
        return few.predict(x, adapters=[str(i % 10) for i in range(EXAMPLES)])

    def of_many():
        chosen = rng.choice(tenants, EXAMPLES, replace=False)
        return many.predict(x, adapters=[str(i) for i in chosen])

    functions = {
        "one": lambda: one.predict_on_batch(x),
        "few": of_few,
        "many": of_many,
        "base": lambda: base.predict_on_batch(x),
    }
    times = side_by_side.in_turns(functions, arguments.repeats)

    def ratio(key):
        pairs = zip(times[key], times["one"])
        return statistics.median(time / one for time, one in pairs)

    added = []
    for number in range(ADDED):
        start = time.perf_counter()
        many.add(f"added {number}", files[number % FILES])
        added.append(time.perf_counter() - start)
    return (
        tenants,
        1e3 * statistics.median(times["one"]),
        ratio("base"),
        ratio("few"),
        ratio("many"),
        1e3 * statistics.median(added),
        grown / 1e6,
    )


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        [
            ("method", "{}"),
            ("tenants", "{:,}"),
            ("one adapter, ms", "{:.0f}"),
            ("base", "{:.3f}"),
            ("10 tenants", "{:.3f}"),
            ("all tenants", "{:.3f}"),
            ("add, ms", "{:.1f}"),
            ("bytes, MB", "{:.0f}"),
        ],
        rows,
        tenants={"type": int, "default": 1000, "help": "of the large bank"},
        layers={"type": int, "default": 12, "help": "of the encoder"},
        repeats={"type": int, "default": 9, "help": "of each function"},
        only={"nargs": "*", "help": "methods whose names contain these"},
    )
