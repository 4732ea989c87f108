"""Asks an exported SavedModel, in a process that imports only TensorFlow.

    python examples/ask_saved_model.py SAVED_MODEL QUESTIONS

`serve_adapter.py` writes the file `QUESTIONS`. It has sentences, their tokens,
and the merged model's probabilities. The answers must be equal to these.
"""

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf

TOLERANCE = 1e-4


def main():
    directory, questions_file = sys.argv[1:]
    questions = json.loads(
        pathlib.Path(questions_file).read_text(encoding="utf-8")
    )
    model = tf.saved_model.load(directory)
    tokens = {
        name: tf.constant(value, tf.int32)
        for name, value in questions["tokens"].items()
    }
    answers = tf.nn.softmax(model.serve(tokens)).numpy()
    error = np.max(np.abs(answers - questions["probabilities"]))
    if not error <= TOLERANCE:
        raise ValueError(
            f"The SavedModel answers otherwise than the model: {error:.1e} "
            f"apart, {TOLERANCE:.0e} allowed."
        )
    if "keras_randadapt" in sys.modules:
        raise ValueError("This process was to do without keras_randadapt.")

    best = int(answers[0].argmax())
    print(f'  "{questions["sentences"][0]}"')
    print(
        f"  is {questions['label_names'][best]}, with probability "
        f"{answers[0, best]:.3f}"
    )
    print(
        f"  {len(answers)} sentences answered as before the export, to "
        f"{error:.0e}, without keras_randadapt"
    )


if __name__ == "__main__":
    main()
