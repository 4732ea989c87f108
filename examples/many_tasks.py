"""One encoder, four tasks, one batch: what adapters of kilobytes are for.

A pretrained sentence encoder learns the sentiment of four kinds of text: film
reviews, product reviews, newspaper editorials and tweets. Each task has an
RLoRA adapter, a file of kilobytes. All four then answer in one batch, each
sentence by the adapter of its task. The same files do so on another backend,
and in one TensorFlow SavedModel, which takes the task's name as an input.

    python examples/many_tasks.py            # 3 seeds, 16 epochs
    python examples/many_tasks.py --quick    # 2 seeds, 6 epochs

Beside RLoRA stand two others: a head alone on the frozen encoder, and Keras's
own LoRA. Both LoRAs begin with the head that was trained alone, which is cheap
and spares the encoder large first steps (Kumar et al., ICLR 2022).

The model is MiniLM, whose weights are in a Python package (see `minilm.py`).
The sentences are in another package (see `scored_sentences.py`). No account and
no model hub is needed. `finetune_text_classifier.py` is the program for one
task, your own model and your own data.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics

from running import Stages
from running import run_script

BACKENDS = ("jax", "tensorflow", "torch")
TASKS = ("films", "products", "editorials", "tweets")
#: Sentences whose scores are nearer to 0 are left out.
MARGIN = 0.5
LENGTH = 32
METHODS = ("head alone", "enable_lora(8)", "RLoRA(384)")
RLORA = METHODS[2]
# Sentences of each task that all processes answer.
ASKED = 8


def parse_arguments(arguments=None):
    """Parses the command line; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Defaults are in brackets."
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--seeds", type=int, help="training runs a task (3; quick 2)")
    add("--epochs", type=int, help="of both LoRAs (16; quick 6)")
    add("--train-examples", type=int, default=200, help="a task (200)")
    add("--validation-examples", type=int, default=400, help="a task (400)")
    add("--backend", choices=BACKENDS, default="jax", help="trains (jax)")
    add(
        "--second-backend",
        choices=BACKENDS,
        default="tensorflow",
        help="serves what was trained (tensorflow)",
    )
    add(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path("outputs/many_tasks"),
        help="where files are written (outputs/many_tasks)",
    )
    add("--quick", action="store_true", help="a short run")
    arguments = parser.parse_args(arguments)
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 3)
    arguments.epochs = arguments.epochs or (6 if arguments.quick else 16)
    return arguments


def load_tasks(arguments, preprocessor):
    """The `(train, validation)` arrays of each task, and sentences to ask."""
    import classifier
    import numpy as np
    import scored_sentences
    import text_data

    path = scored_sentences.fetch()
    data, asked = {}, {}
    for task in arguments.tasks:
        split = text_data.few_shot_split(
            scored_sentences.read(path, task, MARGIN),
            arguments.train_examples,
            arguments.validation_examples,
        )
        data[task] = []
        for examples in (split.train, split.validation):
            texts, labels = zip(*examples)
            tokens = classifier.tokenize(preprocessor, texts)
            data[task].append((tokens, np.array(labels)))
        asked[task] = [text for text, _ in split.validation[:ASKED]]
        print(
            f"  {task:<11} {len(split.train)} to train on, "
            f"{len(split.validation)} to validate on",
            flush=True,
        )
    return data, asked


