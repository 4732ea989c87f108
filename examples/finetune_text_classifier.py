"""Few-shot sentiment with RLoRA, from training to serving.

A pretrained encoder learns from 200 movie-review sentences, once with RLoRA and
once with Keras's own LoRA. The RLoRA adapter is a file of kilobytes. A second
process on another backend loads it, merges it into the weights and exports a
TensorFlow SavedModel. A third process uses the SavedModel without this library.

    python examples/finetune_text_classifier.py            # 20 epochs
    python examples/finetune_text_classifier.py --quick    # 6 epochs
    python examples/finetune_text_classifier.py --preset roberta_base_en
    python examples/finetune_text_classifier.py --data reviews.csv

The default model is MiniLM, whose weights are in a Python package (see
`minilm.py`). The default data are sentences in another package (see
`scored_sentences.py`). No account and no model hub is needed.
"""

import argparse
import json
import os
import pathlib
import shutil

from running import Stages
from running import run_script

BACKENDS = ("jax", "tensorflow", "torch")
# Keras has no export to a SavedModel from torch.
EXPORTING_BACKENDS = ("jax", "tensorflow")
# The sentences whose predictions are compared across processes.
COMPARED = 64


def parse_arguments(arguments=None):
    """Parses the command line; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Defaults are in brackets."
    )
    add = parser.add_argument
    add(
        "--preset",
        default="minilm",
        help="minilm or any KerasHub preset of texts",
    )
    add("--data", help="a CSV file with a header row (movie reviews)")
    add("--text-column", help="the column of texts (text or sentence)")
    add("--label-column", default="label", help="the column of labels (label)")
    add("--backend", choices=BACKENDS, default="jax", help="trains (jax)")
    add(
        "--second-backend",
        choices=BACKENDS,
        help="loads what was trained (tensorflow; jax if that one trained)",
    )
    add("--train-examples", type=int, default=200, help="in all (200)")
    add("--validation-examples", type=int, help="in all (1000; quick 400)")
    add("--epochs", type=int, help="for each method (20; quick 6)")
    add("--sequence-length", type=int, help="in tokens (48; quick 32)")
    add("--rank", type=int, default=384, help="RLoRA's rank (384)")
    add("--adapter-rate", type=float, default=5e-2, help="RLoRA's rate (5e-2)")
    add("--lora-rank", type=int, default=8, help="enable_lora's rank (8)")
    add("--lora-rate", type=float, default=3e-3, help="its rate (3e-3)")
    add("--head-rate", type=float, default=3e-3, help="the head's (3e-3)")
    add("--seed", type=int, default=0, help="of head, dropout and order (0)")
    add(
        "--judge-by",
        choices=("validation", "tuning"),
        default="validation",
        help="tuning: other examples, for choosing rates and ranks",
    )
    add(
        "--ask",
        default="A warm, funny and beautifully acted film.",
        help="the sentence that the exported model is asked",
    )
    add(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path("outputs/finetune_text_classifier"),
        help="where files are written (outputs/finetune_text_classifier)",
    )
    add("--quick", action="store_true", help="a short run")
    arguments = parser.parse_args(arguments)
    if arguments.epochs is None:
        arguments.epochs = 6 if arguments.quick else 20
    if arguments.validation_examples is None:
        arguments.validation_examples = 400 if arguments.quick else 1000
    if arguments.sequence_length is None:
        arguments.sequence_length = 32 if arguments.quick else 48
    if arguments.second_backend is None:
        trained_on_tensorflow = arguments.backend == "tensorflow"
        arguments.second_backend = (
            "jax" if trained_on_tensorflow else "tensorflow"
        )
    return arguments


def load_data(arguments):
    """Reads the examples and returns a `Split` and the names of labels."""
    import scored_sentences
    import text_data

    if arguments.data:
        examples, label_names = text_data.read_csv(
            arguments.data, arguments.text_column, arguments.label_column
        )
    else:
        examples, label_names = (
            scored_sentences.load(),
            ["negative", "positive"],
        )
    split = text_data.few_shot_split(
        examples, arguments.train_examples, arguments.validation_examples
    )
    print(
        f"{len(examples):,} examples: {len(split.train)} to train on, "
        f"{len(split.validation)} to validate on"
    )
    return split, label_names


def train_both(arguments, split, label_names, stages):
    """Trains with both methods, each from the pretrained weights.

    Returns:
        The list of two `training.Run`, and the dict that other processes need:
        sentences, and the probabilities that the RLoRA model gives them.
    """
    import classifier
    import keras
    import numpy as np
    import serve_adapter
    import training

    held_out = getattr(split, arguments.judge_by)

    def load():
        keras.backend.clear_session()
        model, backbone, preprocessor = classifier.load(
            arguments.preset,
            len(label_names),
            arguments.sequence_length,
            arguments.seed,
        )
        data = []
        for examples in (split.train, held_out):
            texts, labels = zip(*examples)
            tokens = classifier.tokenize(preprocessor, texts)
            data.append((tokens, np.array(labels)))
        return model, backbone, preprocessor, data

    stages.begin(f"RLoRA on {arguments.backend}")
    model, _, preprocessor, data = load()
    rlora = training.train_rlora(
        model,
        data,
        arguments.epochs,
        rank=arguments.rank,
        adapter_rate=arguments.adapter_rate,
        head_rate=arguments.head_rate,
        path=arguments.output_dir / serve_adapter.ADAPTER,
    )
    sentences = [arguments.ask]
    sentences += [text for text, _ in split.validation[: COMPARED - 1]]
    tokens = classifier.tokenize(preprocessor, sentences)
    task = {
        "preset": arguments.preset,
        "sequence_length": arguments.sequence_length,
        "backend": arguments.backend,
        "label_names": label_names,
        "sentences": sentences,
        "probabilities": classifier.probabilities(model, tokens).tolist(),
    }

    stages.begin(f"Keras's own LoRA on {arguments.backend}")
    model, backbone, _, data = load()
    keras_lora = training.train_keras_lora(
        model,
        backbone,
        data,
        arguments.epochs,
        rank=arguments.lora_rank,
        adapter_rate=arguments.lora_rate,
        head_rate=arguments.head_rate,
        path=arguments.output_dir / "keras.lora.h5",
    )
    return [rlora, keras_lora], task


def serve(arguments, stages):
    """Loads, merges, exports and uses the adapter in other processes."""
    import serve_adapter

    folder = arguments.output_dir
    second = arguments.second_backend
    exporting = second if second in EXPORTING_BACKENDS else "tensorflow"
    stages.begin(f"The adapter file in a second process, on {second}")
    if second != exporting:
        run_script("serve_adapter.py", folder, backend=second)
        stages.begin(f"Export, on {exporting}")
    run_script("serve_adapter.py", folder, "--export", backend=exporting)
    stages.begin("The SavedModel in a process without the library")
    run_script(
        "ask_saved_model.py",
        folder / serve_adapter.SAVED_MODEL,
        folder / serve_adapter.QUESTIONS,
        # TensorFlow imports Keras, which could import PyTorch.
        backend="tensorflow",
    )


def summarize(arguments, runs, stages):
    """Prints the table, notes on it, the files and the times."""
    import reporting
    import serve_adapter

    folder = arguments.output_dir
    plot = folder / "learning_curves.png"
    title = (
        f"{arguments.preset}, {arguments.train_examples} training examples, "
        f"{arguments.backend}"
    )
    reporting.plot(runs, title, plot)
    print(f"\n== Summary: {title}\n")
    print(reporting.table(runs))
    print(
        "\nReading the table: KerasHub's attention kernels have three axes, "
        "and Keras's\nenable_lora(r) factors only the last one: it trains "
        "more weights than a matrix\nLoRA of rank r, and the layers' biases "
        "too. Its file leaves biases and head out;\nRLoRA's has all that was "
        "trained. One seed is one draw: differences of two or\nthree points "
        "mean little. Seconds are the median without the first epoch, which"
        "\ncompiles."
    )
    print("\nFiles:")
    for what, path in (
        ("adapter and head", folder / serve_adapter.ADAPTER),
        ("learning curves", plot),
        ("SavedModel", folder / serve_adapter.SAVED_MODEL),
    ):
        print(f"  {what:<17} {path}")
    print(f"\nSeconds:\n{stages.table()}")


def main():
    arguments = parse_arguments()
    # Keras reads this when it is imported, so the functions above import the
    # modules that need Keras.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import serve_adapter

    folder = arguments.output_dir
    # An export into the folder of an earlier run would mix the two.
    shutil.rmtree(folder / serve_adapter.SAVED_MODEL, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    stages = Stages()
    stages.begin("Data")
    split, label_names = load_data(arguments)
    runs, task = train_both(arguments, split, label_names, stages)
    (folder / serve_adapter.TASK).write_text(json.dumps(task), encoding="utf-8")
    serve(arguments, stages)
    stages.end()
    summarize(arguments, runs, stages)


if __name__ == "__main__":
    main()
