"""Answers sentences of several tasks in one batch, each by its own adapter.

`many_tasks.py` starts this in its own process, on another backend than the one
that trained:

    KERAS_BACKEND=tensorflow python examples/serve_tasks.py FOLDER --export
"""

import argparse
import json
import pathlib
import time

import classifier
import keras
import numpy as np

import keras_randadapt as kra

TOLERANCE = 1e-4

# The files that processes exchange through a folder.
ADAPTERS = "adapters"
QUESTIONS = "questions.json"
SAVED_MODEL = "saved_model"


def load(questions):
    """The base model, with another head than in training, and its tokens."""
    # The seed differs, since the files have all weights that were trained.
    model, _, preprocessor = classifier.load(
        "minilm", num_classes=2, sequence_length=questions["length"], seed=1234
    )
    return model, classifier.tokenize(preprocessor, questions["sentences"])


def softmax(logits):
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def alone(folder, questions):
    """The probabilities of each sentence, one adapter at a time."""
    model, tokens = load(questions)
    found = np.zeros((len(questions["tasks"]), 2))
    seconds = 0.0
    for task in dict.fromkeys(questions["tasks"]):
        kra.load_adapter(model, folder / ADAPTERS / f"{task}.safetensors")
        rows = np.array(questions["tasks"]) == task
        part = {name: value[rows] for name, value in tokens.items()}
        found[rows] = classifier.probabilities(model, part)
        start = time.perf_counter()
        classifier.probabilities(model, part)
        seconds += time.perf_counter() - start
        kra.eject(model)
    print(
        f"  one adapter after the other: {1e3 * seconds:.0f} ms, "
        "loading and compiling apart"
    )
    return found


def check(received, questions, where):
    """Raises `ValueError` if probabilities differ from those expected."""
    error = float(np.max(np.abs(received - questions["probabilities"])))
    if not error <= TOLERANCE:
        raise ValueError(
            f"Answers {where} differ by {error:.1e} from those of each adapter "
            f"alone; {TOLERANCE:.0e} is allowed."
        )
    print(
        f"  {len(received)} answers {where} equal those of each adapter alone "
        f"on {questions['backend']}, to {error:.0e}"
    )


def serve(folder, export=False):
    """Answers all questions in one batch, and checks the answers.

    Args:
        folder: The folder of `many_tasks.py`.
        export: Whether to write one SavedModel of all adapters.
    """
    questions = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
    model, tokens = load(questions)
    with kra.serving.AdapterBank(model, folder / ADAPTERS) as bank:
        tasks = questions["tasks"]
        count = len(tasks)
        answers = bank.predict(tokens, adapters=tasks, batch_size=count)
        check(
            softmax(answers),
            questions,
            f"in one batch on {keras.config.backend()}",
        )
        start = time.perf_counter()
        bank.predict(tokens, adapters=tasks, batch_size=count)
        elapsed = time.perf_counter() - start
        print(f"  one batch of {len(bank)} tasks: {1e3 * elapsed:.0f} ms")
        if export:
            # KerasHub's position embedding needs a known length.
            signature = {
                name: keras.InputSpec(
                    shape=(None, value.shape[1]), dtype="int32", name=name
                )
                for name, value in tokens.items()
            }
            bank.export(folder / SAVED_MODEL, input_signature=[signature])
            np.savez(folder / "tokens.npz", **tokens)
            print(f"  exported to {folder / SAVED_MODEL}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--export", action="store_true")
    arguments = parser.parse_args()
    serve(arguments.folder, arguments.export)


if __name__ == "__main__":
    main()