class Trainer:
    """Trains one compiled model again and again from the same start.

    A model that is compiled again would be traced again, which takes longer
    than a task's training.

    Args:
        model: The model. Its trainable weights return to their values of now
            before each training.
        head: Its Dense layer.
        optimizer: A Keras optimizer.
    """

    def __init__(self, model, head, optimizer):
        import keras

        self._model, self._head = model, head
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        optimizer.build(model.trainable_variables)
        self._start = [
            (v, keras.ops.convert_to_numpy(v))
            for v in [*model.trainable_variables, *optimizer.variables]
        ]
        self._dropout = [
            v for v in model.variables if v.path.endswith("generator_state")
        ]

    def accuracy(self, data, epochs, seed, head=None):
        """Trains from the start and returns the validation accuracy.

        Args:
            data: Two tuples of inputs and labels: training and validation.
            epochs: The number of epochs.
            seed: The seed of dropout, order, and the head's first weights.
            head: Optional first weights of the head, a list of arrays.
        """
        import keras

        for variable, value in self._start:
            variable.assign(value)
        for number, variable in enumerate(self._dropout):
            variable.assign([seed, number])
        if head is None:
            draw = keras.initializers.GlorotUniform(seed)
            self._head.kernel.assign(draw(self._head.kernel.shape))
        else:
            self._head.set_weights(head)
        keras.utils.set_random_seed(seed)
        train, validation = data
        self._model.fit(*train, epochs=epochs, verbose=0)
        return self._model.evaluate(*validation, verbose=0)[1]


def train_heads(model, data, arguments):
    """Trains a head alone on the frozen features.

    Returns:
        The accuracies by task, and the trained weights of each head by task and
        seed.
    """
    import classifier
    import keras

    features = keras.Model(model.input, model.get_layer(classifier.HEAD).input)
    inputs = keras.Input(features.output.shape[1:])
    head = keras.layers.Dense(2)
    outputs = head(keras.layers.Dropout(0.1)(inputs))
    trainer = Trainer(
        keras.Model(inputs, outputs), head, keras.optimizers.AdamW(1e-2)
    )
    found, heads = {}, {}
    for task, parts in data.items():
        computed = [(features.predict(x, verbose=0), y) for x, y in parts]
        found[task] = []
        for seed in range(arguments.seeds):
            found[task].append(trainer.accuracy(computed, 40, seed))
            heads[task, seed] = head.get_weights()
        print(f"  {task:<11} {percent(found[task])} %", flush=True)
    return found, heads


def train_rlora(model, data, heads, arguments):
    """The same for RLoRA; the adapter files of the first seed are kept."""
    import classifier

    import keras_randadapt as kra

    # The classifier reads the tokens' states, which the pooler does not change.
    report = kra.inject(
        model,
        kra.RLoRA(384, seed=0),
        targets="all-linear",
        exclude="pooled_dense",
        keep_trainable=classifier.HEAD,
    )
    print(report)
    trainer = Trainer(
        model,
        model.get_layer(classifier.HEAD),
        kra.optimizers.learning_rate_groups(
            model, "adamw", adapter=2e-2, head=1e-3
        ),
    )
    found = {}
    for task, parts in data.items():
        found[task] = []
        for seed in range(arguments.seeds):
            found[task].append(
                trainer.accuracy(
                    parts, arguments.epochs, seed, heads[task, seed]
                )
            )
            if seed == 0:
                kra.save_adapter(model, adapter_file(arguments, task))
        print(f"  {task:<11} {percent(found[task])} %", flush=True)
    kra.eject(model)
    return found, report.adapter_parameters


def train_keras_lora(model, backbone, data, heads, arguments):
    """The same for Keras's own LoRA, on the layers that KerasHub chooses."""
    import classifier
    import training

    backbone.enable_lora(8)
    trained = backbone.trainable_weights
    trainer = Trainer(
        model,
        model.get_layer(classifier.HEAD),
        training.two_rates(trained, 1e-3, 1e-3),
    )
    found = {}
    for task, parts in data.items():
        found[task] = [
            trainer.accuracy(parts, arguments.epochs, seed, heads[task, seed])
            for seed in range(arguments.seeds)
        ]
        print(f"  {task:<11} {percent(found[task])} %", flush=True)
    return found, training.count(trained)


