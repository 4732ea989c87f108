"""The time and memory that an adapter adds to a training step.

    KERAS_BACKEND=jax python benchmarks/training_step.py            # times
    KERAS_BACKEND=jax python benchmarks/training_step.py --memory   # bytes
    python benchmarks/training_step.py --all --model llama --targets all-linear

A step consists of the forward pass, the backward pass and the optimizer step
(AdamW) of a KerasHub backbone. It has the shape of RoBERTa-base or of a small
Llama, random weights and 4,096 tokens. Every method has its own model. Their
steps take turns in one loop, and the table has the medians of that loop,
divided by

- the floor, which is the same model with one trainable vector at the first
  site. Its backward pass goes through all layers and nothing else is trained;
- Keras's own `enable_lora(8)` on the same layers.

With PyTorch and `pip install peft`, rows of Hugging Face PEFT's methods follow.
They use the model of the same shape in `transformers` and its own floor.

`--memory` runs two steps of each method in its own process, and prints the
largest memory during the second. On a CPU it is the resident set, with weights
and framework, and also without the memory before the step. On a GPU it is the
memory of the framework's allocator. JAX cannot reset that figure, so there it
is the largest since the process began.
"""

import concurrent.futures
import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Without this, JAX would allocate most of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np  # noqa: E402
import side_by_side  # noqa: E402

RATE = 1e-3
LENGTH = 128
FLOOR = "one vector"
KERAS = "enable_lora(8)"
PEER = "PEFT: "
# The method by whose memory that of others is divided.
REFERENCE = "LoRA(64)"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A transformer's size. The vocabulary may be small: lookups are cheap."""

    layers: int
    dim: int
    heads: int
    feed_forward: int
    #: The names of the query and value projections in `transformers`.
    peer_query_value: tuple
    key_value_heads: int | None = None
    vocabulary: int = 1000


SHAPES = {
    "roberta": Shape(12, 768, 12, 3072, ("query", "value")),
    # For a machine that others use.
    "roberta-2": Shape(2, 768, 12, 3072, ("query", "value")),
    "llama": Shape(8, 512, 8, 1536, ("q_proj", "v_proj")),
    # The shape of Llama 3.2 1B, for a GPU.
    "llama-1b": Shape(16, 2048, 32, 8192, ("q_proj", "v_proj"), 8),
    # It is so small that the host determines the time, as with small batches
    # on a GPU.
    "llama-host": Shape(16, 64, 4, 128, ("q_proj", "v_proj")),
    # These only show that everything runs.
    "tiny": Shape(2, 64, 2, 128, ("query", "value")),
    "llama-tiny": Shape(2, 128, 2, 128, ("q_proj", "v_proj"), 1),
}
TARGETS = {"query-value": ["query", "value"], "all-linear": "all-linear"}


def make_model(name, dtype):
    """A frozen backbone, and a model of the mean of its features."""
    import keras
    import keras_hub

    shape = SHAPES[name]
    keras.utils.set_random_seed(0)
    if name.startswith("llama"):
        backbone = keras_hub.models.LlamaBackbone(
            vocabulary_size=shape.vocabulary,
            num_layers=shape.layers,
            num_query_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads or shape.heads,
            hidden_dim=shape.dim,
            intermediate_dim=shape.feed_forward,
            dtype=dtype,
        )
    else:
        backbone = keras_hub.models.RobertaBackbone(
            vocabulary_size=shape.vocabulary,
            num_layers=shape.layers,
            num_heads=shape.heads,
            hidden_dim=shape.dim,
            intermediate_dim=shape.feed_forward,
            max_sequence_length=LENGTH,
            dropout=0.0,
            dtype=dtype,
        )
    backbone.trainable = False
    features = keras.ops.mean(backbone.output, axis=1)
    features = keras.ops.cast(features, "float32")
    return keras.Model(backbone.input, features), backbone


def vector():
    """The floor's adapter, a vector that is added to its site's output."""
    import keras

    import keras_randadapt as kra

    @keras.saving.register_keras_serializable(package="benchmarks")
    class Vector(kra.Adapter):
        site_kinds = ("product",)

        def build(self, site):
            self.vector = self.add_trainable(
                "vector", (site.output_dim,), "zeros"
            )

        def delta(self, x, training=None):
            added = keras.ops.cast(self.vector, x.dtype)
            shape = *keras.ops.shape(x)[:-1], self.output_dim
            return keras.ops.broadcast_to(added, shape)

    return Vector()


