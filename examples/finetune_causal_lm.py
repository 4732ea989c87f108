"""A language model learns to describe, from training to a SavedModel.

SmolLM2-135M gets attributes, such as "name[Heron House], dogs[no]", and is to
write a sentence or two about them. It learns this from 64 examples, with RLoRA,
LoRA and RandLoRA in turn. The program prints what it writes before and after,
and a table with scores. A second process loads RLoRA's adapter file on
TensorFlow, merges it and exports a SavedModel. A third one generates with the
SavedModel, without this library.

    python examples/finetune_causal_lm.py
    python examples/finetune_causal_lm.py --seeds 3
    python examples/finetune_causal_lm.py --data e2e.csv --train-examples 256
    python examples/finetune_causal_lm.py --preset gemma3_1b --quantize int4

The default model is in a Python package (see `smollm2.py`), and the default
data are this project's own (see `guesthouses.py`). Files of the E2E dataset
(Novikova et al., 2017) have the same columns.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import shutil
import statistics

import meanings
import reporting
import running
import text_scores

BACKENDS = ("jax", "tensorflow", "torch")
#: Two-sided 95 % quantiles of Student's t, by degrees of freedom.
QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
#: The heading, format and factor of each score.
SCORES = {
    "nats": ("nats a token", ".3f", 1),
    "bleu": ("BLEU", ".1f", 100),
    "chrf": ("chrF", ".1f", 100),
    "rouge_l": ("ROUGE-L", ".1f", 100),
    "mentioned": ("values said, %", ".1f", 100),
}
#: Nats are measured on so many texts a meaning. E2E has up to forty.
NATS_TEXTS = 2
# The files that processes exchange through a folder.
ADAPTER = "adapter.safetensors"
#: The other runs' files, each in place of the one before: for their sizes.
OTHER = "adapter_of_last_run.safetensors"
TASK = "task.json"


def parse_arguments(arguments=None):
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Defaults are in brackets."
    )
    add = parser.add_argument
    add(
        "--preset",
        default="smollm2",
        help="smollm2 or any KerasHub preset of a causal language model",
    )
    add("--dtype", help="of the base weights, such as bfloat16 (float32)")
    add("--quantize", choices=("int8", "int4"), help="the base weights (no)")
    add("--data", help="a CSV file with columns mr and ref (guesthouses)")
    add("--backend", choices=BACKENDS, default="jax", help="trains (jax)")
    add("--train-examples", type=int, default=64, help="texts (64)")
    add("--held-out", type=int, default=16, help="meanings to judge by (16)")
    add("--epochs", type=int, default=2, help="of each run (2)")
    add("--batch-size", type=int, default=4, help="in training (4)")
    add("--length", type=int, default=96, help="longest text in tokens (96)")
    add("--shots", type=int, default=3, help="examples in a prompt (3)")
    add("--rank", type=int, default=512, help="RLoRA's rank (512)")
    add("--rate", type=float, default=5e-2, help="RLoRA's rate (5e-2)")
    add("--lora-rank", type=int, default=8, help="LoRA's rank (8)")
    add("--lora-rate", type=float, default=3e-3, help="its rate (3e-3)")
    add("--randlora-rank", type=int, default=32, help="RandLoRA's (32)")
    add("--randlora-rate", type=float, default=3e-3, help="its rate (3e-3)")
    add(
        "--seeds",
        type=int,
        choices=range(1, 11),
        default=1,
        metavar="1...10",
        help="runs of each method (1)",
    )
    add(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path("outputs/finetune_causal_lm"),
        help="where files are written (outputs/finetune_causal_lm)",
    )
    add("--no-export", action="store_true", help="trains and compares only")
    return parser.parse_args(arguments)


def methods(arguments):
    """The adapters to compare: name to a function of a seed, and a rate."""
    import keras_randadapt as kra

    rank, lora, randlora = (
        arguments.rank,
        arguments.lora_rank,
        arguments.randlora_rank,
    )
    return {
        f"RLoRA, rank {rank}": (
            lambda seed: kra.RLoRA(rank, seed=seed),
            arguments.rate,
        ),
        f"LoRA, rank {lora}": (
            lambda seed: kra.LoRA(lora, seed=seed),
            arguments.lora_rate,
        ),
        f"RandLoRA, rank {randlora}": (
            lambda seed: kra.RandLoRA(randlora, seed=seed),
            arguments.randlora_rate,
        ),
    }


class Task:
    """The data of one program, and what is done with a model on them.

    Args:
        lm: A `language_model.LanguageModel`.
        rows: A list of pairs of a meaning and a text.
        arguments: The parsed arguments.

    Raises:
        ValueError: If there are too few rows.
    """

    def __init__(self, lm, rows, arguments):
        self.lm = lm
        self.arguments = arguments
        limit = arguments.length
        self.rows = [
            row
            for row in rows
            if lm.fits(meanings.prompt(row[0]), row[1], limit)
        ]
        self.held_out = self.split(seed=0).held_out
        # Arrays need not be longer than the longest text.
        self.length = max(
            len(lm.prompt_ids(f"{meanings.prompt(meaning)} {text}"))
            for meaning, text in self.rows
        )
        self.pairs = [
            (meaning, text)
            for meaning, texts in self.held_out.items()
            for text in texts[:NATS_TEXTS]
        ]
        self.judged = self.arrays(self.pairs)
        self.prompts = list(map(meanings.prompt, self.held_out))

    def split(self, seed):
        return meanings.split(
            self.rows,
            self.arguments.train_examples,
            self.arguments.held_out,
            seed,
        )

    def arrays(self, pairs):
        prompts, texts = zip(*((meanings.prompt(m), t) for m, t in pairs))
        return self.lm.examples(prompts, texts, self.length)

    def judge(self):
        """The scores of the model as it is, and the texts it writes."""
        texts = self.lm.generate(self.prompts, self.length)
        scores = {"nats": self.lm.nats(*self.judged)}
        scores.update(text_scores.scores(texts, self.held_out))
        return scores, texts

    def judge_few_shot(self):
        """The same with some training examples before each prompt."""
        shots = self.split(seed=0).train[: self.arguments.shots]
        before = "".join(f"{meanings.prompt(m)} {t}\n\n" for m, t in shots)
        prompts = [before + meanings.prompt(one) for one, _ in self.pairs]
        texts = [text for _, text in self.pairs]
        longest = max(
            len(self.lm.prompt_ids(f"{prompt} {text}"))
            for prompt, text in zip(prompts, texts)
        )
        judged = self.lm.examples(prompts, texts, longest)
        # The model goes on with an example of its own after an empty line.
        texts = [
            text.partition("\n")[0]
            for text in self.lm.generate(
                [before + one for one in self.prompts], longest
            )
        ]
        scores = {"nats": self.lm.nats(*judged)}
        scores.update(text_scores.scores(texts, self.held_out))
        return scores

    def train(self, adapter, rate, seed):
        """Trains an adapter on the examples of a seed, and judges it.

        Returns:
            The scores, the texts, and the report of `inject`.
        """
        import keras
        import language_model

        import keras_randadapt as kra

        keras.utils.set_random_seed(seed)
        report = kra.inject(self.lm.model, adapter)
        x, y, weight = self.arrays(self.split(seed).train)
        self.lm.model.compile(
            optimizer=keras.optimizers.AdamW(rate),
            loss=language_model.loss(),
            sampler="greedy",
        )
        self.lm.model.fit(
            x,
            y,
            sample_weight=weight,
            batch_size=self.arguments.batch_size,
            epochs=self.arguments.epochs,
            # KerasHub can't, and `split` has put them into a random order.
            shuffle=False,
            verbose=2,
        )
        return *self.judge(), report


def load_rows(arguments):
    """Reads the data."""
    import guesthouses

    return meanings.read_csv(arguments.data or guesthouses.FILE)


def run_all(arguments, task, stages):
    """Judges the base model and trains every method.

    Returns:
        Rows, one a run, and the texts before and after the first run of the
        first method, whose adapter file is written.
    """
    import keras_randadapt as kra

    model = task.lm.model
    stages.begin("The base model")
    scores, before = task.judge()
    rows = [{"method": "base", **scores}]
    if arguments.shots:
        stages.begin(f"The base model with {arguments.shots} examples")
        name = f"base, {arguments.shots} examples in the prompt"
        rows.append({"method": name, **task.judge_few_shot()})
    after = None
    for seed in range(arguments.seeds):
        for name, (adapter, rate) in methods(arguments).items():
            stages.begin(f"{name}, seed {seed}, on {arguments.backend}")
            scores, texts, report = task.train(adapter(seed), rate, seed)
            file = arguments.output_dir / (ADAPTER if after is None else OTHER)
            kra.save_adapter(model, file)
            row = {"method": name, "seed": seed, **scores}
            row["parameters"] = report.adapter_parameters
            row["bytes"] = file.stat().st_size
            rows.append(row)
            print("  " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            if after is None:
                after = texts
                write_task(arguments, task, texts)
            kra.eject(model)
            # A run that is cut short leaves what it has.
            write_rows(rows, arguments.output_dir / "runs.csv")
    return rows, before, after


def write_task(arguments, task, texts):
    """Writes what the next processes need, while the adapter is in place."""
    lm = task.lm
    x, y, weight = task.judged
    content = {
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "quantize": arguments.quantize,
        "backend": arguments.backend,
        "length": task.length,
        "prompt": task.prompts[0],
        "prompt_ids": lm.prompt_ids(task.prompts[0]),
        "end": lm.end,
        "text": texts[0],
        "pairs": task.pairs[:8],
        "log_likelihoods": lm.log_likelihoods(
            {name: value[:8] for name, value in x.items()}, y[:8], weight[:8]
        ).tolist(),
    }
    path = arguments.output_dir / TASK
    path.write_text(json.dumps(content), encoding="utf-8")


def table(rows):
    """The mean of each score over seeds, with the standard deviation."""
    groups = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    lines = []
    for name, runs in groups.items():
        first = runs[0]
        line = [name]
        if "parameters" in first:
            line.append(f"{first['parameters']:,.0f}")
            line.append(reporting.format_bytes(int(first["bytes"])))
        else:
            line += ["0", "none"]
        for score, (_, style, factor) in SCORES.items():
            values = [run[score] * factor for run in runs]
            cell = format(statistics.fmean(values), style)
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):{style}}"
            line.append(cell)
        lines.append(tuple(line))
    header = ["method", "trained", "file", *(one[0] for one in SCORES.values())]
    return reporting.format_table(header, lines)


def gains(rows):
    """What each method gains over the base model, with 95 % intervals.

    Args:
        rows: The rows of `run_all`, with two to ten seeds.

    Returns:
        A string of lines.
    """
    base = rows[0]
    groups = {}
    for row in rows[1:]:
        if "seed" in row:
            groups.setdefault(row["method"], []).append(row)
    lines = []
    for name, runs in groups.items():
        line = [name]
        for score, (_, style, factor) in SCORES.items():
            values = [(run[score] - base[score]) * factor for run in runs]
            half = QUANTILES[len(values) - 2] * statistics.stdev(values)
            half /= math.sqrt(len(values))
            mean = statistics.fmean(values)
            line.append(f"{mean:+{style}} ± {half:{style}}")
        lines.append(tuple(line))
    header = ["minus base", *(one[0] for one in SCORES.values())]
    return reporting.format_table(header, lines)


def side_by_side(task, before, after, count=4):
    """Prompts with the texts before and after training, as lines of text."""
    lines = []
    for i, (meaning, references) in enumerate(task.held_out.items()):
        if i == count:
            break
        lines += [
            meaning,
            f"  before:    {before[i]}",
            f"  after:     {after[i]}",
            f"  reference: {references[0]}",
            "",
        ]
    return "\n".join(lines)


def read_rows(path):
    """Reads the file that `write_rows` has written."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {
                name: value if name == "method" else float(value)
                for name, value in row.items()
                if value
            }
            for row in csv.DictReader(file)
        ]


