"""
# RandLoRA: full-rank updates from random bases

LoRA's update has rank `r`, however long it is trained. RandLoRA (Albert et
al., ICLR 2025) sums many low-rank terms

    delta = s * sum_j B_j diag(lambda_j) A diag(gamma_j)

with random matrices `A` and `B_j` that are frozen, and trains the vectors
`lambda_j` and `gamma_j`. With `min(input_dim, output_dim) / r` terms the
update has full rank, at the number of trained weights of a low-rank LoRA.

**Choose it** when there is data enough that LoRA of a higher rank still gets
better. The paper names vision models and long instruction tuning. A smaller
`rank` means more terms, more trained weights and a richer update.

**Choose another one** for a handful of examples (RLoRA trains 12 times less at
its usual rank) or where the last bit of speed counts.

[The evidence](../docs/evidence.md) has 20 pairs of runs for each of nine
teachers, at equal numbers of trained weights. RandLoRA beat LoRA where the
update to learn had half of the full rank or more, and equal singular values.
Where they fall, as those of trained networks do, LoRA had 24 % less error, and
far less where the rank is small. VeRA of the same size did as well as RandLoRA.
So compare it with LoRA before you choose it.

The bases may be Gaussian, uniform or sparse, as in the paper. They may also be
`"hadamard"`: these are randomized Hadamard transforms, and nothing of them is
stored.
"""

import os
import sys

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_randadapt as kra

sys.path.append(os.path.join(os.path.dirname(__file__), "../examples"))
import classifier
import scored_sentences
import text_data

EPOCHS = int(os.environ.get("GUIDE_EPOCHS", 8))
EXAMPLES = int(os.environ.get("GUIDE_EXAMPLES", 400))

"""
## A pretrained encoder and 400 sentences
"""

model, backbone, preprocessor = classifier.load(
    "minilm", num_classes=2, sequence_length=32
)
split = text_data.few_shot_split(
    scored_sentences.load(), train=EXAMPLES, validation=max(EXAMPLES, 40)
)


def arrays(examples):
    texts, labels = zip(*examples)
    return classifier.tokenize(preprocessor, texts), np.array(labels)


x, y = arrays(split.train)
validation = arrays(split.validation)

"""
## Two adapters of one size

RandLoRA of rank 16 trains 24 * (16 + 384) = 9,600 weights a 384 x 384
projection, and LoRA of rank 12 trains 9,216. Both are trained in turn on the
same model.
"""


def train(name, adapter, rate):
    kra.inject(model, adapter, keep_trainable="logits")
    keras.utils.set_random_seed(0)
    model.compile(
        optimizer=kra.optimizers.learning_rate_groups(
            model, "adamw", adapter=rate, head=3e-3
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x, y, validation_data=validation, epochs=EPOCHS, verbose=0
    ).history
    values = kra.analysis.singular_values(model)
    ranks = kra.analysis.intrinsic_rank(model)["rank"]
    accuracy = history["val_accuracy"][-1]
    print(
        f"{name.ljust(19)} update of rank {np.mean(ranks):.0f}, "
        f"validation accuracy {accuracy:.3f}"
    )
    kra.eject(model)
    return values


adapters = {
    "LoRA, rank 12": kra.LoRA(12),
    "RandLoRA, rank 16": kra.RandLoRA(16),
    "RandLoRA, hadamard": kra.RandLoRA(16, basis="hadamard"),
}
spectra = {name: train(name, one, 3e-3) for name, one in adapters.items()}

"""
## The spectrum of the updates

The picture shows the singular values of the first site's update. LoRA's stop at
its rank, and RandLoRA's go on to the last dimension. The printed accuracies
come from one seed, and differences of two or three points between them are
noise.
"""

figure, axis = plt.subplots()
for name, values in spectra.items():
    first = values["singular_values"][0]
    axis.semilogy(np.maximum(first, 1e-6 * first[0]), label=name)
axis.set_xlabel("index")
axis.set_ylabel("singular value")
axis.legend()

"""
## How it is computed

`compute="factored"` multiplies inputs by the bases, two products a token.
`"materialized"` forms the update once a step, adds it to the kernel and
multiplies once. `"auto"`, the default, takes the way that needs fewer
multiply-adds for the number of tokens at hand. The results are the same up to
rounding. Here random values stand in for trained ones.
"""

small = {name: value[:8] for name, value in validation[0].items()}
outputs = {}
for compute in ("factored", "materialized"):
    kra.inject(model, kra.RandLoRA(16, compute=compute))
    generator = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(0.1 * generator.normal(size=weight.shape))
    outputs[compute] = model.predict(small, verbose=0)
    kra.eject(model)
difference = np.abs(outputs["factored"] - outputs["materialized"]).max()
print(f"largest difference {difference:.0e}")
