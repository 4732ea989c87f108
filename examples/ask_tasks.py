"""Asks the SavedModel of all tasks, in a process that imports only TensorFlow.

    python examples/ask_tasks.py FOLDER

`serve_tasks.py` writes the folder. Each sentence comes with the name of its
task, and the answers must be those of the task's adapter alone.
"""

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf

TOLERANCE = 1e-4


def main():
    folder = pathlib.Path(sys.argv[1])
    questions = json.loads(
        (folder / "questions.json").read_text(encoding="utf-8")
    )
    model = tf.saved_model.load(str(folder / "saved_model"))
    serve = model.signatures["serving_default"]
    tokens = {
        name: tf.constant(value, tf.int32)
        for name, value in np.load(folder / "tokens.npz").items()
    }
    tasks = questions["tasks"]
    logits = serve(adapter=tf.constant(tasks), **tokens)["output_0"]
    answers = tf.nn.softmax(logits).numpy()
    error = np.max(np.abs(answers - questions["probabilities"]))
    if not error <= TOLERANCE:
        raise ValueError(
            f"The SavedModel answers otherwise than the adapters: {error:.1e} "
            f"apart, {TOLERANCE:.0e} allowed."
        )
    if "keras_randadapt" in sys.modules:
        raise ValueError("This process was to do without keras_randadapt.")
    print(
        f"  {len(tasks)} answers of the SavedModel in one batch, to "
        f"{error:.0e}, without keras_randadapt; among them:"
    )
    for task in dict.fromkeys(tasks):
        row = tasks.index(task) + 1
        label = "positive" if answers[row, 1] > 0.5 else "negative"
        sentence = questions["sentences"][row]
        shown = sentence if len(sentence) < 50 else f"{sentence[:47]}..."
        print(f'  {task:<11} {label}  "{shown}"')


if __name__ == "__main__":
    main()
