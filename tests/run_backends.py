"""Runs pytest once a backend, one more at a time than there are cores.

    python tests/run_backends.py [--backends jax,torch] [pytest options]

Keras picks its backend once a process. The tests' models are small, so a
process keeps about one core busy, whatever its backend; with one more of them
than cores, none is idle when the shortest ends. Every line of output is marked
with its backend; the outcome of each is printed at the end, and the exit code
is 0 if all passed.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time

BACKENDS = "jax,tensorflow,torch"


def run(backend, options):
    """Runs the tests on one backend; returns `(backend, code, seconds)`."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=pathlib.Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        print(f"[{backend}] {line}", end="", flush=True)
    return backend, process.wait(), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--backends", default=BACKENDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() + 1)
    arguments, options = parser.parse_known_args()
    backends = arguments.backends.replace(",", " ").split()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(run, backends, [options] * len(backends)))
    print()
    for backend, code, seconds in outcomes:
        outcome = "passed" if code == 0 else f"FAILED (exit code {code})"
        print(f"==== {backend}: {outcome}, {seconds:.0f} s")
    return any(code for _, code, _ in outcomes)


if __name__ == "__main__":
    sys.exit(main())