def adapters(shape):
    """The templates by name. One `LoRA` has as many weights as RandLoRA."""
    import keras_randadapt as kra
    from keras_randadapt.sites.site import Site

    def count(adapter):
        adapter.build_at(Site(input_dim=shape.dim, output_dim=shape.dim))
        return sum(int(np.prod(v.shape)) for v in adapter.trainable_variables)

    rank = round(count(kra.RandLoRA(32)) / count(kra.LoRA(1)))
    return {
        "LoRA(8)": kra.LoRA(8),
        "LoRA(64)": kra.LoRA(64),
        f"LoRA({rank}), as many as RandLoRA": kra.LoRA(rank),
        "MiSS(16)": kra.MiSS(16),
        "SHiRA(8)": kra.SHiRA(8),
        "HiRA(8)": kra.HiRA(8),
        f"FourierFT({16 * shape.dim})": kra.FourierFT(16 * shape.dim),
        "LoHa(4)": kra.LoHa(4),
        "LoKr(48), factor 6": kra.LoKr(48, factor=6),
        "OFT(32)": kra.OFT(32),
        "RLoRA(64)": kra.RLoRA(64),
        "RLoRA(512)": kra.RLoRA(512),
        "VeRA(256)": kra.VeRA(256),
        "RandLoRA(32)": kra.RandLoRA(32),
        "DoRA(LoRA(8))": kra.DoRA(kra.LoRA(8)),
    }


def names(arguments):
    """The names of the compared methods, the floors first."""
    ours = list(adapters(SHAPES[arguments.model]))
    theirs = []
    if has_peers(arguments):
        theirs = ["LoRA(8)", "VeRA(256)", "RandLoRA(32)"]
    if arguments.only:
        always = REFERENCE if arguments.memory else None

        def wanted(name):
            return any(text in name for text in arguments.only)

        ours = [name for name in ours if wanted(name) or name == always]
        theirs = [name for name in theirs if wanted(name)]
    if theirs:
        theirs = [PEER + name for name in (FLOOR, *theirs)]
    return [FLOOR, KERAS, *ours, *theirs]


def keras_step(name, arguments):
    """A function that makes a step of a method of this library or Keras."""
    import keras

    import keras_randadapt as kra

    model, backbone = make_model(arguments.model, arguments.dtype)
    targets = TARGETS[arguments.targets]
    if name == KERAS:
        enable_lora(backbone, targets)
    elif name == FLOOR:
        first = next(iter(kra.inject(model, kra.LoRA(1), targets).sites))
        kra.eject(model)
        kra.inject(model, vector(), [first])
    else:
        kra.inject(model, adapters(SHAPES[arguments.model])[name], targets)
    model.compile(keras.optimizers.AdamW(RATE), "mse")
    x, y = batch(arguments)
    return lambda: model.train_on_batch(x, y)


def enable_lora(backbone, targets):
    """Enables Keras's own LoRA on the layers that `targets` means."""
    import keras

    kinds = keras.layers.Dense, keras.layers.EinsumDense
    backbone.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        if layer._layers:
            continue
        chosen = targets == "all-linear" or layer.name in targets
        if isinstance(layer, kinds) and chosen:
            layer.enable_lora(8)
            if layer.bias is not None:
                layer.bias.trainable = False
        else:
            layer.trainable = False


def batch(arguments):
    shape = SHAPES[arguments.model]
    rows = arguments.tokens // LENGTH
    ids = np.random.default_rng(0).integers(
        0, shape.vocabulary, (rows, LENGTH), "int32"
    )
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids, "bool")}
    return x, np.zeros((rows, shape.dim), "float32")


def peer_step(name, arguments):
    """A function that makes a step of one of PEFT's methods."""
    import peft
    import torch
    import transformers

    shape = SHAPES[arguments.model]
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.feed_forward,
    }
    if shape.key_value_heads:
        sizes["num_key_value_heads"] = shape.key_value_heads
    torch.manual_seed(0)
    if arguments.model.startswith("llama"):
        config = transformers.LlamaConfig(**sizes, use_cache=False)
        model = transformers.LlamaModel(config)
    else:
        config = transformers.RobertaConfig(
            **sizes,
            max_position_embeddings=LENGTH + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, getattr(torch, arguments.dtype))
    targets = arguments.targets
    if targets == "query-value":
        targets = list(shape.peer_query_value)
    make = {
        "LoRA(8)": lambda: peft.LoraConfig(r=8, target_modules=targets),
        "VeRA(256)": lambda: peft.VeraConfig(r=256, target_modules=targets),
        "RandLoRA(32)": lambda: peft.RandLoraConfig(
            r=32, target_modules=targets
        ),
    }
    if name == FLOOR:
        model.requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        added = torch.nn.Parameter(torch.zeros(shape.dim, device=device))
        layers[0].register_forward_hook(
            lambda layer, x, y: y + added.to(y.dtype)
        )
        trained = [added]
    else:
        model = peft.get_peft_model(model, make[name]()).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    optimizer = torch.optim.AdamW(trained, RATE)
    x, y = batch(arguments)
    ids = torch.tensor(x["token_ids"], device=device).long()
    mask = torch.tensor(x["padding_mask"], device=device)
    y = torch.tensor(y, device=device)

    def step():
        optimizer.zero_grad()
        features = model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = torch.mean((features.mean(1).float() - y) ** 2)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_step(name, arguments):
    if name.startswith(PEER):
        return peer_step(name.removeprefix(PEER), arguments)
    return keras_step(name, arguments)


