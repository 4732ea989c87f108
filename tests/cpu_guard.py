"""A pytest plugin: a fast test that takes much CPU time fails.

The time is that of the process and of its children, user and system. It does
not grow when others use the machine, as wall clock does, and a fixed loop that
is measured beside the tests says how slow the machine is. The set-up of what
tests share, in fixtures of a wider scope than a function, counts apart.
"""

import json
import os
import time

import numpy as np
import pytest

#: CPU seconds of a fast test, on the machine where `REFERENCE` was measured.
LIMIT = 5.0
#: CPU seconds of `fixed_loop` on that machine, otherwise idle.
REFERENCE = 0.035


def cpu_seconds():
    """User and system time of this process and of the children it reaped."""
    times = os.times()
    return (
        times.user + times.system + times.children_user + times.children_system
    )


def fixed_loop():
    """Work of Python and of NumPy in about equal parts, always the same."""
    total = 0
    for i in range(400_000):
        total += i * i % 7
    x = np.linspace(0.0, 1.0, 100_000)
    for _ in range(120):
        x = np.sqrt(x * x + 1e-3)
    return total + float(x[0])


def slowness(repeats=3):
    """How many times slower than the reference the machine is; at least 1."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        fixed_loop()
        best = min(best, time.thread_time() - start)
    return max(1.0, best / REFERENCE)


class Guard:
    """Measures every test, and fails those that take too long."""

    def __init__(self, record=None):
        self.record = record
        self.factor = slowness()
        self.started = 0.0
        self.shared = 0.0
        self.name = ""
        self.slowest = []

    def limit(self, item):
        """CPU seconds of this machine that a test may take, or None."""
        mark = item.get_closest_marker("cpu_seconds")
        if mark:
            return mark.args[0] * self.factor
        if item.get_closest_marker("slow"):
            return None
        return LIMIT * self.factor

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        self.started, self.shared = cpu_seconds(), 0.0
        self.name = item.nodeid
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        # Fixtures that this one asks for were set up before it.
        start = cpu_seconds()
        try:
            return (yield)
        finally:
            spent = cpu_seconds() - start
            self.shared += spent
            self._keep(f"{self.name} (fixture {fixturedef.argname})", spent)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        result = yield
        spent = cpu_seconds() - self.started - self.shared
        self._keep(item.nodeid, spent)
        limit = self.limit(item)
        if limit is not None and spent > limit:
            # The machine may have become slower since the last look.
            self.factor = max(self.factor, slowness())
            limit = self.limit(item)
            if spent > limit:
                pytest.fail(
                    f"The test took {spent:.1f} CPU seconds, and a fast one "
                    f"may take {limit:.1f} on this machine. Make it smaller, "
                    "mark it `slow`, or mark it "
                    "`cpu_seconds(limit, reason=...)`.",
                    pytrace=False,
                )
        return result

    def pytest_terminal_summary(self, terminalreporter):
        if not self.slowest:
            return
        terminalreporter.section("most CPU seconds")
        for seconds, name in sorted(self.slowest, reverse=True)[:10]:
            terminalreporter.line(f"{seconds:7.2f} {name}")
        terminalreporter.line(
            f"This machine is {self.factor:.1f} times slower than the "
            "reference of the limits."
        )

    def _keep(self, name, seconds):
        if seconds > 0.2:
            self.slowest.append((seconds, name))
        if self.record:
            with open(self.record, "a") as file:
                file.write(json.dumps([name, round(seconds, 3)]) + "\n")


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-times",
        metavar="FILE",
        help="append the CPU seconds of every test, as lines of JSON",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "cpu_seconds(limit, reason): CPU seconds that this test may take",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """After collection, so that imports have been paid for."""
    config = session.config
    if not config.option.collectonly:
        config.pluginmanager.register(Guard(config.option.cpu_times))
