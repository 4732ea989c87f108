"""Runs the tests on every backend, as many processes at a time as cores.

    python tests/run_backends.py [--backends jax,torch] [pytest options]

Keras picks its backend once a process, and the tests' models are small enough
that a process keeps about one core busy. Each backend has a few parts, jobs of
a queue with the longest first. The parts are few, since each process imports
Keras and a backend anew. Every line of output is marked with its job. The
outcome and the CPU seconds of each job are printed at the end, and the exit
code is 0 if all passed and every backend ran some test.
"""

import argparse
import concurrent.futures
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
import typing

BACKENDS = "jax,tensorflow,torch"
ROOT = pathlib.Path(__file__).parents[1]
#: The pytest arguments of each part, the longest part first.
PARTS = {
    "others": ["--ignore=tests/test_matrix.py"],
    "matrix": ["tests/test_matrix.py"],
}
COMMAND = ["-m", "pytest"]
#: Options of pytest whose value, in the next argument, names no test to run.
WITH_VALUE = {"-c", "-k", "-m", "-o", "-p", "-W", "--deselect", "--ignore"}
#: pytest's exit code where it has found no test to run.
NO_TESTS = 5


class Job(typing.NamedTuple):
    """One process: the tests of a part on a backend."""

    backend: str
    part: str
    options: list


class Outcome(typing.NamedTuple):
    """How a job went: pytest's exit code, and CPU seconds."""

    job: Job
    code: int
    seconds: float


def jobs_of(backends, options):
    """The queue, or one job a backend where `options` name tests."""
    named = [
        option
        for before, option in zip(["", *options], options)
        if before not in WITH_VALUE
        and (ROOT / option.partition("::")[0]).exists()
    ]
    parts = {"tests": []} if named else PARTS
    rotate = f"--rotate={','.join(backends)}"
    return [
        Job(backend, part, [*arguments, rotate, *options])
        for part, arguments in parts.items()
        for backend in backends
    ]


def environment_of(job, cache):
    """Variables of a job's process; those that are set already win."""
    quick = {
        # Threads of a process that wait for each other on cores that another
        # process uses spend most of PyTorch's CPU time.
        "OMP_NUM_THREADS": "1",
        # A fifth of JAX's time: many tests compile what another one has.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if "--optimized" in job.options:
        quick = {}
    return {**quick, **os.environ, "KERAS_BACKEND": job.backend}


def run(job, cache):
    """Runs the tests of one job; returns its `Outcome`.

    Args:
        job: `Job`.
        cache: str, a folder that is empty when the first job starts.
    """
    process = subprocess.Popen(
        [sys.executable, *COMMAND, *job.options],
        env=environment_of(job, cache),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process.stdout:
        for line in process.stdout:
            print(f"[{job.backend} {job.part}] {line}", end="", flush=True)
    # `wait` would give the exit code alone.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(job, process.returncode, seconds)


def failures(outcomes, selected):
    """What keeps a run from having passed, as sentences.

    Args:
        outcomes: list of `Outcome`.
        selected: bool, whether options may have left a part without tests.
    """
    found = []
    for job, code, _ in outcomes:
        if code and not (code == NO_TESTS and selected):
            found.append(f"{job.backend} {job.part}: exit code {code}")
    for backend in dict.fromkeys(job.backend for job, _, _ in outcomes):
        codes = {code for job, code, _ in outcomes if job.backend == backend}
        if codes == {NO_TESTS}:
            found.append(
                f"{backend}: no test was run; `--every-backend` runs also "
                "those that another backend runs for it"
            )
    return found


def today():
    return datetime.date.today().toordinal()


def cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--backends", default=BACKENDS)
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument(
        "--rotation-day",
        default="0",
        help="a number or `today`: moves tests of one backend to the next",
    )
    parser.add_argument(
        "--backend-of-the-day",
        action="store_true",
        help="run one of the backends, another one tomorrow",
    )
    arguments, options = parser.parse_known_args()
    backends = arguments.backends.replace(",", " ").split()
    # Looked up once, so that a run over midnight leaves out no test.
    now = today()
    day = now if arguments.rotation_day == "today" else arguments.rotation_day
    if arguments.backend_of_the_day:
        backends = [sorted(backends)[now % len(backends)]]
    options.append(f"--rotation-day={day}")
    jobs = jobs_of(backends, options)
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        outcomes = list(pool.map(run, jobs, [cache] * len(jobs)))
    print()
    for job, code, seconds in outcomes:
        outcome = {0: "passed", NO_TESTS: "no tests"}.get(
            code, f"FAILED (exit code {code})"
        )
        print(
            f"==== {job.backend} {job.part}: {outcome}, "
            f"{seconds:.0f} CPU seconds"
        )
    total = sum(outcome.seconds for outcome in outcomes)
    print(f"==== {total:.0f} CPU seconds, {total / 60:.1f} minutes")
    selected = any(o.startswith(("-k", "-m")) for o in options) or not any(
        job.part in PARTS for job in jobs
    )
    problems = failures(outcomes, selected)
    for problem in problems:
        print(f"==== FAILED: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
