import os
import subprocess
import sys

import many_tasks as example
import pytest
import reporting

pytestmark = pytest.mark.one_backend


def test_quick_decides_what_is_not_given():
    arguments = example.parse_arguments(["--quick"])
    assert (arguments.seeds, arguments.epochs) == (2, 6)
    arguments = example.parse_arguments(["--quick", "--epochs", "3"])
    assert (arguments.seeds, arguments.epochs) == (2, 3)
    arguments = example.parse_arguments([])
    assert (arguments.seeds, arguments.epochs) == (3, 16)


def test_percent():
    assert example.percent([0.75]) == "75.0"
    assert example.percent([0.75, 0.85]) == "80.0 +- 7.1"


def test_picture(tmp_path):
    accuracies = {
        "one": {"films": [0.7, 0.8], "tweets": [0.9, 0.8]},
        "other": {"films": [0.6, 0.7], "tweets": [0.8, 0.7]},
    }
    reporting.plot_tasks(accuracies, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow(reason="four processes load a pretrained encoder")
def test_whole_run(tmp_path):
    root = os.path.dirname(os.path.dirname(example.__file__))
    result = subprocess.run(
        [sys.executable, example.__file__, "--tasks", "films", "tweets"]
        + ["--seeds", "1", "--epochs", "1", "--train-examples", "16"]
        + ["--validation-examples", "20", "--output-dir", str(tmp_path / "out")]
        + ["--second-backend", "torch"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "16 answers in one batch on jax equal those" in result.stdout
    assert "16 answers in one batch on torch equal those" in result.stdout
    assert "16 answers of the SavedModel in one batch" in result.stdout
    assert (tmp_path / "out/accuracy.png").exists()
    file = tmp_path / "out/adapters/films.safetensors"
    assert file.stat().st_size < 60_000
