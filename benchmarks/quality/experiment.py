"""Paired seeds, hyperparameters chosen on held-out examples, and tables.

The three experiments of this folder use this module. A small search chooses a
method's learning rate (and strength) on held-out training examples. Then every
method is trained with the same paired seeds and judged once on the test set.
Every run is a row of a CSV file, which is written when the run ends. A run that
is there already is not made again, so an interrupted experiment continues where
it stopped.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]

#: The Markdown page into which the tables are written.
PAGE = pathlib.Path(__file__).parents[1] / "results" / "quality_tables.md"

#: The seeds of the search, which are never among those that are reported.
SEARCH_SEEDS = (1000,)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: The printed name.
        grid: dict from the name of a hyperparameter to the values to search.
        train: Function that trains and returns a dict of numbers. It takes a
            seed, whether this run is reported, and a keyword argument for each
            name in `grid`. The number `held_out` is the score by which the
            search chooses. A run that is not reported needs no other number.
        like: Optional name of an earlier method. Its choice is taken for the
            hyperparameters that both have.
    """

    name: str
    grid: dict
    train: Callable
    like: str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """One table.

    Attributes:
        name: The heading: the model, the task and the number of examples,
            which all methods share.
        task: The task on which the methods are trained.
        seeds: int. The number of paired seeds that are reported.
        choices_of: Optional name of an earlier setting, whose choice of
            hyperparameters is taken.
    """

    name: str
    task: object
    seeds: int
    choices_of: str | None = None


class Results:
    """The rows of a CSV file, one for each run."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.rows = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def find(self, **key):
        """The numbers of a run that was made before, or `None`."""
        key = {name: str(value) for name, value in key.items()}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return json.loads(row["numbers"])
        return None

    def add(self, numbers, **key):
        row = {**{k: str(v) for k, v in key.items()}}
        row["numbers"] = json.dumps(numbers)
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def run_all(
    results, setting, methods, seeds, search_seeds=SEARCH_SEEDS, choices=None
):
    """Searches and trains every method of one setting.

    Args:
        results: `Results` to which runs are added.
        setting: string. A name for the model, the task, the number of
            examples and the length of training, which all methods share.
        methods: list of `Method`.
        seeds: ints. The paired seeds that are reported.
        search_seeds: ints.
        choices: Optional dict from method name to hyperparameters, which
            replaces the search.

    Returns:
        dict from method name to `(hyperparameters, runs)`, where `runs` has a
        dict of numbers for each seed.
    """
    outcome = {}
    for method in methods:
        if choices is not None:
            chosen = choices[method.name]
        else:
            inherited = outcome[method.like][0] if method.like else {}
            chosen = _search(results, setting, method, inherited, search_seeds)
        runs = [
            _run(results, setting, method, chosen, seed, "final")
            for seed in seeds
        ]
        outcome[method.name] = chosen, runs
    return outcome


def _search(results, setting, method, inherited, seeds):
    grid = {
        name: (inherited[name],) if name in inherited else values
        for name, values in method.grid.items()
    }
    configs = [
        dict(zip(grid, values)) for values in itertools.product(*grid.values())
    ]
    if len(configs) == 1:
        return configs[0]
    scores = []
    for config in configs:
        runs = [
            _run(results, setting, method, config, seed, "search")
            for seed in seeds
        ]
        scores.append(statistics.mean(run["held_out"] for run in runs))
    return configs[scores.index(max(scores))]


def _run(results, setting, method, config, seed, phase):
    key = {
        "setting": setting,
        "method": method.name,
        "phase": phase,
        "seed": seed,
        "config": json.dumps(config, sort_keys=True),
    }
    numbers = results.find(**key)
    if numbers is None:
        start = time.perf_counter()
        numbers = method.train(seed, phase == "final", **config)
        numbers = {name: float(value) for name, value in numbers.items()}
        numbers["seconds"] = time.perf_counter() - start
        results.add(numbers, **key)
        shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        print(f"{setting} | {method.name} {config} {phase} {seed}: {shown}")
    return numbers


def table(outcome, columns, against=None, difference_of=None):
    """A Markdown table of means and standard deviations over seeds.

    Args:
        outcome: The result of `run_all`.
        columns: dict from a number's name to `(heading, format, factor)`.
        against: Optional name of the method with which all others are
            compared, seed by seed.
        difference_of: The name of the number that is compared.

    Returns:
        A string.
    """
    heads = ["method", "chosen"] + [head for head, _, _ in columns.values()]
    if against:
        heads.append(f"minus {against} (95 % interval)")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, (config, runs) in outcome.items():
        chosen = ", ".join(f"{k} {v:g}" for k, v in config.items()) or "-"
        cells = [name, chosen]
        for number, (_, form, factor) in columns.items():
            # A run may lack a number. For example, a model that is not trained
            # has no training score.
            values = [factor * run[number] for run in runs if number in run]
            cells.append(_mean_and_deviation(values, form) if values else "-")
        if against:
            cells.append(
                "-"
                if name == against
                else _difference(outcome, name, against, columns, difference_of)
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(outcome, ours, theirs, columns, number):
    """`paired_difference` of two methods of an outcome."""
    _, form, factor = columns[number]
    return paired_difference(
        *(
            [factor * run[number] for run in outcome[method][1]]
            for method in (ours, theirs)
        ),
        form,
    )


def _mean_and_deviation(values, form):
    mean = format(statistics.mean(values), form)
    if len(values) == 1 or len(set(values)) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def paired_difference(ours, theirs, form=".1f"):
    """The mean difference over paired seeds and its 95 % interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return format(mean, "+" + form)
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    half = _T[min(len(differences) - 1, len(_T)) - 1] * spread
    low, high = format(mean - half, "+" + form), format(mean + half, "+" + form)
    return f"{format(mean, '+' + form)} ({low} to {high})"


