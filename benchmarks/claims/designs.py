"""The design of an experiment: a file that is committed before its results.

A design is a TOML file in `designs/`. Its sentences tell a reader what is
claimed and measured. Its tables tell the program what to run, and which verdict
follows from which interval.
"""

import dataclasses
import pathlib
import tomllib

from benchmarks.claims import power

FOLDER = pathlib.Path(__file__).parent / "designs"
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/claims"

#: The sentences that a design must have.
PROSE = (
    "title",
    "source",
    "claim",
    "measure",
    "task",
    "search_plan",
    "controls",
    "reproduced",
    "refuted",
    "open",
    "cost",
)
#: How a comparison is judged; see `verdicts.judge`.
KINDS = ("difference", "equality", "deviation")


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        name: string.
        arguments: dict, what the experiment's `run` gets.
        grid: dict from a hyperparameter to its first values, in order.
        settings: Optional list of the settings that it is run in.
    """

    name: str
    arguments: dict
    grid: dict
    settings: list | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two methods are compared for.

    Attributes:
        name: string, what a reader is told.
        setting: string.
        ours: The method that is claimed to be ahead.
        theirs: The method that it is compared with.
        kind: `"difference"`, `"equality"` or `"deviation"`.
        claimed: float. The paper's difference in the figure's unit, above 0.
            For an equality it is the largest difference that counts as none,
            for a deviation the claimed ratio, below 1.
        deviation: float, the guess of the standard deviation of a pair's
            difference. It is not used for a deviation.
        pairs_needed: int, what the power calculation gives.
        primary: bool. Only primary comparisons have a verdict.
        ours_figure: The number of `ours` that is compared.
        theirs_figure: The number of `theirs` that is compared.
    """

    name: str
    setting: str
    ours: str
    theirs: str
    kind: str = "difference"
    claimed: float | None = None
    deviation: float | None = None
    pairs_needed: int | None = None
    primary: bool = True
    ours_figure: str | None = None
    theirs_figure: str | None = None


@dataclasses.dataclass(frozen=True)
class Design:
    """One experiment. `load` reads it.

    Attributes:
        name: string, the name of the file.
        prose: dict of the sentences of `PROSE`.
        module: The module whose `run` makes a run.
        figure: The number that is compared, larger is better.
        unit: What the figure is in.
        factor: float, by which a run's number is multiplied for that unit.
        tolerance: float. A rerun's figure may differ by so much, as the run
            gives it.
        pairs: int, the number of paired seeds.
        search_seeds: tuple of seeds, none of which is among the pairs.
        widen: dict from a hyperparameter to its `(lowest, highest)` value.
        settings: dict from name to arguments.
        methods: dict from name to `Method`.
        comparisons: list of `Comparison`.
        shown: list of further numbers for the tables of means.
    """

    name: str
    prose: dict
    module: str
    figure: str
    unit: str
    factor: float
    tolerance: float
    pairs: int
    search_seeds: tuple
    widen: dict
    settings: dict
    methods: dict
    comparisons: list
    shown: list

    @property
    def alpha(self):
        """The level of an interval, shared out among primary comparisons."""
        count = sum(one.primary for one in self.comparisons)
        return 0.05 / max(count, 1)

    @property
    def results(self):
        """The path of the results."""
        return RESULTS / f"{self.name}.csv"

    def methods_of(self, setting):
        """The methods that are run in a setting."""
        return [
            one
            for one in self.methods.values()
            if one.settings is None or setting in one.settings
        ]


def names():
    """The names of all designs."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name, folder=FOLDER):
    """Reads a design and checks that it is complete.

    Args:
        name: string, the name of the file without its ending.
        folder: The folder of the designs.

    Returns:
        A `Design`.

    Raises:
        ValueError: If there is no such design, or if it lacks something.
    """
    path = pathlib.Path(folder) / f"{name}.toml"
    if not path.exists():
        raise ValueError(
            f"There is no design {name!r}. Designs: {', '.join(names())}"
        )
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in PROSE if not content.get(key, "").strip()]
    if missing:
        raise ValueError(f"{path} lacks the sentences {missing}.")
    methods = {
        key: Method(
            key,
            value.get("arguments", {}),
            value.get("grid", {}),
            value.get("settings"),
        )
        for key, value in content["methods"].items()
    }
    first = content["first_search_seed"]
    design = Design(
        name=name,
        prose={key: content[key].strip() for key in PROSE},
        module=content["module"],
        figure=content["figure"],
        unit=content["unit"],
        factor=content.get("factor", 1.0),
        tolerance=content["tolerance"],
        pairs=content["pairs"],
        search_seeds=tuple(range(first, first + content["search_seeds"])),
        widen={key: tuple(value) for key, value in content["widen"].items()},
        settings=content["settings"],
        methods=methods,
        comparisons=[
            Comparison(**{"name": key, **row})
            for key, row in content["comparisons"].items()
        ],
        shown=content.get("shown", []),
    )
    _check(design, path)
    return design


def calculated_pairs(design, comparison):
    """What the power calculation gives for a primary comparison."""
    if comparison.kind == "deviation":
        return power.ratio_pairs_needed(comparison.claimed, alpha=design.alpha)
    return power.pairs_needed(
        comparison.claimed, comparison.deviation, alpha=design.alpha
    )


def _check(design, path):
    if len(design.search_seeds) < 2:
        raise ValueError(f"{path}: a search needs at least two seeds.")
    if min(design.search_seeds) < design.pairs:
        raise ValueError(f"{path}: a seed of the search is among the pairs.")
    for method in design.methods.values():
        for axis, values in method.grid.items():
            if values != sorted(values) or len(values) < 2:
                raise ValueError(
                    f"{path}: the grid of {axis!r} of {method.name!r} must "
                    f"have two values or more, in order. Received: {values}"
                )
            if axis not in design.widen:
                raise ValueError(
                    f"{path}: `widen` must say how far {axis!r} may go."
                )
    for one in design.comparisons:
        _check_comparison(design, one, path)


def _check_comparison(design, one, path):
    where = f"{path}, comparison {one.name!r}"
    if one.setting not in design.settings or one.kind not in KINDS:
        raise ValueError(f"{where}: unknown setting or kind.")
    found = [method.name for method in design.methods_of(one.setting)]
    if one.ours not in found or one.theirs not in found:
        raise ValueError(f"{where}: a method is not run in that setting.")
    if not one.primary:
        return
    if one.claimed is None or one.claimed <= 0:
        raise ValueError(f"{where}: `claimed` must be above 0.")
    calculated = calculated_pairs(design, one)
    if one.pairs_needed != calculated:
        raise ValueError(
            f"{where}: `pairs_needed` is {one.pairs_needed}, and the power "
            f"calculation gives {calculated}."
        )