def times(arguments):
    """The rows of medians and ratios."""
    steps = {name: make_step(name, arguments) for name in names(arguments)}
    measured = side_by_side.in_turns(steps, arguments.repeats)
    medians = {n: 1e3 * statistics.median(t) for n, t in measured.items()}
    for name, median in medians.items():
        is_peer = name.startswith(PEER)
        floor = medians[PEER + FLOOR if is_peer else FLOOR]
        yield name, median, median / floor, median / medians[KERAS]


def memory(arguments):
    """The rows of peaks, each measured in its own process."""
    # With this, freed memory goes back to the system at once. Otherwise the
    # resident set would include a gigabyte that the C library keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}

    def measured(name):
        output = subprocess.run(
            [sys.executable, *sys.argv, f"--one={name}"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ).stdout
        return json.loads(output.splitlines()[-1])

    # A GPU's allocator counts only its own process, so several may run.
    with concurrent.futures.ThreadPoolExecutor(4 if has_gpu() else 1) as pool:
        methods = names(arguments)
        peaks = dict(zip(methods, pool.map(measured, methods)))
    reference = peaks[REFERENCE]
    for name, (peak, own) in peaks.items():
        yield (
            name,
            peak / 1e6,
            own / 1e6,
            peak / reference[0],
            own / reference[1],
        )


def peak_of_one(name, arguments):
    """`(peak, own)` bytes of a step; `own` is without earlier memory."""
    step = make_step(name, arguments)
    step()
    gc.collect()
    before = allocated(reset_peak=True)
    step()
    peak = allocated(peak=True)
    return peak, peak - before


def allocated(peak=False, reset_peak=False):
    """The bytes of memory in use, now or at the peak."""
    import keras

    backend = keras.config.backend()
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            if reset_peak:
                torch.cuda.reset_peak_memory_stats()
            if peak:
                return torch.cuda.max_memory_allocated()
            return torch.cuda.memory_allocated()
    elif backend == "jax":
        import jax

        held = jax.devices()[0].memory_stats()
        if held is not None:
            # JAX cannot reset the peak, which is that of the whole process.
            return held["peak_bytes_in_use" if peak else "bytes_in_use"]
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            if reset_peak:
                tf.config.experimental.reset_memory_stats("GPU:0")
            found = tf.config.experimental.get_memory_info("GPU:0")
            return found["peak" if peak else "current"]
    if reset_peak:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM" if peak else "VmRSS"
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def has_gpu():
    """Whether the backend runs on a GPU; for TensorFlow it is false."""
    import keras

    if keras.config.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    if keras.config.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    return False


def has_peers(arguments):
    import keras

    if keras.config.backend() != "torch":
        return False
    return importlib.util.find_spec("peft") is not None


TIME_COLUMNS = (
    ("method", "{}"),
    ("step, ms", "{:.0f}"),
    ("over the floor", "{:.3f}"),
    (f"over {KERAS}", "{:.3f}"),
)
MEMORY_COLUMNS = (
    ("method", "{}"),
    ("peak, MB", "{:.0f}"),
    ("of that the step's own, MB", "{:.0f}"),
    ("peak over LoRA(64)'s", "{:.3f}"),
    ("own over LoRA(64)'s", "{:.3f}"),
)


def rows(arguments):
    if arguments.one:
        print(json.dumps(peak_of_one(arguments.one, arguments)))
        return ()
    return memory(arguments) if arguments.memory else times(arguments)


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        lambda arguments: MEMORY_COLUMNS if arguments.memory else TIME_COLUMNS,
        rows,
        model=dict(choices=list(SHAPES), default="roberta"),
        targets=dict(choices=list(TARGETS), default="query-value"),
        dtype=dict(choices=("float32", "bfloat16"), default="float32"),
        tokens=dict(type=int, default=4096),
        repeats=dict(type=int, default=7),
        memory=dict(action="store_true"),
        only=dict(
            nargs="+",
            metavar="TEXT",
            help="methods whose names have one of these, alone",
        ),
        one=dict(metavar="METHOD", help="print this method's memory as JSON"),
    )