def write_rows(rows, path):
    """Writes every run to a CSV file."""
    header = ["method", "seed", "parameters", "bytes", *SCORES]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)


def main():
    arguments = parse_arguments()
    # Keras reads this when it is imported, so the functions above import the
    # modules that need Keras.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import language_model

    folder = arguments.output_dir
    # An export into the folder of an earlier run would mix the two.
    shutil.rmtree(folder / "saved_model", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    stages = running.Stages()
    stages.begin("Model and data")
    lm = language_model.load(
        arguments.preset, arguments.dtype, arguments.quantize
    )
    task = Task(lm, load_rows(arguments), arguments)
    print(
        f"{len(task.rows)} texts of at most {task.length} tokens: "
        f"{arguments.train_examples} to train on, {len(task.pairs)} about "
        f"{len(task.held_out)} other meanings to judge by"
    )
    rows, before, after = run_all(arguments, task, stages)
    if not arguments.no_export:
        stages.begin("The adapter file in a second process, on tensorflow")
        running.run_script("serve_causal_lm.py", folder, backend="tensorflow")
        stages.begin("The SavedModel in a process without the library")
        running.run_script(
            "ask_language_model.py", folder, backend="tensorflow"
        )
    stages.end()

    print("\n== Before and after\n")
    print(side_by_side(task, before, after))
    print(f"== Summary: {arguments.preset}, {arguments.train_examples} texts\n")
    print(table(rows))
    if arguments.seeds > 1:
        print(f"\n95 % intervals over {arguments.seeds} seeds:\n")
        print(gains(rows))
    print(f"\nFiles are in {folder}.\n\nSeconds:\n{stages.table()}")


if __name__ == "__main__":
    main()
