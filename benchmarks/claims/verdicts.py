"""From rows to verdicts: intervals of paired differences, and tables."""

import json
import pathlib
import statistics

from benchmarks.claims import designs
from benchmarks.claims import power
from benchmarks.claims import runs

#: The page with the verdicts, and the page with the means.
PAGE = designs.ROOT / "docs/evidence.md"
TABLES = designs.ROOT / "benchmarks/results/claims_tables.md"
REPRODUCED, REFUTED, OPEN = "reproduced", "refuted", "open"


def judge(comparison, interval, planned):
    """The verdict on a comparison.

    A difference is reproduced if its interval is above 0 and holds half of
    what is claimed or more. It is refuted if the interval is below half of what
    is claimed. An equality is reproduced if the interval is within the margin,
    and refuted if it is outside of it. A ratio of deviations is judged as a
    difference of logarithms. Everything else is open, and so is whatever has
    fewer pairs than planned.

    Args:
        comparison: A `designs.Comparison`.
        interval: A `power.Interval`, or `None`.
        planned: int, the number of pairs of the design.

    Returns:
        `"reproduced"`, `"refuted"` or `"open"`.
    """
    if interval is None or interval.pairs < planned:
        return OPEN
    low, high, claimed = interval.low, interval.high, comparison.claimed
    if comparison.kind == "equality":
        if -claimed <= low and high <= claimed:
            return REPRODUCED
        return REFUTED if low > claimed or high < -claimed else OPEN
    if comparison.kind == "deviation":
        if low > claimed**0.5:
            return REFUTED
        return REPRODUCED if high < 1 else OPEN
    if high < claimed / 2:
        return REFUTED
    return REPRODUCED if low > 0 else OPEN


def interval_of(design, results, comparison):
    """The interval of a comparison over the pairs that there are.

    Args:
        design: A `designs.Design`.
        results: `runs.Results`.
        comparison: One of the design's comparisons.

    Returns:
        A `power.Interval`, or `None` if there are too few pairs.
    """
    ours = _figures(design, results, comparison, "ours")
    theirs = _figures(design, results, comparison, "theirs")
    seeds = sorted(ours.keys() & theirs.keys())
    alpha = design.alpha if comparison.primary else 0.05
    if len(seeds) < 3:
        return None
    sides = [[side[seed] for seed in seeds] for side in (ours, theirs)]
    if comparison.kind == "deviation":
        return power.deviation_ratio(*sides, alpha)
    return power.mean_difference(*sides, alpha)


def _figures(design, results, comparison, side):
    """dict from seed to the number of a side."""
    name = getattr(comparison, f"{side}_figure") or design.figure
    method = getattr(comparison, side)
    return {
        int(row["seed"]): design.factor * runs.numbers_of(row)[name]
        for row in final_rows(design, results, comparison.setting, method)
    }


def final_rows(design, results, setting, method):
    """The final rows of a method with the hyperparameters that were chosen.

    Rows of an earlier choice may be there too: a search that went on, or a
    design that was changed, may have chosen others since.
    """
    rows = results.select(setting=setting, method=method, phase=runs.FINAL)
    if not rows:
        return []
    newest = rows[-1]["arguments"]
    return [row for row in rows if row["arguments"] == newest]


def edges(design, results, setting, method):
    """Names of hyperparameters whose choice is on the edge of the search."""
    grid = design.methods[method].grid
    rows = final_rows(design, results, setting, method)
    searched = results.select(setting=setting, method=method, phase=runs.SEARCH)
    if not rows or not searched or not grid:
        return []
    chosen = json.loads(rows[0]["arguments"])
    tried = [json.loads(row["arguments"]) for row in searched]
    axes = {name: {one[name] for one in tried} for name in grid}
    return runs.on_edge(axes, {name: chosen[name] for name in grid})


