"""
# A thousand tenants on one encoder

A service has a thousand customers, and each wants a classifier of their own.
With full copies these would be a thousand models. With RLoRA a customer's
adapter is a few vectors, and the random bases are common to all: a batch of 32
sentences of 32 customers costs one pass through one model.

This guide trains a thousand adapters in a loop, serves them from one
`AdapterBank`, and exports the encoder with all of them as one SavedModel.
"""

import collections
import os
import pathlib
import re
import subprocess
import sys
import time

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_randadapt as kra

sys.path.append(os.path.join(os.path.dirname(__file__), "../examples"))
import classifier
import scored_sentences

TENANTS = int(os.environ.get("GUIDE_TENANTS", 1000))
EPOCHS = int(os.environ.get("GUIDE_EPOCHS", 8))
TRAIN, TEST = 24, 12

"""
## A topic each

A customer's topic is a word, such as "battery" or "documentary". Half of the
sentences had the word, which is then cut out of them; the other half never had
it. The classifier is to tell which sentence the word is missing from. The
sentences are those of film reviews, product reviews, editorials and tweets
that come with a Python package.
"""

archive = scored_sentences.fetch()
sentences = [
    text
    for corpus in scored_sentences.CORPORA
    for text, _ in scored_sentences.read(archive, corpus)
]
words = [set(re.findall("[a-z]{4,}", text.lower())) for text in sentences]
counts = collections.Counter(word for found in words for word in found)
half = (TRAIN + TEST) // 2
topics = [w for w, n in counts.most_common() if n >= half][-TENANTS:]
print(f"{len(sentences):,} sentences, {len(topics):,} topics, among them:")
print(", ".join(topics[:: max(len(topics) // 12, 1)]))


def examples(topic, seed=0):
    """Texts and labels of a topic, those of the test at the end."""
    rng = np.random.default_rng(seed)
    places = {True: [], False: []}
    for place in rng.permutation(len(sentences)):
        places[topic in words[place]].append(place)
    cut = re.compile(rf"\b{topic}\b", re.IGNORECASE)
    texts, labels = [], []
    for positive, negative in zip(places[True][:half], places[False]):
        texts += [cut.sub("", sentences[positive]), sentences[negative]]
        labels += [1, 0]
    return texts, np.array(labels)


"""
## A thousand adapters in a loop

The model is injected and compiled once. For each customer its trainable weights
and the optimizer go back to their start, so nothing is traced again.
`save_adapter` writes the trained vectors and the head.
"""

model, backbone, preprocessor = classifier.load(
    "minilm", num_classes=2, sequence_length=32
)
report = kra.inject(model, kra.RLoRA(384, seed=0), keep_trainable="logits")
print(report)
optimizer = kra.optimizers.learning_rate_groups(
    model, "adamw", adapter=3e-2, head=1e-2
)
model.compile(
    optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
)
optimizer.build(model.trainable_variables)
start = [
    (variable, keras.ops.convert_to_numpy(variable))
    for variable in [*model.trainable_variables, *optimizer.variables]
]

folder = pathlib.Path("tenants")
folder.mkdir(exist_ok=True)
tests = {}
began = time.perf_counter()
for topic in topics:
    texts, labels = examples(topic)
    tokens = classifier.tokenize(preprocessor, texts)
    train = {name: value[:TRAIN] for name, value in tokens.items()}
    tests[topic] = (
        {name: value[TRAIN:] for name, value in tokens.items()},
        labels[TRAIN:],
    )
    for variable, value in start:
        variable.assign(value)
    model.fit(train, labels[:TRAIN], batch_size=TRAIN, epochs=EPOCHS, verbose=0)
    kra.save_adapter(model, folder / f"{topic}.safetensors")
seconds = time.perf_counter() - began
size = sum(file.stat().st_size for file in folder.iterdir())
print(
    f"{len(topics):,} adapters in {seconds / 60:.0f} minutes, "
    f"{seconds / len(topics):.1f} s each; {size / 1e6:.0f} MB of files"
)
kra.eject(model)

"""
## One bank

The folder's files are the bank's tenants, named by their stems. The bank is as
strict as `load_adapter`: it refuses another seed, another site or other base
weights.
"""

began = time.perf_counter()
bank = kra.serving.AdapterBank(model, folder, capacity=10_000)
print(f"opened in {time.perf_counter() - began:.1f} s")
print(bank.status())

"""
## A request of many tenants

Each example names its tenant. `None` is the base model.
"""

names = topics[: 32 // 2] + topics[-32 // 2 :]
batch = {
    name: np.concatenate([tests[topic][0][name][:1] for topic in names])
    for name in next(iter(tests.values()))[0]
}
logits = bank.predict(batch, adapters=names)
for topic, (no, yes) in list(zip(names, logits))[:5]:
    print(f"{topic:<14} {1 / (1 + np.exp(no - yes)):.2f}")

"""
Every topic's test sentences go through the bank, in batches of 32 that have
about three tenants each. They are compared with a head alone on the frozen
encoder, which learns from the same 24 sentences of a topic.
"""

features = keras.Model(model.input, model.get_layer("mean_of_tokens").output)


def head_alone(train, labels, test):
    """Answers of a ridge classifier on the frozen encoder's features."""
    x, y = train - train.mean(0), 2.0 * labels - 1
    gram = x @ x.T + 0.1 * np.trace(x @ x.T) / len(x) * np.eye(len(x))
    return (test - train.mean(0)) @ x.T @ np.linalg.solve(gram, y) > 0


correct, base = [], []
for first in range(0, len(topics), 100):
    part = topics[first : first + 100]
    tokens = {
        name: np.concatenate([tests[topic][0][name] for topic in part])
        for name in batch
    }
    owners = [topic for topic in part for _ in tests[topic][1]]
    answers = bank.predict(tokens, adapters=owners).argmax(-1)
    for topic, own in zip(part, np.split(answers, len(part))):
        correct.append(np.mean(own == tests[topic][1]))
bank.close()
for topic in topics:
    texts, labels = examples(topic)
    tokens = classifier.tokenize(preprocessor, texts)
    found = features.predict(tokens, batch_size=TRAIN + TEST, verbose=0)
    own = head_alone(found[:TRAIN], labels[:TRAIN], found[TRAIN:])
    base.append(np.mean(own == labels[TRAIN:]))
for what, values in (("the adapters", correct), ("a head alone", base)):
    error = np.std(values) / len(values) ** 0.5
    print(f"{what}: {100 * np.mean(values):.1f} % +- {100 * error:.1f}")

plt.hist(
    [100 * np.array(correct), 100 * np.array(base)],
    bins=np.linspace(0, 100, TEST + 1),
    label=["an adapter each", "a head alone each"],
)
plt.xlabel("test accuracy of a tenant (%)")
plt.ylabel("tenants")
plt.legend()

"""
## One SavedModel

On the TensorFlow backend `export` writes the encoder and all tenants together.
The signature has one input more, `adapter`, which is a string for each example.
An unknown name is an error, never another tenant's answer. The process below
has another backend than this guide's, so it is started anew.
"""

EXPORT = """
import pathlib, sys
import keras
import keras_randadapt as kra
sys.path.append(sys.argv[1])
import classifier

model, _, _ = classifier.load("minilm", num_classes=2, sequence_length=32)
with kra.serving.AdapterBank(model, pathlib.Path("tenants")) as bank:
    spec = {
        name: keras.InputSpec(shape=(None, 32), dtype="int32", name=name)
        for name in model.input
    }
    bank.export("saved_model", input_signature=[spec])
"""
examples_folder = str(pathlib.Path(classifier.__file__).parent)
environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
subprocess.run(
    [sys.executable, "-c", EXPORT, examples_folder],
    env=environment,
    check=True,
)
request = {name: value.astype("int32") for name, value in batch.items()}
np.savez("request.npz", adapter=np.array(names, "S"), **request)

ASK = """
import numpy as np
import tensorflow as tf

model = tf.saved_model.load("saved_model")
request = dict(np.load("request.npz"))
given = {name: tf.constant(value) for name, value in request.items()}
np.save("answers.npy", model.signatures["serving_default"](**given)["output_0"])
"""
subprocess.run(
    [sys.executable, "-c", ASK],
    env=environment,
    check=True,
)
error = np.abs(np.load("answers.npy") - logits).max()
size = sum(f.stat().st_size for f in pathlib.Path("saved_model").rglob("*.*"))
print(f"{len(names)} answers of TensorFlow alone, equal to {error:.0e}")
print(f"{size / 1e6:.0f} MB, of which the tenants are a part")
