"""Loads a language model's adapter file, checks it, merges it and exports.

`finetune_causal_lm.py` starts this in its own process, on TensorFlow:

    KERAS_BACKEND=tensorflow python examples/serve_causal_lm.py FOLDER

An adapter that was trained over quantized weights is loaded into the float
model. A merge into quantized weights would round the update to their grid.
"""

import argparse
import json
import pathlib

import finetune_causal_lm as program
import keras
import language_model
import meanings
import numpy as np

import keras_randadapt as kra

#: The largest difference of log likelihoods, in nats a text.
TOLERANCE = 1e-2
FULL_PRECISION = (None, "float32")
SAVED_MODEL = "saved_model"
QUESTIONS = "questions.json"


def check(lm, task):
    """Compares log likelihoods with those of the process that trained.

    Args:
        lm: A `language_model.LanguageModel`.
        task: The dict that the training process wrote.

    Returns:
        The largest difference.

    Raises:
        ValueError: If it is above `TOLERANCE`, and both models have the same
            base weights.
    """
    prompts = [meanings.prompt(meaning) for meaning, _ in task["pairs"]]
    texts = [text for _, text in task["pairs"]]
    received = lm.log_likelihoods(*lm.examples(prompts, texts, task["length"]))
    error = float(np.max(np.abs(received - task["log_likelihoods"])))
    rounded = task["quantize"] or task["dtype"] not in FULL_PRECISION
    if not rounded and not error <= TOLERANCE:
        raise ValueError(
            f"Log likelihoods on {keras.backend.backend()} differ by "
            f"{error:.1e} from those that were stored; {TOLERANCE:.0e} is "
            "allowed."
        )
    return error


def export(lm, task, folder):
    """Writes the merged model as a SavedModel, and a question for it.

    Args:
        lm: A `language_model.LanguageModel`, after `kra.merge`.
        task: The dict that the training process wrote.
        folder: The folder for both.
    """
    length = task["length"]
    signature = {
        name: keras.InputSpec(shape=(None, length), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask")
    }
    lm.model.export(
        str(folder / SAVED_MODEL), input_signature=[signature], verbose=False
    )
    (ids,) = lm.generated_ids([task["prompt"]], length)
    question = {
        "prompt": task["prompt"],
        "prompt_ids": task["prompt_ids"],
        "length": length,
        "end": lm.end,
        "text": lm.decode(ids).strip(),
        "text_ids": ids,
        "exact": task["dtype"] in FULL_PRECISION,
    }
    (folder / QUESTIONS).write_text(json.dumps(question), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    backend = keras.backend.backend()

    task = json.loads((folder / program.TASK).read_text(encoding="utf-8"))
    lm = language_model.load(task["preset"], task["dtype"])
    kra.load_adapter(
        lm.model,
        folder / program.ADAPTER,
        check_base="ignore" if task["quantize"] else None,
    )
    count = len(task["pairs"])
    print(
        f"  log likelihoods of {count} texts on {backend} are those on "
        f"{task['backend']}, up to {check(lm, task):.0e} nats"
    )
    kra.merge(lm.model)
    print(f"  after the merge, up to {check(lm, task):.0e} nats")
    export(lm, task, folder)
    print(f"  exported to {folder / SAVED_MODEL}")


if __name__ == "__main__":
    main()
