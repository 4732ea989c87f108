"""
# Choosing a method

All methods of this library train a small part in place of a large model, and
`inject`, `fit`, `save_adapter` and `load_adapter` are the same for all. They
differ in what they train, what that costs, and what can be done afterwards.
This table sums it up:

| you want | take |
|---|---|
| a method that works without thought | `LoRA(8)` |
| many tasks, a few kilobytes each | `RLoRA`, `VeRA`, `NOLA`, `FourierFT` |
| more than a low rank can say | `RandLoRA`, `SHiRA`, `HiRA`, `LoHa`, GaLore |
| what image generators are tuned with | `LoRA`, `LoHa`, `LoKr`, `OFT` |
| full use of the rank you pay for | `RMLoRA`, `DoRA(LoRA(8))` |
| not to choose a rank | `DyLoRA`, `AdaLoRA`, `SoRA` |
| less memory in training | `MiSS`, `LoRAFA`, `BitFit` |
| the fewest trained numbers that a model can do with | `SAID` |
| room for more than a linear change | `Bottleneck` |

The rest of this page counts and measures them on one model.
"""

import csv
import json
import os
import pathlib
import statistics
import sys

import keras
import matplotlib.pyplot as plt

import keras_randadapt as kra

sys.path.append(os.path.join(os.path.dirname(__file__), "../examples"))
import classifier

model, backbone, preprocessor = classifier.load(
    "minilm", num_classes=2, sequence_length=32
)

"""
## What they train, what they take, what they allow

The trained weights and the file follow from shapes, so nothing is trained
here. MiniLM has 6 layers of dimension 384. `targets=None` means the query and
value projections. For BitFit it means every layer with a bias, and for a
`Bottleneck` the attention and feed-forward networks.

Each class declares the last three columns. The update of an *additive* method
does not depend on the kernel, and DoRA wraps additive methods that change
kernels. A method that can be *merged* costs nothing in use. Most methods take
Dense and EinsumDense (a *product*), convolutions and embeddings (a *lookup*).
BitFit takes normalizations too.
"""

TEMPLATES = {
    "LoRA(8)": kra.LoRA(8),
    "RMLoRA(8)": kra.RMLoRA(8),
    "LoRAFA(8)": kra.LoRAFA(8),
    "MiSS(16)": kra.MiSS(16),
    "DyLoRA(8)": kra.DyLoRA(8),
    "AdaLoRA(12)": kra.AdaLoRA(12),
    "SoRA(8)": kra.SoRA(8),
    "DoRA(LoRA(8))": kra.DoRA(kra.LoRA(8)),
    "Hydra(8)": kra.Hydra(8),
    "RLoRA(384)": kra.RLoRA(384),
    "VeRA(256)": kra.VeRA(256),
    "SHiRA(8)": kra.SHiRA(8),
    "HiRA(8)": kra.HiRA(8),
    "FourierFT(1000)": kra.FourierFT(1000),
    "LoHa(4)": kra.LoHa(4),
    "LoKr(8)": kra.LoKr(8),
    "OFT(32)": kra.OFT(32),
    "RandLoRA(32)": kra.RandLoRA(32),
    "NOLA(8)": kra.NOLA(8, num_bases=128),
    "SAID(1000)": kra.SAID(1000),
    "BitFit()": kra.BitFit(),
    "Bottleneck(24)": kra.Bottleneck(24),
}


def yes(flag):
    return "yes" if flag else "no"


print(
    f"{'method':<16}{'sites':>6}{'trained':>10}{'file, KB':>10}"
    f"{'additive':>10}{'merged':>8}  takes"
)
for name, template in TEMPLATES.items():
    report = kra.inject(model, template)
    kra.eject(model)
    print(
        f"{name:<16}{len(report.sites):>6}{report.adapter_parameters:>10,}"
        f"{report.file_bytes / 1000:>10.1f}{yes(template.additive):>10}"
        f"{yes(template.mergeable):>8}  {', '.join(template.site_kinds)}"
    )

