"""Every backbone of KerasHub takes adapters, and its page says where.

`make test` meets a twentieth of them, picked by a checksum of the change log:
a run can be repeated on the same sources, in an archive without history too,
and the next change that users notice picks others. `make test-full` meets all,
each on one backend, and on another one the next day.
"""

import pathlib

import pytest

from tests import rotation
from tests.backbones import invariants
from tests.backbones import page
from tests.backbones import row as row_lib
from tests.backbones import tables

ROOT = pathlib.Path(__file__).parents[1]
PARTS = 20
TURN = rotation.checksum((ROOT / "CHANGELOG.md").read_text()) % PARTS


def _cases():
    exported = tables.exported()
    for number, (name, row) in enumerate(tables.ROWS.items()):
        # A twentieth has numbers that differ by 20, so it meets all backends.
        marks = [
            pytest.mark.one_backend(number),
            pytest.mark.cpu_seconds(120, reason="a whole model, and its files"),
        ]
        if number % PARTS != TURN:
            marks.append(pytest.mark.slow("its turn in `make test` will come"))
        if name not in exported:
            reason = f"KerasHub has it from {tables.SINCE[name]} on"
            marks.append(pytest.mark.skip(reason=reason))
        yield pytest.param(name, row, id=name, marks=marks)


@pytest.mark.parametrize(("name", "row"), list(_cases()))
class TestEach:
    def test_invariants(self, name, row, tmp_path):
        lacking = row_lib.lacks(row)
        if lacking:
            # The page says so.
            with pytest.raises(ModuleNotFoundError, match=lacking):
                invariants.check(row, tmp_path)
        else:
            invariants.check(row, tmp_path)

    def test_page(self, name, row):
        lacking = row_lib.lacks(row)
        if lacking:
            pytest.skip(f"It can't be built without {lacking}.")
        if not page.is_of_this_version():
            pytest.skip("The page is of another version of KerasHub.")
        assert page.written()[name] == page.line_of(name, row), (
            f"docs/backbones.md is old: run `{page.COMMAND}`."
        )


@pytest.mark.one_backend
class TestTables:
    def test_all_are_there(self):
        exported = set(tables.exported())
        later = set(tables.ROWS) - exported
        assert exported <= set(tables.ROWS)
        assert later <= set(tables.SINCE)

    def test_page_has_all(self):
        assert list(page.written()) == list(tables.ROWS)

    def test_every_turn_meets_all_backends(self):
        backends = ["jax", "tensorflow", "torch"]
        for turn in range(PARTS):
            met = {
                rotation.backend_of(number, "", backends)
                for number in range(turn, len(tables.ROWS), PARTS)
            }
            assert met == set(backends)
