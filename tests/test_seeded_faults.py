"""The list of seeded faults fits the package as it is."""

import pytest

from tests import seeded_faults

pytestmark = pytest.mark.one_backend


def test_every_fault_applies():
    names = [fault.name for fault in seeded_faults.FAULTS]
    assert len(names) >= 100 and len(set(names)) == len(names)
    assert seeded_faults.check(seeded_faults.FAULTS, seeded_faults.ROOT) == {}
