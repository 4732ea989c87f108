"""Plans of transforms, and tests in processes of their own."""

import os
import pathlib
import subprocess
import sys

from keras_randadapt import random
from keras_randadapt.ops import RandomizedTransform

ROOT = pathlib.Path(__file__).parents[1]


def make(order, stages, inputs, outputs, gather=False, scatter=False):
    """A plan with random signs, rows kept and rows filled."""
    signs = random.signs(0, "test", (stages, order))
    return RandomizedTransform(
        order,
        signs,
        inputs,
        outputs,
        random.permutation(0, "in", order)[:inputs] if scatter else None,
        random.permutation(0, "out", order)[:outputs] if gather else None,
    )


def run_apart(path, *options, **environment):
    """Runs a file of tests in a process of its own; all of it has to pass."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, path],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout
