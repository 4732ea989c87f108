"""Loads an adapter file on any backend, checks it, merges it and exports.

`finetune_text_classifier.py` starts this in its own process, on another backend
than the one that trained:

    KERAS_BACKEND=tensorflow python examples/serve_adapter.py FOLDER --export
"""

import argparse
import json
import pathlib

import classifier
import keras
import numpy as np

import keras_randadapt as kra

TOLERANCE = 1e-4

# The files that processes exchange through a folder.
ADAPTER = "adapter.safetensors"
TASK = "task.json"
QUESTIONS = "questions.json"
SAVED_MODEL = "saved_model"


def check(model, tokens, expected):
    """Predicts and compares with the probabilities of another process.

    Args:
        model: The classifier.
        tokens: The tokens of some texts.
        expected: The expected probabilities.

    Returns:
        The largest difference.

    Raises:
        ValueError: If the difference is above `TOLERANCE`.
    """
    received = classifier.probabilities(model, tokens)
    error = float(np.max(np.abs(received - np.asarray(expected))))
    if not error <= TOLERANCE:
        raise ValueError(
            f"Predictions on {keras.backend.backend()} differ by {error:.1e} "
            f"from those that were stored; {TOLERANCE:.0e} is allowed."
        )
    return error


def export(model, tokens, task, folder):
    """Writes the merged model as a SavedModel, and questions for it.

    Args:
        model: The classifier, after `kra.merge`.
        tokens: The tokens of the task's sentences.
        task: The dict that the training process wrote.
        folder: The folder for both.
    """
    # KerasHub's position embedding needs a known length.
    signature = {
        name: keras.InputSpec(
            shape=(None, value.shape[1]), dtype="int32", name=name
        )
        for name, value in tokens.items()
    }
    model.export(
        str(folder / SAVED_MODEL), input_signature=[signature], verbose=False
    )
    questions = {
        "sentences": task["sentences"],
        "label_names": task["label_names"],
        "tokens": {name: value.tolist() for name, value in tokens.items()},
        "probabilities": classifier.probabilities(model, tokens).tolist(),
    }
    (folder / QUESTIONS).write_text(json.dumps(questions), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--export", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    backend = keras.backend.backend()

    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    # The seed is another than in training, since the file has all weights.
    model, _, preprocessor = classifier.load(
        task["preset"],
        num_classes=len(task["label_names"]),
        sequence_length=task["sequence_length"],
        seed=1234,
    )
    tokens = classifier.tokenize(preprocessor, task["sentences"])
    kra.load_adapter(model, folder / ADAPTER)
    error = check(model, tokens, task["probabilities"])
    print(
        f"  {len(task['sentences'])} predictions on {backend} equal those on "
        f"{task['backend']} to {error:.0e}"
    )
    kra.merge(model)
    error = check(model, tokens, task["probabilities"])
    print(f"  after the merge they equal them to {error:.0e}")
    if arguments.export:
        export(model, tokens, task, folder)
        print(f"  exported to {folder / SAVED_MODEL}")


if __name__ == "__main__":
    main()