def publish(page, key, text):
    """Puts a table into a Markdown page, between the marks of its key.

    Args:
        page: path of the page.
        key: string. If the page has no such marks, they are added at its end.
        text: string.
    """
    page = pathlib.Path(page)
    begin, end = f"<!-- {key} -->", f"<!-- end of {key} -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def main(name, description, settings, methods, columns, against, pairs=()):
    """The command line of an experiment.

    The runs of the full experiment go into `results/`, beside the program, and
    its tables into `benchmarks/results/quality_tables.md`. The runs of the
    quick one go into `outputs/`.

    Args:
        name: string. The name of the CSV file.
        description: string. The experiment's docstring.
        settings: Function that yields `Setting`s. Its argument is a bool that
            tells whether the experiment should be quick.
        methods: Function from a loaded task to a list of `Method`.
        columns: See `table`.
        against: The name of the method with which the others are compared.
        pairs: `(name, name)` pairs of methods that are also compared.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="takes minutes")
    parser.add_argument("--only", default="", help="a part of a table's name")
    arguments = parser.parse_args()
    folder = pathlib.Path(__file__).parent / "results"
    if arguments.quick:
        folder = pathlib.Path("outputs", "quality")
    results = Results(folder / f"{name}.csv")
    chosen = {}
    for setting in settings(arguments.quick):
        title, task = setting.name, setting.task
        if arguments.only not in title:
            continue
        source = setting.choices_of
        if source and source not in chosen:
            parser.error(f"{title!r} takes its choices from {source!r}")
        task.load()
        outcome = run_all(
            results,
            title,
            methods(task),
            range(setting.seeds),
            SEARCH_SEEDS,
            chosen[source] if source else None,
        )
        chosen[title] = {
            method: config for method, (config, _) in outcome.items()
        }
        shown = {**columns, **task.score_columns}
        heading = f"{title}; {task.epochs} epochs, {setting.seeds} seeds:"
        text = f"{heading}\n\n{table(outcome, shown, against, 'test')}"
        for ours, theirs in pairs:
            difference = _difference(outcome, ours, theirs, shown, "test")
            text += f"\n\n{ours} minus {theirs}: {difference}"
        print(f"\n{text}", flush=True)
        if not arguments.quick:
            publish(PAGE, f"{name}: {title}", text)