def verdict_table(pairs):
    """The table of all primary comparisons.

    Args:
        pairs: list of `(design, results)`.

    Returns:
        A string in Markdown.
    """
    lines = [
        "| claim | paper | measured, with its interval | pairs | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for design, results in pairs:
        for one in design.comparisons:
            if not one.primary:
                continue
            interval = interval_of(design, results, one)
            verdict = judge(one, interval, design.pairs)
            notes = [
                f"{side}: {', '.join(found)} on the edge of the search"
                for side in (one.ours, one.theirs)
                if (found := edges(design, results, one.setting, side))
            ]
            count = interval.pairs if interval else 0
            cells = [
                _named(one),
                _claimed(design, one),
                _shown(interval, one.kind) or "not run",
                f"{count} of {design.pairs} (needed {one.pairs_needed})",
                "; ".join([f"**{verdict}**", *notes]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _named(comparison):
    """The comparison's name, with the setting unless it names that itself."""
    if comparison.setting in comparison.name:
        return comparison.name
    return f"{comparison.name} ({comparison.setting})"


def _claimed(design, comparison):
    if comparison.kind == "equality":
        return f"0, give or take {comparison.claimed:g} {design.unit}"
    if comparison.kind == "deviation":
        return f"ratio {comparison.claimed:g}"
    return f"+{comparison.claimed:g} {design.unit}"


def _shown(interval, kind):
    if interval is None:
        return ""
    form = ".2f" if kind == "deviation" else "+.3g"
    low, high = format(interval.low, form), format(interval.high, form)
    return f"{format(interval.estimate, form)} ({low} to {high})"


def tables_of(design, results):
    """The means and the secondary comparisons of an experiment, in Markdown."""
    lines = [f"## {design.prose['title']}", ""]
    heads = ["setting", "method", "chosen", f"{design.figure}, {design.unit}"]
    heads += [*design.shown, "runs", "seconds a run"]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for setting in design.settings:
        for method in design.methods_of(setting):
            rows = final_rows(design, results, setting, method.name)
            if rows:
                cells = _means(design, method, rows)
                lines.append(f"| {setting} | {' | '.join(cells)} |")
    secondary = [one for one in design.comparisons if not one.primary]
    if secondary:
        lines += ["", "| also compared | difference (95 % interval) | pairs |"]
        lines += ["| --- | --- | --- |"]
        for one in secondary:
            interval = interval_of(design, results, one)
            if interval:
                lines.append(
                    f"| {_named(one)} | "
                    f"{_shown(interval, one.kind)} | {interval.pairs} |"
                )
    return "\n".join(lines)


def _means(design, method, rows):
    arguments = json.loads(rows[0]["arguments"])
    chosen = [f"{name} {arguments[name]:g}" for name in method.grid]
    numbers = [runs.numbers_of(row) for row in rows]
    cells = [method.name, ", ".join(chosen) or "-"]
    figures = [design.factor * one[design.figure] for one in numbers]
    cells.append(_mean_and_deviation(figures))
    for name in design.shown:
        values = [one[name] for one in numbers if name in one]
        cells.append(_mean_and_deviation(values) if values else "-")
    seconds = statistics.fmean(float(row["seconds"]) for row in rows)
    return [*cells, str(len(rows)), f"{seconds:.1f}"]


def _mean_and_deviation(values):
    mean = f"{statistics.fmean(values):.4g}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2g}"


def summary(design):
    """The sentences of a design that tell a reader what was done."""
    prose = design.prose
    return "\n\n".join(
        [
            f"### {prose['title']}",
            f"[{design.name}.toml](../benchmarks/claims/designs/"
            f"{design.name}.toml) has the design. The source is "
            f"{prose['source']}.",
            prose["claim"],
            f"**Measure.** {prose['measure']}",
            f"**Task.** {prose['task']}",
            f"**Search.** {prose['search_plan']}",
            f"**Controls.** {prose['controls']}",
            f"**Cost.** {prose['cost']}",
        ]
    )


def between_marks(content, key, text):
    """Puts a text into a page, between the marks of its key."""
    begin, end = f"<!-- {key} -->", f"<!-- end of {key} -->"
    before, found, rest = content.partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"The page lacks the marks {begin} and {end}.")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def pages(folder=designs.RESULTS):
    """The pages as the results make them.

    Args:
        folder: The folder of the results.

    Returns:
        A dict from path to content.
    """
    everything = [
        (design, runs.Results(pathlib.Path(folder) / f"{design.name}.csv"))
        for design in map(designs.load, designs.names())
    ]
    page = PAGE.read_text(encoding="utf-8")
    page = between_marks(
        page,
        "designs",
        "\n\n".join(summary(design) for design, _ in everything),
    )
    tables = [
        tables_of(design, results)
        for design, results in everything
        if results.rows
    ]
    head = (
        "# Means of the experiments that settle claims\n\n"
        "`python -m benchmarks.claims verdicts` writes this page. Figures are "
        "means and\nstandard deviations over the runs. "
        "[The evidence](../../docs/evidence.md) has the verdicts."
    )
    return {
        PAGE: between_marks(page, "verdicts", verdict_table(everything)),
        TABLES: "\n\n".join([head, *tables]) + "\n",
    }
