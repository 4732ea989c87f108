"""Runs of an experiment: searched, paired, and taken up again after a cut.

Every run is a row of a CSV file, which is written when the run ends. A row has
all that its run depends on, so that it can be run again.
"""

import csv
import datetime
import functools
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import time

COLUMNS = (
    "experiment",
    "setting",
    "method",
    "phase",
    "seed",
    "arguments",
    "figure",
    "numbers",
    "seconds",
    "date",
    "versions",
    "code",
)
_KEY = COLUMNS[:6]
SEARCH, FINAL = "search", "final"


class Results:
    """The rows of a CSV file. A row that was cut short does not count."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.rows = []
        if self.path.exists():
            text = self._whole_rows().decode("utf-8")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            self.rows = list(reader)
            if text and reader.fieldnames != list(COLUMNS):
                raise ValueError(
                    f"{self.path} should have the columns {list(COLUMNS)}. "
                    f"Received: {reader.fieldnames}. Give a new run a file of "
                    "its own with --results."
                )
        self._index = {self._key(row): row for row in reversed(self.rows)}

    def _whole_rows(self):
        content = self.path.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def _remove_torn_row(self):
        # Only a writer does it: what looks torn to a reader may be a row that
        # another process is writing.
        whole = self._whole_rows()
        if len(whole) != self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    @staticmethod
    def _key(row):
        return tuple(row[name] for name in _KEY)

    def find(self, row):
        """The row of a run that was made before, or `None`."""
        return self._index.get(self._key(row))

    def add(self, row):
        """Appends a row: one write, which is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._remove_torn_row()
        is_new = not self.path.stat().st_size
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("ab") as file:
            file.write(text.getvalue().encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._index[self._key(row)] = row

    def select(self, **key):
        """The rows with these columns."""
        return [
            row
            for row in self.rows
            if all(row[name] == str(value) for name, value in key.items())
        ]


def numbers_of(row):
    """The numbers of a row, a dict."""
    return json.loads(row["numbers"])


class Runner:
    """Makes the runs of a design that are not there yet.

    Args:
        design: A `designs.Design`.
        results: `Results`.
        function: Optional function that makes a run. It gets `seed`, `final`,
            `data` and a dict of arguments, and returns a dict of numbers. A
            run of the search has `"held_out"` among them, and a final run has
            the design's figure. The default is `run` of the design's module.
        data: Optional path of the folder with the data sets.
        report: Function that is called with a line for each run.
    """

    def __init__(self, design, results, function=None, data=None, report=print):
        self.design = design
        self.results = results
        self.data = data
        self.report = report
        self._function = function

    def all(self, only=""):
        """Searches and trains every method of every setting.

        Args:
            only: string, a part of the names of the settings to run.
        """
        for setting in self.design.settings:
            if only in setting:
                for method in self.design.methods_of(setting):
                    choice = self.choice(setting, method)
                    for seed in range(self.design.pairs):
                        self.run(setting, method, choice, seed, FINAL)

    def choice(self, setting, method):
        """The hyperparameters with the best mean score on held-out examples.

        A best value on the edge of its grid widens the grid, by the ratio of
        the two values there, as far as the design's `widen` allows.
        """
        axes = {name: list(values) for name, values in method.grid.items()}
        if not axes:
            return {}
        while True:
            best = self._best(setting, method, axes)
            if not widened(axes, best, self.design.widen):
                return best

    def _best(self, setting, method, axes):
        scores = []
        configs = [
            dict(zip(axes, values))
            for values in itertools.product(*axes.values())
        ]
        for config in configs:
            runs = [
                self.run(setting, method, config, seed, SEARCH)
                for seed in self.design.search_seeds
            ]
            mean = statistics.fmean(numbers_of(run)["held_out"] for run in runs)
            # A diverged run has no score and must not be chosen.
            scores.append(-math.inf if math.isnan(mean) else mean)
        return configs[scores.index(max(scores))]

    def run(self, setting, method, config, seed, phase):
        """The row of a run, which is made unless it is there."""
        arguments = {
            **self.design.settings[setting],
            **method.arguments,
            **config,
        }
        row = {
            "experiment": self.design.name,
            "setting": setting,
            "method": method.name,
            "phase": phase,
            "seed": str(seed),
            "arguments": json.dumps(arguments, sort_keys=True),
        }
        found = self.results.find(row)
        if found is not None:
            return found
        start = time.perf_counter()
        numbers = self.function(
            seed=seed,
            final=phase == FINAL,
            data=self.data,
            arguments=arguments,
        )
        figure = numbers[self.design.figure if phase == FINAL else "held_out"]
        row |= {
            "figure": repr(float(figure)),
            # NumPy's numbers are no JSON, and `item` makes Python's of them.
            "numbers": json.dumps(numbers, default=lambda one: one.item()),
            "seconds": f"{time.perf_counter() - start:.2f}",
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
            "code": code(),
        }
        self.results.add(row)
        self.report(
            f"{setting} | {method.name} {config} {phase} {seed}: "
            f"{figure:.5g} in {row['seconds']} s"
        )
        return row

    @property
    def function(self):
        if self._function is None:
            module = importlib.import_module(self.design.module)
            self._function = module.run
        return self._function

    def rerun(self, row):
        """Runs a row again.

        Args:
            row: A row of the results.

        Returns:
            The figure of the row and that of the new run, two floats.
        """
        final = row["phase"] == FINAL
        numbers = self.function(
            seed=int(row["seed"]),
            final=final,
            data=self.data,
            arguments=json.loads(row["arguments"]),
        )
        figure = numbers[self.design.figure if final else "held_out"]
        return float(row["figure"]), float(figure)


def widened(axes, best, limits):
    """Adds a value to each axis whose best value is on its edge.

    Args:
        axes: dict from name to list of values in order. It is changed.
        best: dict from name to the best value.
        limits: dict from name to `(lowest, highest)`.

    Returns:
        bool, whether a value was added.
    """
    added = False
    for name, values in axes.items():
        lowest, highest = limits[name]
        # Nothing is below 0, which is no edge.
        if best[name] == values[0] and values[0] > 0:
            value = _rounded(values[0] * values[0] / values[1])
            if value >= lowest:
                values.insert(0, value)
                added = True
        elif best[name] == values[-1]:
            value = _rounded(values[-1] * values[-1] / values[-2])
            if value <= highest:
                values.append(value)
                added = True
    return added


def on_edge(axes, best):
    """Names of the hyperparameters whose best value is on an edge."""
    return [
        name
        for name, values in axes.items()
        if (best[name] == min(values) and best[name] > 0)
        or best[name] == max(values)
    ]


def _rounded(value):
    return float(f"{value:.2g}")


@functools.cache
def versions():
    """The versions on which a figure depends."""
    # The verdicts need no backend, and importing one takes seconds.
    import keras

    names = ["keras", keras.config.backend(), "numpy"]
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)


@functools.cache
def code():
    """The state of the library and of the experiments that made a run.

    These are the hashes that Git gives the two folders, as in `git rev-parse
    HEAD:keras_randadapt`, with a + if files were changed since. Hashes of
    commits would not outlive a rebase.
    """
    root = pathlib.Path(__file__).parents[2]
    folders = ["keras_randadapt", "benchmarks/claims"]

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True
        )

    try:
        found = [git("rev-parse", f"HEAD:{folder}") for folder in folders]
        changed = git("diff", "--quiet", "HEAD", "--", *folders).returncode
    except FileNotFoundError:
        return "unknown"
    if any(one.returncode for one in found):
        return "unknown"
    return " ".join(one.stdout[:8] for one in found) + ("+" if changed else "")