"""
## What they cost and gain

`benchmarks/methods.py` measured the rest on two CPU cores with JAX: the time
of a training step (16 sentences of 32 tokens) over that of `LoRA(8)`, the
memory that XLA sets aside for the step beside the weights, the optimizer's
state, and the test accuracy on SST-2 after training on 100 examples, mean and
standard deviation over three draws of them. The learning rate was chosen
between the recommended one and five times that, on held-out examples.

Differences in accuracy below two or three points are within the noise of three
seeds. Read the picture for methods that stand apart, not for a ranking. (Points
are moved sideways by up to 12 %, so that equal sizes do not cover each other.)
On a model this small nearly all of a step is the frozen model itself. The
memory would tell more on a long batch of a large model.
"""

HERE = pathlib.Path(__file__).parent
RUNS = HERE.parent / "benchmarks" / "quality" / "results" / "methods.csv"
costs, scores = {}, {}
with RUNS.open(newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
        numbers = json.loads(row["numbers"])
        if row["phase"] == "costs" and row["setting"] == "jax":
            costs[row["method"]] = numbers
        elif row["phase"] == "final":
            scores.setdefault(row["method"], []).append(100 * numbers["test"])

print(
    f"{'method':<26}{'trained':>12}{'step':>7}{'memory, MB':>12}"
    f"{'state, MB':>11}{'accuracy, %':>14}"
)
by_size = sorted(costs, key=lambda name: costs[name]["parameters"])
for name in by_size:
    cost, accuracy = costs[name], scores[name]
    print(
        f"{name:<26}{cost['parameters']:>12,.0f}{cost['step']:>7.2f}"
        f"{cost['temporaries'] / 1e6:>12.0f}{cost['state_bytes'] / 1e6:>11.2f}"
        f"{statistics.mean(accuracy):>8.1f} ± {statistics.stdev(accuracy):.1f}"
    )

figure, axis = plt.subplots(figsize=(11, 6), layout="constrained")
for number, name in enumerate(by_size):
    trained, accuracy = costs[name]["parameters"], scores[name]
    mean, spread = statistics.mean(accuracy), statistics.stdev(accuracy)
    if not trained:
        axis.axhline(mean, color="gray", linestyle=":", label=name)
        continue
    # Numbers, as names would cover each other; equal sizes side by side.
    trained *= 1 + 0.12 * (number % 3 - 1)
    axis.errorbar(trained, mean, spread, color="lightgray", zorder=1)
    axis.plot(
        trained, mean, "o", markersize=13, color=f"C{number % 10}", alpha=0.6
    )
    axis.annotate(number, (trained, mean), ha="center", va="center", fontsize=8)
    axis.plot([], [], " ", label=f"{number}  {name}")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=0.5)
axis.set_xscale("log")
axis.set_xlabel("trained weights, head apart")
axis.set_ylabel("test accuracy on SST-2 from 100 examples, %")

"""
## Advice that holds for all

- **The learning rate matters more than the method.** Each class states the rate
  of its source, `template.recommended_learning_rate`. With few steps, a few
  times that rate is better. Heads want a rate of their own, which
  `kra.optimizers.learning_rate_groups` gives them.
- **LoRA+** trains LoRA's `B`, which starts at zero, at 16 times the rate of
  `A`. It costs nothing:
"""

kra.inject(model, kra.LoRA(8), keep_trainable="logits")
model.compile(
    optimizer=kra.optimizers.learning_rate_groups(
        model, "adamw", adapter=2e-4, lora_b=16 * 2e-4, head=1e-3
    ),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
kra.eject(model)

"""
- **More sites or more rank** are two ways to spend weights:
  `targets="all-linear"` adapts the feed-forward networks too, and `LoRA` takes
  other ranks for some sites with `site_ranks`.
- **Another start** may help: `initialization="pissa"` or `"olora"` of `LoRA`
  begins with the kernel's own directions. Their papers report that it learns
  faster.
- **Merge before you serve**, unless several adapters share one model in
  memory. A `Bottleneck` can't be merged and keeps its cost.
- **Memory** in training is mostly activations. LoRA-FA keeps a thin
  projection of them on JAX and PyTorch. GaLore shrinks the optimizer's state
  of whole kernels, at the price of a decomposition now and then.
"""