def train(arguments, stages):
    """Trains all tasks with all methods.

    Returns:
        The accuracies `{method: {task: [of each seed]}}`, the number of trained
        weights of each method, head apart, and the sentences to ask.
    """
    import classifier

    model, backbone, preprocessor = classifier.load("minilm", 2, LENGTH)
    data, asked = load_tasks(arguments, preprocessor)
    found, trained = {}, {METHODS[0]: 0}
    stages.begin("A head alone on the frozen encoder")
    found[METHODS[0]], heads = train_heads(model, data, arguments)
    stages.begin(f"RLoRA, an adapter a task, on {arguments.backend}")
    found[RLORA], trained[RLORA] = train_rlora(model, data, heads, arguments)
    stages.begin("Keras's own LoRA")
    found[METHODS[1]], trained[METHODS[1]] = train_keras_lora(
        model, backbone, data, heads, arguments
    )
    return found, trained, asked


def adapter_file(arguments, task):
    return arguments.output_dir / "adapters" / f"{task}.safetensors"


def percent(accuracies):
    """The mean of some accuracies, and their standard deviation if any."""
    mean = f"{100 * statistics.mean(accuracies):.1f}"
    if len(accuracies) < 2:
        return mean
    return f"{mean} +- {100 * statistics.stdev(accuracies):.1f}"


def answer(arguments, asked):
    """Asks all tasks in one batch, and each alone; writes what others check."""
    import serve_tasks

    questions = {
        "sentences": [text for texts in asked.values() for text in texts],
        "tasks": [task for task, texts in asked.items() for _ in texts],
        "backend": arguments.backend,
        "length": LENGTH,
    }
    questions["probabilities"] = serve_tasks.alone(
        arguments.output_dir, questions
    ).tolist()
    path = arguments.output_dir / serve_tasks.QUESTIONS
    path.write_text(json.dumps(questions), encoding="utf-8")
    serve_tasks.serve(arguments.output_dir)


def summarize(arguments, found, trained, stages):
    """Prints the table, the files and the times, and draws the picture."""
    import reporting

    rows = [
        (
            name,
            f"{trained[name]:,}",
            *(percent(found[name][task]) for task in arguments.tasks),
        )
        for name in METHODS
    ]
    print(
        f"\n== Validation accuracy in percent, {arguments.train_examples} "
        f"training sentences a task, {arguments.seeds} seeds\n"
    )
    print(reporting.format_table(("method", "trained", *arguments.tasks), rows))
    picture = arguments.output_dir / "accuracy.png"
    reporting.plot_tasks(found, picture)
    size = adapter_file(arguments, arguments.tasks[0]).stat().st_size
    error = 100 * (0.25 * 0.75 / arguments.validation_examples) ** 0.5
    print(
        f"\nThe weights of the head come on top. One accuracy has a standard "
        f"error of about\n{error:.1f} points, since there are "
        f"{arguments.validation_examples} validation sentences.\n\n"
        f"  an adapter file  {reporting.format_bytes(size)}, head included\n"
        f"  picture          {picture}"
    )
    print(f"\nSeconds:\n{stages.table()}")


def main():
    arguments = parse_arguments()
    # Keras reads this when it is imported, so the functions above import the
    # modules that need Keras.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    folder = arguments.output_dir
    # Files of an earlier run would be taken for tenants of this one.
    for name in ("adapters", "saved_model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "adapters").mkdir(parents=True)

    stages = Stages()
    stages.begin("The encoder and four kinds of sentences")
    found, trained, asked = train(arguments, stages)
    stages.begin("All tasks in one batch")
    answer(arguments, asked)
    second = arguments.second_backend
    stages.begin(f"The same files in a second process, on {second}")
    run_script("serve_tasks.py", folder, backend=second)
    stages.begin("One SavedModel for all tasks, without the library")
    run_script("serve_tasks.py", folder, "--export", backend="tensorflow")
    run_script("ask_tasks.py", folder, backend="tensorflow")
    stages.end()
    summarize(arguments, found, trained, stages)


if __name__ == "__main__":
    main()
