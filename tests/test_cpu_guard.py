"""A fast test that takes much CPU time fails, and others do not."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import cpu_guard

pytestmark = pytest.mark.one_backend

ROOT = pathlib.Path(__file__).parents[1]
CONFTEST = """
from tests import cpu_guard
cpu_guard.LIMIT = 0.1
"""
TESTS = """
import subprocess
import sys
import pytest
from tests.cpu_guard import cpu_seconds

BURN = '''
import os
while sum(os.times()[:4]) < 0.3:
    pass
'''

def burn(seconds=0.3):
    end = cpu_seconds() + seconds
    while cpu_seconds() < end:
        pass

@pytest.fixture(scope="module")
def shared():
    burn()

@pytest.fixture
def own():
    burn()

def test_idle():
    pass

def test_shared(shared):
    pass

@pytest.mark.slow
def test_slow():
    burn()

@pytest.mark.cpu_seconds(30, reason="it burns")
def test_marked():
    burn()

def test_too_long():
    burn()

def test_own(own):
    pass

def test_child():
    subprocess.run([sys.executable, "-c", BURN], check=True)

@pytest.mark.cpu_seconds(0.05, reason="a lower limit")
def test_marked_and_too_long():
    burn()

@pytest.mark.slow
@pytest.mark.cpu_seconds(0.05, reason="a slow test with a limit")
def test_slow_and_too_long():
    burn()
"""


def test_in_a_session(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "test_times.py").write_text(TESTS)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.cpu_guard"]
        + ["-p", "no:cacheprovider", "-rA", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    outcomes = dict(
        reversed(line.split(" - ")[0].split(" test_times.py::"))
        for line in result.stdout.splitlines()
        if line.startswith(("PASSED ", "FAILED "))
    )
    failed = {name for name, how in outcomes.items() if how == "FAILED"}
    assert len(outcomes) == 9, result.stdout
    assert failed == {
        "test_too_long",
        "test_own",
        "test_child",
        "test_marked_and_too_long",
        "test_slow_and_too_long",
    }
    assert "Make it smaller, mark it `slow`" in result.stdout
    assert "test_shared (fixture shared)" in result.stdout


def test_slow_machines_have_more_time(monkeypatch):
    assert cpu_guard.slowness() >= 1
    monkeypatch.setattr(cpu_guard, "REFERENCE", cpu_guard.REFERENCE / 100)
    assert cpu_guard.slowness() > 10
