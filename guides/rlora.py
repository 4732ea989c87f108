"""
# RLoRA: fine-tuning with two vectors a layer

RLoRA (Lei, Qian and Cheung, Findings of ACL 2024) adapts a layer by

    delta(x) = beta * B (alpha * (A x))

where `A` and `B` are randomized Walsh-Hadamard transforms: random sign flips,
a fast orthogonal transform, and a choice of rows. They are frozen, and a seed
rebuilds them, so they are neither trained nor stored. Two vectors are trained:
`alpha` of length `rank`, and `beta` as long as the output.

**Choose it** when adapters must be small (many tasks on one model, adapters
that travel), or when there are few examples: a model with fewer trainable
numbers has less room to overfit, and the paper's PAC-Bayes term uses the
examples to say which of them may move.

**Choose another one** when steps must be as cheap as possible (LoRA multiplies
by two thin matrices, RLoRA by two transforms), or when there is data enough to
use a full-rank update (RandLoRA).
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

EPOCHS = int(os.environ.get("GUIDE_EPOCHS", 10))
EXAMPLES = int(os.environ.get("GUIDE_EXAMPLES", 200))

"""
## A pretrained encoder and 200 sentences

MiniLM, a BERT of 6 layers, comes inside a Python package, and so do sentences
from film reviews. With a network, `classifier.load` takes any KerasHub preset.
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
## Inject

The query and value projections get an adapter each. The head is trained along,
and the rest is frozen. The adapted model computes what the base model computes
until it is trained, because `beta` starts at zero.
"""

report = kra.inject(model, kra.RLoRA(rank=384, seed=0), keep_trainable="logits")
print(report)

"""
## Train

Scaling vectors want a learning rate far above that of a head, so the two are
optimized in groups. `PACBayes` adds the paper's regularizer: at the end of
every epoch it takes 100 training examples, computes the gradient of the loss
of each, and from then on penalizes moves of the weights along them.
"""


def train(callbacks):
    keras.utils.set_random_seed(0)
    model.compile(
        optimizer=kra.optimizers.learning_rate_groups(
            model, "adamw", adapter=3e-2, head=3e-3
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x,
        y,
        validation_data=validation,
        epochs=EPOCHS,
        callbacks=callbacks,
        verbose=0,
    )
    return history.history


pac_bayes = kra.callbacks.PACBayes(x, y, strength=1e-3, samples=100)
history = train([pac_bayes])
for name in ("loss", "pac_bayes", "accuracy", "val_accuracy"):
    print(name.ljust(13), " ".join(f"{value:.3f}" for value in history[name]))

"""
## Where the information sits

The callback's estimates say how much each layer's adapter has learned about
the examples. The picture is the paper's Figure 3, layers by epochs.
"""

pac_bayes.plot()
plt.tight_layout()

"""
## Without the term

The same run is repeated without the callback, from the same start. With 200
sentences and one seed, a difference of a few points in the last line is noise.
`benchmarks/quality/rlora.py` compares methods over paired seeds.
"""

kra.save_adapter(model, "rlora.safetensors")
kra.eject(model)
kra.inject(model, kra.RLoRA(rank=384, seed=0), keep_trainable="logits")
without = train([])
for name, one in (("with", history), ("without", without)):
    print(
        f"{name.ljust(8)} training {one['accuracy'][-1]:.3f}, "
        f"validation {one['val_accuracy'][-1]:.3f}"
    )

"""
## Ship it

The file holds the trained vectors, the head and the configuration. It loads on
every backend. `merge` folds the update into the kernels, and the model is
plain Keras again.
"""

print(f"{os.path.getsize('rlora.safetensors'):,} bytes")
kra.eject(model)
kra.load_adapter(model, "rlora.safetensors")
before = model.predict(validation[0], verbose=0)
kra.merge(model)
after = model.predict(validation[0], verbose=0)
print(f"merging changed logits by {np.abs(after - before).max():.0e}")
os.remove("rlora.safetensors")
