"""Stages of a program with their times, and other programs in processes."""

import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent


class Stages:
    """Prints the title of each stage and records its time."""

    def __init__(self):
        self.seconds = {}
        self._title = None

    def begin(self, title):
        self.end()
        print(f"\n== {title}", flush=True)
        self._title, self._start = title, time.perf_counter()

    def end(self):
        if self._title:
            elapsed = time.perf_counter() - self._start
            self.seconds[self._title] = elapsed
            self._title = None

    def table(self):
        """The seconds of each stage and of all, as lines of text."""
        rows = [*self.seconds.items(), ("in all", sum(self.seconds.values()))]
        return "\n".join(f"  {seconds:6.0f}  {name}" for name, seconds in rows)


def run_script(script, *arguments, backend=None):
    """Runs another example in its own process."""
    environment = dict(os.environ)
    if backend:
        environment["KERAS_BACKEND"] = backend
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)
