"""Generates with an exported SavedModel, in a process with TensorFlow alone.

    python examples/ask_language_model.py FOLDER

`serve_causal_lm.py` writes the SavedModel and the file `questions.json`, which
has the tokens of a prompt and of the text that the merged model writes after
it. The SavedModel must write the same tokens. In 16 bits it may differ, because
the model generates with a cache and the SavedModel does not.
"""

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf


def generate(model, prompt, length, end):
    """Writes on after a prompt, always with the likeliest token.

    Args:
        model: The SavedModel.
        prompt: A list of token ids.
        length: The number of tokens of the model's inputs.
        end: The token id that ends a text.

    Returns:
        The list of token ids after the prompt, without `end`.
    """
    ids = np.zeros((1, length), "int32")
    ids[0, : len(prompt)] = prompt
    for position in range(len(prompt), length):
        mask = np.arange(length)[None] < position
        logits = model.serve(
            {
                "token_ids": tf.constant(ids),
                "padding_mask": tf.constant(mask.astype("int32")),
            }
        )
        token = int(tf.argmax(logits[0, position - 1]))
        if token == end:
            return ids[0, len(prompt) : position].tolist()
        ids[0, position] = token
    return ids[0, len(prompt) :].tolist()


def main():
    folder = pathlib.Path(sys.argv[1])
    question = json.loads(
        (folder / "questions.json").read_text(encoding="utf-8")
    )
    model = tf.saved_model.load(str(folder / "saved_model"))
    written = generate(
        model, question["prompt_ids"], question["length"], question["end"]
    )
    same = written == question["text_ids"]
    if question["exact"] and not same:
        raise ValueError(
            "The SavedModel writes otherwise than the model: "
            f"{written}, and expected is {question['text_ids']}."
        )
    if "keras_randadapt" in sys.modules:
        raise ValueError("This process was to do without keras_randadapt.")
    print("  " + question["prompt"].replace("\n", "\n  "), question["text"])
    print(
        f"  {len(written)} tokens written, {'as' if same else 'not as'} before "
        "the export, without keras_randadapt"
    )


if __name__ == "__main__":
    main()
