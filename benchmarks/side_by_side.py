"""The command line of benchmarks whose functions take turns in one loop."""

import argparse
import os
import subprocess
import sys
import time


def main(description, columns, rows, **options):
    """Prints a Markdown table of the figures of one backend, or of each.

    Args:
        description: string. The benchmark's docstring.
        columns: `(heading, format)` pairs, or a function from the parsed
            arguments to these.
        rows: Function of the parsed arguments that yields rows of figures. It
            is called after Keras is imported.
        **options: The arguments of `add_argument`, by the name of the option
            with underscores instead of dashes.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all backends")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    arguments = parser.parse_args()
    if arguments.all:
        given = [a for a in sys.argv[1:] if a != "--all"]
        for backend in ("jax", "tensorflow", "torch"):
            subprocess.run(
                [sys.executable, sys.argv[0], *given],
                env={**os.environ, "KERAS_BACKEND": backend},
                check=True,
            )
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras

    if callable(columns):
        columns = columns(arguments)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(
        f"\n{keras.config.backend()}, {cores} cores, "
        f"load before the run {load:.1f}\n"
    )
    # Two columns may have headings that differ only in spaces.
    print("| " + " | ".join(name.strip() for name, _ in columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows(arguments):
        cells = (f.format(v) for (_, f), v in zip(columns, row))
        print("| " + " | ".join(cells) + " |", flush=True)


def in_turns(functions, repeats, clock=time.perf_counter):
    """Times functions that take turns in one loop.

    Args:
        functions: dict from name to a function without arguments.
        repeats: int. Two more come first, which compile and fill caches and
            are not counted.
        clock: Function that gives seconds. That of the process,
            `time.process_time`, leaves out what other programs do.

    Returns:
        dict from name to the list of seconds, one of each repetition.
    """
    measured = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = clock()
            function()
            if repeat >= 2:
                measured[name].append(clock() - start)
    return measured
