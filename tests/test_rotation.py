"""No test gets lost between the backends of a run."""

import collections
import itertools

import pytest

from tests import rotation
from tests import test_matrix

pytestmark = pytest.mark.one_backend

BACKENDS = ["jax", "tensorflow", "torch"]


@pytest.mark.parametrize("choice", [None, 0, 1, 2, 11, "jax", "torch", "numpy"])
@pytest.mark.parametrize("backends", [BACKENDS, ["torch", "jax"], ["jax"]])
def test_a_test_meets_every_backend_once_in_as_many_days(choice, backends):
    met = [
        rotation.backend_of(choice, "tests/test_x.py::test_y", backends, day)
        for day in range(738_000, 738_000 + len(backends))
    ]
    assert sorted(met) == sorted(backends)


def test_every_process_chooses_alike():
    names = [f"tests/test_x.py::test_{i}" for i in range(30)]
    for order in itertools.permutations(BACKENDS):
        chosen = [rotation.backend_of(None, n, list(order)) for n in names]
        assert chosen[:4] == [
            "tensorflow",
            "tensorflow",
            "jax",
            "torch",
        ]
        assert set(chosen) == set(BACKENDS)
    assert rotation.backend_of("torch", "x", BACKENDS) == "torch"
    assert rotation.backend_of("torch", "x", ["jax", "tensorflow"]) in (
        "jax",
        "tensorflow",
    )


def _check_spread(cells, numbers):
    for axis in (0, 1):
        lines = collections.defaultdict(list)
        for cell in cells:
            lines[cell[axis]].append(numbers[cell])
        for line, found in lines.items():
            assert len(set(found)) == min(3, len(found)), line


def test_spread():
    cells = [(r, c) for r in "abcdefg" for c in "hijklmnop"]
    numbers = rotation.spread(cells)
    _check_spread(cells, numbers)
    counts = collections.Counter(numbers.values())
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("full", [False, True])
def test_methods_and_models_of_the_matrix_meet_every_backend(full):
    """Where they have three cases, in `make test` and in `make test-full`."""
    numbers = {}
    everywhere = set()
    for case in test_matrix._cases():
        (cell,) = case.values
        marks = {mark.name: mark for mark in case.marks}
        if "slow" in marks and not full:
            continue
        if "one_backend" in marks:
            (numbers[cell],) = marks["one_backend"].args
        else:
            everywhere.add(cell)
    assert {c for c in everywhere if c[1] == "dense"} == {
        (m, "dense") for m in ("lora", "rlora", "randlora", "rmlora")
    }
    assert len(everywhere) == 15
    for axis in (0, 1):
        lines = collections.defaultdict(set)
        for cell, number in numbers.items():
            lines[cell[axis]].add(number)
        counts = collections.Counter(cell[axis] for cell in numbers)
        at_every = {cell[axis] for cell in everywhere}
        for line, found in lines.items():
            if line not in at_every:
                assert len(found) == min(3, counts[line]), line
