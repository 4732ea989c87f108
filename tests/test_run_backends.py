"""The queue of jobs, and what makes a run fail."""

import sys

import pytest

from tests import run_backends
from tests.run_backends import Job
from tests.run_backends import Outcome

pytestmark = pytest.mark.one_backend


def test_jobs():
    jobs = run_backends.jobs_of(["jax", "torch"], ["-m", "not slow"])
    assert [(j.backend, j.part) for j in jobs] == [
        ("jax", "others"),
        ("torch", "others"),
        ("jax", "matrix"),
        ("torch", "matrix"),
    ]
    for job in jobs:
        assert job.options[1:] == ["--rotate=jax,torch", "-m", "not slow"]
    # Every test file is in one part.
    others, matrix = (job.options[0] for job in jobs[::2])
    assert others == f"--ignore={matrix}"
    assert (run_backends.ROOT / matrix).exists()


@pytest.mark.parametrize("path", ["tests/ops", "tests/test_lora.py::TestX"])
def test_named_tests_are_one_job_a_backend(path):
    jobs = run_backends.jobs_of(["jax", "torch"], ["-x", path])
    assert [job.options for job in jobs] == [
        ["--rotate=jax,torch", "-x", path]
    ] * 2


def test_values_of_options_name_no_tests():
    options = ["-k", "tests", "--deselect", "tests/test_lora.py"]
    jobs = run_backends.jobs_of(["jax"], options)
    assert [job.part for job in jobs] == ["others", "matrix"]


def _outcomes(*codes):
    names = [(b, p) for b in ("jax", "torch") for p in ("matrix", "others")]
    return [Outcome(Job(*n, []), c, 1.0) for n, c in zip(names, codes)]


@pytest.mark.parametrize(
    "codes, selected, found",
    [
        ((0, 0, 0, 0), False, []),
        ((0, 0, 5, 0), True, []),
        ((0, 0, 5, 0), False, ["torch matrix: exit code 5"]),
        ((0, 1, 0, -9), True, ["jax others: exit", "torch others: exit"]),
        ((0, 0, 5, 5), True, ["torch: no test was run"]),
    ],
)
def test_failures(codes, selected, found):
    problems = run_backends.failures(_outcomes(*codes), selected)
    assert len(problems) == len(found)
    for problem, start in zip(problems, found):
        assert problem.startswith(start)


def test_cpu_time_of_a_job(monkeypatch, capfd):
    """The process's own and that of the processes it waited for."""
    burn = "import os\nwhile sum(os.times()[:2]) < 0.3: pass\n"
    code = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "print(os.environ['KERAS_BACKEND'])\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(run_backends, "COMMAND", ["-c", code])
    outcome = run_backends.run(Job("numpy", "part", []), "cache")
    assert outcome.code == 3
    assert 0.3 <= outcome.seconds < 5
    assert "[numpy part] numpy\n" in capfd.readouterr().out


def test_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    found = run_backends.environment_of(Job("jax", "part", []), "cache")
    assert found["KERAS_BACKEND"] == "jax"
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["JAX_COMPILATION_CACHE_DIR"] == "cache"
    full = run_backends.environment_of(
        Job("jax", "x", ["--optimized"]), "cache"
    )
    assert "JAX_COMPILATION_CACHE_DIR" not in full


@pytest.mark.parametrize(
    "arguments, backends, day",
    [
        ([], ["jax", "tensorflow", "torch"], "0"),
        (["--backends", "torch jax"], ["torch", "jax"], "0"),
        (["--rotation-day", "5"], ["jax", "tensorflow", "torch"], "5"),
    ],
)
def test_arguments(arguments, backends, day, monkeypatch, capsys):
    jobs = []

    def run(job, cache):
        jobs.append(job)
        return Outcome(job, 0, 30.0)

    monkeypatch.setattr(run_backends, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["run_backends.py", *arguments, "-m", "not slow"]
    )
    assert run_backends.main() == 0
    assert {job.backend for job in jobs} == set(backends)
    assert len(jobs) == 2 * len(backends)
    for job in jobs:
        assert job.options[-3:] == ["-m", "not slow", f"--rotation-day={day}"]
    out = capsys.readouterr().out
    assert f"==== {60 * len(backends)} CPU seconds" in out


def test_another_backend_every_day(monkeypatch, capsys):
    met = []
    monkeypatch.setattr(
        run_backends,
        "run",
        lambda job, _: met.append(job) or Outcome(job, 0, 0),
    )
    monkeypatch.setattr(
        sys, "argv", ["run_backends.py", "--backend-of-the-day"]
    )
    for day in range(738_000, 738_003):
        monkeypatch.setattr(run_backends, "today", lambda day=day: day)
        run_backends.main()
    assert sorted(job.backend for job in met) == sorted(
        2 * ["jax", "tensorflow", "torch"]
    )
