"""`python -m keras_randadapt`: what it prints and its exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import _start
from keras_randadapt import command_line
from tests import adapter_files
from tests import zoo

pytestmark = pytest.mark.one_backend


@pytest.fixture
def path(tmp_path):
    return _saved(tmp_path / "a.safetensors")


def _saved(path, adapter=None, seed=0, **arguments):
    model, _, _ = zoo.classifier()
    adapter = kra.RLoRA(5, seed=2) if adapter is None else adapter
    kra.inject(model, adapter, keep_trainable="logits", **arguments)
    zoo.randomize(model, arguments.get("name", "default"), seed=seed)
    kra.save_adapter(model, path, preset="tiny")
    return str(path)


def test_inspect(path, capsys):
    assert command_line.main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}\n")
    for words in (
        "version 2",
        "RLoRA 'default'",
        "rank=5, ",
        "seed=2",
        "tiny",
        "kept layers",
    ):
        assert words in out
    model, _, _ = zoo.classifier()
    report = kra.load_adapter(model, path)
    for address in report.sites:
        assert address in out
    assert kra.status(model)[0].base_digest in out


def test_inspect_for_programs(path, capsys):
    assert command_line.main(["inspect", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "RLoRA" and told["config"]["seed"] == 2
    assert told["bytes"] == os.path.getsize(path)
    model, _, _ = zoo.classifier()
    report = kra.load_adapter(model, path)
    assert told["parameters"] == report.adapter_parameters
    assert list(told["sites"]) == sorted(report.sites)
    assert all(site["values"] > 0 for site in told["sites"].values())
    assert told["finite"] is True and told["weight"] == 1.0


def test_inspect_tells_of_what_load_adapter_refuses(path, capsys):
    tensors, metadata = adapter_files.read(path)
    key = next(iter(metadata["kept"])) + "#0"
    adapter_files.edit(path, tensors={key: np.nan * tensors[key]})
    assert command_line.main(["inspect", path]) == 0
    assert "NaN or infinity" in capsys.readouterr().out


def test_file_of_the_first_version(path, capsys):
    adapter_files.as_version_1(path)
    assert command_line.main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "version 1" in out and "not told" in out


def test_equal_files(path, tmp_path, capsys):
    other = _saved(tmp_path / "b.safetensors")
    assert command_line.main(["diff", path, other]) == 0
    assert capsys.readouterr().out == ""
    assert command_line.main(["diff", path, other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adapter": kra.RLoRA(5, seed=3)}, ["config seed: 2 | 3"]),
        ({"adapter": kra.VeRA(5)}, ["method: RLoRA | VeRA"]),
        ({"adapter": kra.RLoRA(6, seed=2)}, ["config rank: 5 | 6", "of shape"]),
        ({"name": "b"}, ["name: default | b"]),
        ({"seed": 1}, ["values of ", "apart by "]),
    ],
)
def test_different_files(path, tmp_path, capsys, arguments, words):
    other = _saved(tmp_path / "b.safetensors", **arguments)
    assert command_line.main(["diff", path, other]) == 1
    out = capsys.readouterr().out
    for one in words:
        assert one in out
    assert command_line.main(["diff", path, other, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found and all(set(f) == {"what", "first", "second"} for f in found)


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_errors(path, tmp_path, capsys, command):
    for bad in (str(tmp_path / "nowhere"), str(tmp_path), __file__):
        files = [bad] if command == "inspect" else [path, bad]
        assert command_line.main([command, *files]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and bad in captured.err
    with pytest.raises(SystemExit) as raised:
        command_line.main([command])
    assert raised.value.code == 2
    with pytest.raises(SystemExit) as raised:
        command_line.main([])
    assert raised.value.code == 2


def test_process(path, tmp_path):
    """It starts no backend, whatever the user's is."""
    code = (
        "import runpy, sys; sys.argv = ['x', 'convert', *sys.argv[1:]];"
        "sys.orig_argv = ['python', '-m', 'keras_randadapt'];"
        "\ntry: runpy.run_module('keras_randadapt', run_name='__main__')"
        "\nexcept SystemExit as end: assert not end.code"
        "\nimport keras; assert keras.config.backend() == 'numpy'"
        "\nassert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(tmp_path / "lora")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "RLoRA 'default' as a LoRA" in done.stdout
    assert command_line.described(tmp_path / "lora")["method"] == "LoRA"
    done = subprocess.run(
        [sys.executable, "-m", "keras_randadapt", "inspect", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "no file 'nowhere'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["python", "-m", "keras_randadapt", "inspect"], True),
        (["python", "-W", "error", "-m", "keras_randadapt"], True),
        (["python", "-m", "other"], False),
        (["python", "-m"], False),
        (["python", "train.py"], False),
        ([], False),
    ],
)
def test_what_is_the_command(arguments, expected):
    assert _start.is_command(arguments) is expected
