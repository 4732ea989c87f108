"""
# A language model: fine-tune, generate, merge, export

SmolLM2-135M is a language model of 30 layers that comes inside a Python
package, so this page needs no model hub. It gets attributes of a guesthouse and
is to write a sentence or two about it. Before training it writes about
something else, in circles. 64 examples change that, in a file of 230 kB.

With a network, `language_model.load` takes any causal language model of
KerasHub in place of "smollm2", such as `load("gemma3_1b", quantize="int4")`.
The program [finetune_causal_lm.py](../examples/finetune_causal_lm.py) does all
of this page from the command line, for any preset and any file of E2E's form:

    python examples/finetune_causal_lm.py --preset gemma3_1b --quantize int4

`pip install sacrebleu rouge-score` gets what scores the texts.
"""

import os
import shutil
import sys

import keras

import keras_randadapt as kra

sys.path.append(os.path.join(os.path.dirname(__file__), "../examples"))
import finetune_causal_lm
import guesthouses
import language_model
import meanings
import text_scores

EPOCHS = int(os.environ.get("GUIDE_EPOCHS", 2))
EXAMPLES = int(os.environ.get("GUIDE_EXAMPLES", 64))
HELD_OUT = 16
LENGTH = 84

"""
## The model and the data

`lm.model` is a `keras_hub.models.CausalLM` without a preprocessor: it takes
tokens, and the arrays of this page are made by `lm.examples`. The texts about
guesthouses are this project's own, and a [grammar](../examples/guesthouses.py)
wrote them. Texts for training and for judging are about other combinations of
attributes, and the grammar is the same. The dataset E2E has texts that people
wrote, and its files work in place of the sample.
"""

lm = language_model.load("smollm2")
rows = meanings.read_csv(guesthouses.FILE)
split = meanings.split(rows, train=EXAMPLES, held_out=HELD_OUT)
for meaning, text in split.train[:2]:
    print(f"{meaning}\n  {text}")

"""
## Before
"""

prompts = [meanings.prompt(meaning) for meaning in split.held_out]
before = lm.generate(prompts, LENGTH)
for meaning, text in list(zip(split.held_out, before))[:3]:
    print(f"{meaning}\n  {text}")

"""
## Train

`inject` finds the query and value projections. The prompt's tokens have weight
0, so the loss is that of the texts alone. Everything else is plain Keras.
"""

report = kra.inject(lm.model, kra.RLoRA(512, seed=0))
print(report)

x, y, weight = lm.examples(
    [meanings.prompt(meaning) for meaning, _ in split.train],
    [text for _, text in split.train],
    LENGTH,
)
keras.utils.set_random_seed(0)
lm.model.compile(
    optimizer=keras.optimizers.AdamW(5e-2),
    loss=language_model.loss(),
    sampler="greedy",
)
history = lm.model.fit(
    x,
    y,
    sample_weight=weight,
    batch_size=4,
    epochs=EPOCHS,
    shuffle=False,
    verbose=0,
)
print("loss", *(f"{value:.3f}" for value in history.history["loss"]))

"""
## After

The prompts are the same, and the adapter is in place.
"""

after = lm.generate(prompts, LENGTH)
for meaning, text in list(zip(split.held_out, after))[:3]:
    print(f"{meaning}\n  {text}")

"""
Four scores judge the texts, on a scale to 1. `bleu` compares runs of words with
the references, `chrf` runs of letters, and `rouge_l` words in their order.
`mentioned` is the share of the attributes' values that a text has, word for
word.
"""

for name, texts in (("before", before), ("after", after)):
    scores = text_scores.scores(texts, split.held_out)
    print(name.ljust(7), *(f"{k} {v:.2f} " for k, v in scores.items()))

"""
## Three methods, three seeds

The program ran with `--seeds 3`. Each seed has other examples, another order
and other random bases, and all are judged on the same held-out texts. `nats`
are those of a token of the held-out texts, and less is better. The rows of the
table are in [causal_lm.csv](../benchmarks/results/causal_lm.csv), and all of
them took 14 minutes of CPU time on two cores of a server (2026-11-30, JAX).
"""

results = os.path.join(
    os.path.dirname(__file__), "../benchmarks/results/causal_lm.csv"
)
runs = finetune_causal_lm.read_rows(results)
print(finetune_causal_lm.table(runs))

"""
Training gains this over the base model, with 95 % intervals over the seeds:
"""

print(finetune_causal_lm.gains(runs))

"""
The second row is the base model with three examples in each prompt. It needs no
training, and each request pays for the longer prompt. The rates were not
searched, so the table does not rank the methods.

## The file, the merge, the export

The file has what was trained. It loads on every backend, and `merge` makes the
model plain Keras again. A merged model can be exported: `export` writes a
SavedModel of the next token's logits. Keras has none on PyTorch.
[serve_causal_lm.py](../examples/serve_causal_lm.py) and
[ask_language_model.py](../examples/ask_language_model.py) generate with it in a
process that does not have this library, and [Serve it](../docs/serving.md)
leads to other engines.
"""

kra.save_adapter(lm.model, "guesthouses.safetensors")
print(f"{os.path.getsize('guesthouses.safetensors'):,} bytes")
kra.eject(lm.model)
kra.load_adapter(lm.model, "guesthouses.safetensors")
kra.merge(lm.model)
merged = lm.generate(prompts, LENGTH)
same = sum(one == other for one, other in zip(merged, after))
print(f"{same} of {len(after)} texts are the same after the merge")
os.remove("guesthouses.safetensors")

if keras.config.backend() in ("jax", "tensorflow"):
    signature = {
        name: keras.InputSpec(shape=(None, LENGTH), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask")
    }
    lm.model.export(
        "guesthouses_saved_model", input_signature=[signature], verbose=False
    )
    print(sorted(os.listdir("guesthouses_saved_model")))
    shutil.rmtree("guesthouses_saved_model")

"""
## Next

[Preference tuning](preference_tuning.md) takes a model like this one and
teaches it which of two right texts is the better one.
"""
