"""The check of `make lint` finds what is public and has no type."""

import pytest

import keras_randadapt as kra
from tools import check_types

pytestmark = pytest.mark.one_backend

SOURCE = """
def function(x):
    pass


def complete(x: int, *more: int) -> None:
    pass


class Thing:
    def __init__(self, size):
        pass

    @property
    def area(self):
        pass

    def _private(self, x):
        pass


def maker() -> Thing:
    pass
"""
OF_THING = ["Thing.__init__: `size`", "Thing.area: the return"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("function", ["function: `x`", "function: the return"]),
        ("complete", []),
        ("Thing", OF_THING),
        ("maker", OF_THING),
    ],
)
def test_it_is_named(monkeypatch, capsys, name, expected):
    namespace = {"__name__": "keras_randadapt.things"}
    exec(compile(SOURCE, "keras_randadapt/things.py", "exec"), namespace)
    monkeypatch.setattr(kra, "inject", namespace[name])
    assert check_types.main() == bool(expected)
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected)
    for line, what in zip(lines, expected):
        assert line.startswith("keras_randadapt/things.py:")
        assert line.endswith(f"{what} has no type")


def test_all_has_types(capsys):
    assert check_types.main() == 0, capsys.readouterr().out
