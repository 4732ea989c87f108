"""
# Preference tuning: DPO with the base model as the reference

A language model that writes what it should may still write it in another way
than you would. Direct preference optimization (Rafailov et al., NeurIPS 2023)
learns from pairs of texts, of which a person preferred the first. The loss of a
pair is

    -log sigmoid(beta * (margin - reference margin))

where a margin is the log likelihood of the better text minus that of the worse
one. The reference is the model as it was before. With full fine-tuning it is a
second model in memory. With an adapter it is the same model while
`kra.disabled` is in force, so it costs no memory and a forward pass a step.

On this page SmolLM2-135M first learns to describe guesthouses, as in
[the guide on language models](causal_lm.md). Then it learns an editor's taste:
a description begins with the name of the place.
"""

import os
import sys

import keras

import keras_randadapt as kra

sys.path.append(os.path.join(os.path.dirname(__file__), "../examples"))
import guesthouses
import language_model
import meanings
import preferences
import text_scores

EPOCHS = int(os.environ.get("GUIDE_EPOCHS", 2))
EXAMPLES = int(os.environ.get("GUIDE_EXAMPLES", 64))
PAIRS = EXAMPLES // 2
HELD_OUT = 16
LENGTH = 84

"""
## First, a model that does the task

The adapter of the first stage is merged. The merged model is the base model of
the second stage, and so the reference.
"""

lm = language_model.load("smollm2")
rows = meanings.read_csv(guesthouses.FILE)
split = meanings.split(rows, train=EXAMPLES, held_out=HELD_OUT)


def compiled(model, rate, **arguments):
    keras.utils.set_random_seed(0)
    model.compile(optimizer=keras.optimizers.AdamW(rate), **arguments)
    return model


x, y, weight = lm.examples(
    [meanings.prompt(meaning) for meaning, _ in split.train],
    [text for _, text in split.train],
    LENGTH,
)
kra.inject(lm.model, kra.LoRA(8, seed=0))
compiled(lm.model, 3e-3, loss=language_model.loss(), sampler="greedy").fit(
    x,
    y,
    sample_weight=weight,
    batch_size=4,
    epochs=EPOCHS,
    shuffle=False,
    verbose=0,
)
kra.merge(lm.model)

"""
## Pairs

The sample's grammar writes several texts about each meaning. Where two of them
differ in their beginnings, the better one begins with the name. No meaning of a
training pair is among the held-out ones.
"""


def name_first(meaning, text):
    return text.startswith(meanings.attributes(meaning)["name"])


by_meaning = {}
for meaning, text in guesthouses.generate(seed=1, meanings=150, texts=6):
    if meaning not in split.held_out:
        sides = by_meaning.setdefault(meaning, ([], []))
        sides[not name_first(meaning, text)].append(text)
triples = [
    (meanings.prompt(meaning), better[0], worse[0])
    for meaning, (better, worse) in by_meaning.items()
    if better and worse
]
held_out, train = triples[:HELD_OUT], triples[HELD_OUT:][:PAIRS]
for prompt, better, worse in train[:1]:
    print(prompt, "\n better:", better, "\n worse: ", worse)


def arrays(triples):
    return preferences.pairs(lm, *zip(*triples), length=LENGTH)


"""
## The loss

`DPO` is a `keras.Model` around the language model. `fit` works on it because it
overrides `compute_loss`, which is the whole method:

    def compute_loss(self, x=None, y=None, y_pred=None, ...):
        with kra.disabled(self.lm):
            reference = ops.stop_gradient(self(x, training=False))
        gain = y_pred - reference
        margin = gain[:, 0] - gain[:, 1]
        nats = -y_pred[:, 0] / ops.sum(x["weights"][:, 0], axis=-1)
        loss = ops.softplus(-self.strength * margin) + self.anchor * nats
        return ops.mean(loss)

[preferences.py](../examples/preferences.py) has the class. `self(x)` gives the
log likelihoods of the two texts of each pair. The block may stand inside a
compiled step, on every backend.

The second term is an anchor (Pang et al., NeurIPS 2024). The margin grows as
well where both texts get less likely. A first version of this page had the
margin alone and a rate of 1e-3. All of its texts began with the name, and then
several of them went on and on. With the anchor and half of the rate they end.
"""

kra.inject(lm.model, kra.LoRA(8, seed=1))
dpo = preferences.DPO(lm.model, strength=0.1, anchor=1.0)


def judge():
    """Prints how many held-out pairs and written texts are as they should."""
    x = arrays(held_out)
    likelihoods = dpo.predict(x, batch_size=4, verbose=0)
    # Long texts are less likely, so the likelihood is that of a token.
    likelihoods = likelihoods / x["weights"].sum(axis=-1)
    preferred = (likelihoods[:, 0] > likelihoods[:, 1]).mean()
    texts = lm.generate(list(map(meanings.prompt, split.held_out)), LENGTH)
    first = [name_first(*pair) for pair in zip(split.held_out, texts)]
    said = text_scores.scores(texts, split.held_out)["mentioned"]
    print(
        f"better text likelier: {100 * preferred:.0f} % of held-out pairs, "
        f"name first: {100 * sum(first) / len(first):.0f} % of written texts, "
        f"values said: {100 * said:.0f} %, "
        f"words: {sum(len(text.split()) for text in texts) / len(texts):.0f}"
    )
    return texts


before = judge()

"""
## Train

The first loss of the margin is log 2, as the adapter is zero and the policy is
the reference. The rate is a sixth of the first stage's.
"""

compiled(dpo, 5e-4)
history = dpo.fit(arrays(train), batch_size=4, epochs=EPOCHS, verbose=0)
print("loss", *(f"{value:.3f}" for value in history.history["loss"]))
after = judge()

"""
## Before and after

The beginnings should be others, and the rest should not.
"""

for meaning, old, new in list(zip(split.held_out, before, after))[:4]:
    print(f"{meaning}\n  before: {old}\n  after:  {new}")

"""
## Ship it

The adapter file belongs to the merged model of the first stage, and
`load_adapter` warns where it is loaded into another one. `kra.merge` folds it
in as well.

Both adapters can be kept instead. Then nothing is merged, the second one is
injected under another name, and
`kra.set_active(model, ["first", "style"], train="style")` comes before
training. The reference is computed inside of `kra.active(model, "first")`.
"""

kra.save_adapter(lm.model, "style.safetensors")
print(f"{os.path.getsize('style.safetensors'):,} bytes")
os.remove("style.safetensors")
