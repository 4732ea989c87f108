"""The command line of the experiments.

    KERAS_BACKEND=jax python -m benchmarks.claims run NAME --data PATH
    python -m benchmarks.claims rerun benchmarks/results/claims/NAME.csv --row 7
    python -m benchmarks.claims verdicts
    python -m benchmarks.claims designs

`run` goes on where it stopped. `--data` names the folder with the data sets of
benchmarks/quality/DATA.md, for the experiments that need any.
"""

import argparse
import functools
import sys

from benchmarks.claims import designs
from benchmarks.claims import runs
from benchmarks.claims import verdicts


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: Optional list of strings, instead of the command line.

    Returns:
        int, the exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="makes the runs of an experiment")
    run.add_argument("name", choices=designs.names())
    run.add_argument("--only", default="", help="a part of a setting's name")
    run.add_argument("--results", help="a file instead of the committed one")
    rerun = commands.add_parser("rerun", help="compares a row with a new run")
    rerun.add_argument("path", help="a file of results")
    rerun.add_argument("--row", type=int, required=True, help="1 is the first")
    for one in (run, rerun):
        one.add_argument("--data", help="the folder with the data sets")
    commands.add_parser("verdicts", help="writes the tables of verdicts")
    commands.add_parser("designs", help="prints what is planned")
    chosen = parser.parse_args(arguments)
    return {
        "run": _run,
        "rerun": _rerun,
        "verdicts": _verdicts,
        "designs": _designs,
    }[chosen.command](chosen)


def _run(chosen):
    design = designs.load(chosen.name)
    results = runs.Results(chosen.results or design.results)
    report = functools.partial(print, flush=True)
    runs.Runner(design, results, data=chosen.data, report=report).all(
        chosen.only
    )
    return 0


def _rerun(chosen):
    results = runs.Results(chosen.path)
    if not 1 <= chosen.row <= len(results.rows):
        print(f"--row must be from 1 to {len(results.rows)}.")
        return 2
    row = results.rows[chosen.row - 1]
    design = designs.load(row["experiment"])
    before, after = runs.Runner(design, results, data=chosen.data).rerun(row)
    agrees = abs(after - before) <= design.tolerance
    print(
        f"{row['setting']} | {row['method']} | seed {row['seed']}: it was "
        f"{before:.6g} and is {after:.6g}; they may differ by "
        f"{design.tolerance:g}."
    )
    if row["versions"] != runs.versions():
        print(f"The row was made with {row['versions']}.")
        print(f"Here is {runs.versions()}.")
    print("The figures agree." if agrees else "The figures DIFFER.")
    return 0 if agrees else 1


def _verdicts(chosen):
    for path, content in verdicts.pages().items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(designs.ROOT)}")
    return 0


def _designs(chosen):
    for name in designs.names():
        design = designs.load(name)
        print(f"{name}: {design.prose['title']} ({design.pairs} pairs)")
        for one in design.comparisons:
            if one.primary:
                print(
                    f"    {one.name} ({one.setting}): needs "
                    f"{one.pairs_needed} pairs"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
