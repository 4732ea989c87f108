"""`python -m keras_randadapt` on directories of PEFT."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from keras_randadapt import command_line
from tests.peft import directories
from tests.peft import families
from tests.peft import hub

pytestmark = pytest.mark.one_backend

_MODULES = [
    name.removeprefix("base_model.model.") for name in directories.modules()
]


@pytest.fixture
def folder(tmp_path):
    directories.write(
        tmp_path / "a",
        config={
            "base_model_name_or_path": "org/base",
            "lora_dropout": 0.1,
            "task_type": "CAUSAL_LM",
        },
    )
    return tmp_path / "a"


def _run(*arguments):
    return command_line.main([str(one) for one in arguments])


def _patterned(folder):
    """rsLoRA whose ranks and alphas differ by module."""
    module = directories.START.format(1, "q")
    generator = np.random.default_rng(1)
    return directories.write(
        folder,
        {
            f"{module}.lora_A.weight": generator.normal(size=(3, 24)),
            f"{module}.lora_B.weight": generator.normal(size=(24, 3)),
        },
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 6},
            "use_rslora": True,
        },
    )


def _deltas(folder):
    """dict from module to the update, as any reader of the form has it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight"): tensors[
            key.replace("lora_A", "lora_B")
        ]
        @ array
        for key, array in tensors.items()
        if key.endswith(".lora_A.weight")
    }


# Inspect.


def test_inspect(folder, capsys):
    assert _run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}\n")
    lines = dict(line.split(None, 1) for line in out.splitlines()[1:])
    assert lines["adapter"] == "LoRA" and lines["rank"] == "2"
    assert lines["scaling"] == "2" and lines["dtype"] == "F32"
    assert lines["dropout"] == "0.1" and lines["sites"] == "4"
    assert "base model    org/base" in out
    for module in _MODULES:
        assert module in out
    assert "24x12          72  model.layers.1.self_attn.v_proj" in out


def test_inspect_for_programs(folder, capsys):
    assert _run("inspect", folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    weights = folder / "adapter_model.safetensors"
    assert told["bytes"] == os.path.getsize(weights)
    assert told["parameters"] == 2 * (2 * 48 + 2 * 36)
    assert told["finite"] is True and told["refused"] is None
    assert told["sites"][_MODULES[0]] == {
        "shape": "24x24",
        "rank": 2,
        "scaling": 2.0,
        "values": 96,
    }
    assert command_line.described(str(folder)) == told


def test_inspect_tells_ranges(tmp_path, capsys):
    _patterned(tmp_path / "a")
    assert _run("inspect", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "adapter       rsLoRA" in out and "rank          2 to 3" in out
    assert "scaling       2.3094 to 4.24264" in out


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({}, {"peft_type": "BOFT"}, ["adapter       BOFT", "type 'BOFT'"]),
        ({}, {"peft_type": ["x"]}, ["the type ['x']"]),
        ({}, {"bias": "all"}, ["not loaded", "biases of the base model"]),
        (
            {f"{directories.START.format(0, 'q')}.lora_B.weight": None},
            {},
            ["not loaded", "lacks"],
        ),
        (
            {
                f"{directories.START.format(0, 'q')}.lora_A.weight": np.full(
                    (2, 24), np.nan
                )
            },
            {},
            ["values        NaN or infinity"],
        ),
        (
            {"base_model.model.score.weight": np.ones((2, 24))},
            {},
            ["kept tensors  score.weight"],
        ),
    ],
)
def test_inspect_tells_of_what_load_refuses(
    tensors, config, words, tmp_path, capsys
):
    directories.write(tmp_path / "a", tensors, config)
    assert _run("inspect", tmp_path / "a") == 0
    out = capsys.readouterr().out
    for one in words:
        assert one in out


def test_no_escape_sequence_reaches_the_terminal(folder, capsys):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "\x1b[2J\x1b]0;x\x07"
    path.write_text(json.dumps(config))
    assert _run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and "\x1b" not in out and "\x07" not in out
    shutil.copytree(folder, folder.parent / "b")
    (folder.parent / "b" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "\x1b[3J"})
    )
    assert _run("diff", folder, folder.parent / "b") == 1
    assert "\x1b" not in capsys.readouterr().out
    tensors = {"\x1b[2J": np.zeros(2, "float32")}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    assert _run("convert", folder, folder.parent / "c") == 2
    assert "\x1b" not in capsys.readouterr().err


# Diff.


def test_equal_directories(folder, capsys):
    other = folder.parent / "b"
    shutil.copytree(folder, other)
    assert _run("diff", folder, other) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({}, {"lora_alpha": 8}, ["config lora_alpha: 4 | 8", "apart by 50 %"]),
        ({}, {"base_model_name_or_path": "x"}, ["base_model: None | x"]),
        ({}, {"use_dora": True}, ["method: LoRA | DoRA", "refused: None | "]),
        (
            {
                f"{directories.START.format(0, 'q')}.lora_B.weight": np.ones(
                    (24, 2)
                )
            },
            {},
            ["update of model.layers.0.self_attn.q_proj: norm "],
        ),
        (
            {
                f"{directories.START.format(0, 'q')}.lora_B.weight": np.ones(
                    (30, 2)
                )
            },
            {},
            ["module model.layers.0.self_attn.q_proj: linear (24, 24) | "],
        ),
        (
            {"base_model.model.score.weight": np.ones((2, 24))},
            {},
            ["score.weight: nothing | float32 of shape (2, 24)"],
        ),
        ({}, {"peft_type": "BOFT", "r": 3}, ["method: LoRA | BOFT", "r: 2"]),
    ],
)
def test_different_directories(tensors, config, words, tmp_path, capsys):
    directories.write(tmp_path / "a")
    directories.write(tmp_path / "b", tensors, config)
    assert _run("diff", tmp_path / "a", tmp_path / "b") == 1
    out = capsys.readouterr().out
    for one in words:
        assert one in out
    assert _run("diff", tmp_path / "a", tmp_path / "b", "--json") == 1
    assert all(
        set(one) == {"what", "first", "second"}
        for one in json.loads(capsys.readouterr().out)
    )


def test_the_same_update_in_another_form(tmp_path, capsys):
    """Only forms differ after a conversion, and no update does."""
    _patterned(tmp_path / "a")
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 0
    capsys.readouterr()
    assert _run("diff", tmp_path / "a", tmp_path / "b", "--json") == 1
    found = [one["what"] for one in json.loads(capsys.readouterr().out)]
    assert f"form of {_MODULES[0]}" in found and "method" in found
    assert not [one for one in found if "update" in one or "tensor" in one]
    # Only what says something of the adapter is told.
    assert {one for one in found if "config" in one} == {
        "config alpha_pattern",
        "config lora_alpha",
        "config r",
        "config rank_pattern",
        "config use_rslora",
    }


# Convert.


def test_convert_makes_the_canonical_form(tmp_path, capsys):
    content = _patterned(tmp_path / "a")
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert out.startswith("rsLoRA as PEFT's LoRA of rank 3: ")
    deltas = _deltas(tmp_path / "b")
    for module in directories.modules():
        rank = 3 if "layers.1.self_attn.q" in module else 2
        alpha = 6 if "v_proj" in module else 4
        a = content[f"{module}.lora_A.weight"]
        b = content[f"{module}.lora_B.weight"]
        np.testing.assert_allclose(
            deltas[module], alpha / rank**0.5 * b @ a, atol=1e-5
        )
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| converted from | rsLoRA |" in card and _MODULES[3] in card


def test_convert_and_load(tmp_path):
    """The converted directory computes in Keras what the first one did."""
    model = hub.llama()
    x = families.inputs(model)
    _patterned(tmp_path / "a")
    _run("convert", tmp_path / "a", tmp_path / "b")
    outputs = []
    for name in "ab":
        kra.peft.load(model, tmp_path / name)
        outputs.append(families.keras_outputs(model, x))
        kra.eject(model)
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_convert_keeps_what_is_beside_the_factors(tmp_path, capsys):
    module = directories.START.format(0, "q")
    a = np.zeros((2, 24))
    a[0] = 1.0
    magnitudes = {
        f"{one}.lora_magnitude_vector": np.arange(1, n + 1, dtype=float)
        for one in directories.modules()
        for n in [24 if "q_proj" in one else 12]
    }
    directories.write(
        tmp_path / "a",
        {
            **magnitudes,
            f"{module}.lora_A.weight": a,
            "base_model.model.score.weight": np.ones((2, 24)),
        },
        {
            "use_dora": True,
            "modules_to_save": ["score"],
            "task_type": "SEQ_CLS",
            "lora_dropout": 0.25,
            "base_model_name_or_path": "org/base",
        },
    )
    head = {"layers/x#0": np.ones((2,), "float32")}
    safetensors.numpy.save_file(head, tmp_path / "a" / "heads.safetensors")
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 0
    noted = capsys.readouterr().err
    assert "`modules_to_save` are carried over" in noted and "DoRA" in noted
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["modules_to_save"] == ["score"]
    assert config["task_type"] == "SEQ_CLS" and config["lora_dropout"] == 0.25
    assert config["base_model_name_or_path"] == "org/base"
    tensors = safetensors.numpy.load_file(
        tmp_path / "b" / "adapter_model.safetensors"
    )
    for key, values in magnitudes.items():
        np.testing.assert_array_equal(tensors[key], values)
    assert "base_model.model.score.weight" in tensors
    kept = safetensors.numpy.load_file(tmp_path / "b" / "heads.safetensors")
    np.testing.assert_array_equal(kept["layers/x#0"], head["layers/x#0"])


def test_convert_drops_what_no_module_uses(tmp_path, capsys):
    """Padding goes; a rank that is only untrained stays."""
    tensors = {}
    for module in directories.modules():
        n_out = 24 if "q_proj" in module else 12
        a, b = np.ones((5, 24)), np.ones((n_out, 5))
        a[3:], b[:, 2] = 0, 0
        tensors[f"{module}.lora_A.weight"] = a
        tensors[f"{module}.lora_B.weight"] = b
    directories.write(tmp_path / "a", tensors, {"r": 5, "lora_alpha": 5})
    assert _run("convert", tmp_path / "a", tmp_path / "b", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rank"] == 3 and set(told["ranks"].values()) == {3}
    assert _run("convert", tmp_path / "a", tmp_path / "c", "--rank", 1) == 0
    assert _run("convert", tmp_path / "a", tmp_path / "d", "--energy", 0.9) == 0
    for name in "cd":
        config = (tmp_path / name / "adapter_config.json").read_text()
        assert json.loads(config)["r"] == 1
    for module, delta in _deltas(tmp_path / "c").items():
        np.testing.assert_allclose(delta, 2.0, err_msg=module, rtol=1e-5)


def test_convert_reads_embeddings(tmp_path):
    module = "base_model.model.model.embed_tokens"
    directories.write(
        tmp_path / "a",
        {
            f"{module}.lora_embedding_A": np.ones((2, 61)),
            f"{module}.lora_embedding_B": np.ones((24, 2)),
        },
    )
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 0
    tensors = safetensors.numpy.load_file(
        tmp_path / "b" / "adapter_model.safetensors"
    )
    assert tensors[f"{module}.lora_embedding_A"].shape == (2, 61)
    np.testing.assert_array_equal(tensors[f"{module}.lora_embedding_B"], 2.0)


def test_convert_reads_convolutions(tmp_path):
    module = "base_model.model.vit.projection"
    generator = np.random.default_rng(0)
    a = generator.normal(size=(2, 3, 4, 4))
    b = generator.normal(size=(24, 2, 1, 1))
    tensors = dict.fromkeys(
        f"{one}.lora_{side}.weight"
        for one in directories.modules()
        for side in "AB"
    )
    tensors[f"{module}.lora_A.weight"] = a
    tensors[f"{module}.lora_B.weight"] = b
    directories.write(
        tmp_path / "a", tensors, {"target_modules": ["projection"]}
    )
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 0
    found = safetensors.numpy.load_file(
        tmp_path / "b" / "adapter_model.safetensors"
    )
    np.testing.assert_allclose(found[f"{module}.lora_A.weight"], a, rtol=1e-6)
    np.testing.assert_allclose(
        found[f"{module}.lora_B.weight"], 2 * b, rtol=1e-6
    )


def _vera(folder):
    """VeRA of two modules of different shapes, with its frozen matrices."""
    generator = np.random.default_rng(0)
    tensors = {
        "base_model.vera_A": generator.normal(size=(4, 40)),
        "base_model.vera_B": generator.normal(size=(24, 4)),
    }
    for module, n_out in (("q_proj", 24), ("v_proj", 12)):
        start = directories.START.format(0, module[0])
        tensors[f"{start}.vera_lambda_b"] = generator.normal(size=n_out)
        tensors[f"{start}.vera_lambda_d"] = generator.normal(size=4)
    missing = dict.fromkeys(
        f"{one}.lora_{side}.weight"
        for one in directories.modules()
        for side in "AB"
    )
    directories.write(
        folder,
        {**missing, **tensors},
        {
            "peft_type": "VERA",
            "r": 4,
            "lora_alpha": None,
            "save_projection": True,
        },
    )
    return tensors


@pytest.mark.parametrize("transposed", [False, True])
def test_convert_asks_the_base_for_shapes(transposed, tmp_path, capsys):
    tensors = _vera(tmp_path / "a")
    assert _run("inspect", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "adapter       VeRA" in out and "?x12" in out
    assert "rank          4" in out
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 2
    errors = capsys.readouterr().err
    assert (
        "--base-checkpoint" in errors and "keras_randadapt.peft.load" in errors
    )
    # Checkpoints may lack the prefix of task classes.
    weights = {
        f"layers.0.self_attn.{name}_proj.weight": np.zeros(shape, "float32")
        for name, shape in (("q", (24, 30)), ("v", (12, 30)))
    }
    (tmp_path / "base").mkdir()
    for number, (key, one) in enumerate(weights.items()):
        one = np.ascontiguousarray(one.T) if transposed else one
        safetensors.numpy.save_file(
            {key: one}, tmp_path / "base" / f"{number}.safetensors"
        )
    arguments = ("--base-checkpoint", tmp_path / "base")
    assert _run("convert", tmp_path / "a", tmp_path / "b", *arguments) == 0
    for module, delta in _deltas(tmp_path / "b").items():
        scale = tensors[f"{module}.vera_lambda_b"]
        b = scale[:, None] * tensors["base_model.vera_B"][: len(scale)]
        d = tensors[f"{module}.vera_lambda_d"][:, None]
        expected = b @ (d * tensors["base_model.vera_A"][:, :30])
        np.testing.assert_allclose(delta, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "has 0 tensors that may be the weight of the module"),
        ({"x": (24, 30)}, "has 0 tensors"),
        ({"weight": (24, 30)}, "has 0 tensors"),
        ({"self_attn.q_proj.weight": (24, 30)}, "v_proj"),
        (
            {
                f"{start}model.layers.0.self_attn.q_proj.weight": (24, 30)
                for start in ("a.", "b.")
            },
            "has 2 tensors",
        ),
        ({"model.layers.0.self_attn.q_proj.weight": (23, 30)}, "24 outputs"),
        ({"model.layers.0.self_attn.q_proj.weight": (24,)}, "24 outputs"),
        (
            {
                "model.layers.0.self_attn.q_proj.weight": (24, 50),
                "model.layers.0.self_attn.v_proj.weight": (12, 50),
            },
            "frozen matrix of shape",
        ),
    ],
)
def test_another_checkpoint_is_refused(shapes, message, tmp_path, capsys):
    _vera(tmp_path / "a")
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        {key: np.zeros(shape, "float32") for key, shape in shapes.items()}, path
    )
    arguments = ("--base-checkpoint", path)
    assert _run("convert", tmp_path / "a", tmp_path / "b", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_ia3_is_told_and_not_converted(tmp_path, capsys):
    tensors = dict.fromkeys(
        f"{one}.lora_{side}.weight"
        for one in directories.modules()
        for side in "AB"
    )
    module = directories.START.format(0, "q")
    tensors[f"{module}.ia3_l"] = np.ones((24, 1))
    directories.write(
        tmp_path / "a",
        tensors,
        {"peft_type": "IA3", "r": None, "lora_alpha": None},
    )
    assert _run("inspect", tmp_path / "a") == 0
    assert "?x24          24  model.layers.0" in capsys.readouterr().out
    assert _run("convert", tmp_path / "a", tmp_path / "b") == 2
    assert "is no low-rank update" in capsys.readouterr().err


def test_formats_are_not_mixed(folder, tmp_path, capsys):
    """Layers have other names in each, and only a model tells which."""
    model = hub.llama()
    kra.inject(model, kra.LoRA(2), ["query"])
    file = tmp_path / "a.safetensors"
    kra.save_adapter(model, file)
    for arguments in (
        ("diff", folder, file),
        ("diff", file, folder),
        ("convert", folder, tmp_path / "b.safetensors"),
        ("convert", file, folder),
    ):
        assert _run(*arguments) == 2
        errors = capsys.readouterr().err
        assert "keras_randadapt.peft.load" in errors
    assert _run("convert", file, tmp_path / "b", "--base-checkpoint", "x") == 2
    assert "is for directories of PEFT" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a", "a.safetensors"]


def _gone(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("adapter_config.json", _gone, "no file"),
        ("adapter_model.safetensors", _gone, "no file"),
        ("adapter_config.json", lambda p: p.write_text("[1]"), "an object"),
        (
            "adapter_config.json",
            lambda p: p.write_bytes(b'{"r":' + b"[" * 100_000),
            "is no JSON",
        ),
        (
            "adapter_model.safetensors",
            lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
            "is no safetensors file",
        ),
        (
            "adapter_model.safetensors",
            lambda p: (p.unlink(), p.symlink_to("/dev/zero")),
            "no regular file",
        ),
        (
            "adapter_model.safetensors",
            lambda p: p.rename(p.with_name("adapter_model.bin")),
            "a pickle",
        ),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "diff", "convert"])
def test_hostile_directories(command, name, edit, message, folder, capsys):
    good = folder.parent / "good"
    shutil.copytree(folder, good)
    edit(folder / name)
    others = {"inspect": (), "diff": (good,), "convert": (good.parent / "b",)}
    assert _run(command, folder, *others[command]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert str(folder) in captured.err
    assert not (folder.parent / "b").exists()


def test_what_convert_refuses(folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for arguments, message in (
        ((folder,), "Give another directory"),
        ((folder.parent / "link",), "Give another directory"),
        ((folder.parent / "x" / "y",), "There is no folder"),
        ((folder.parent / "b", "--rank", 0), "`rank`"),
        ((folder.parent / "b", "--energy", 2), "`energy`"),
    ):
        if not (folder.parent / "link").exists():
            (folder.parent / "link").symlink_to(folder)
        assert _run("convert", folder, *arguments) == 2
        assert message in capsys.readouterr().err
    module = directories.START.format(0, "q")
    directories.write(
        folder.parent / "c",
        {f"{module}.lora_B.weight": np.full((24, 2), 3e38)},
    )
    assert _run("convert", folder.parent / "c", folder.parent / "b") == 2
    assert "too large for float32" in capsys.readouterr().err
    assert not (folder.parent / "b").exists()
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_process(folder, tmp_path):
    """It starts no backend, and imports neither PEFT nor KerasHub."""
    code = (
        "import runpy, sys; sys.argv = ['x', *sys.argv[1:]];"
        "sys.orig_argv = ['python', '-m', 'keras_randadapt'];"
        "\ntry: runpy.run_module('keras_randadapt', run_name='__main__')"
        "\nexcept SystemExit as end: assert not end.code"
        "\nimport keras; assert keras.config.backend() == 'numpy'"
        "\nassert not {'torch', 'tensorflow', 'peft', 'transformers', "
        "'keras_hub'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(folder), tmp_path / "b"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "LoRA as PEFT's LoRA of rank 2" in done.stdout


# Against PEFT.


@families.needs_torch
@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", ["patterns", "dora", "vera", "randlora", "adalora"]
)
def test_peft_computes_the_same_with_the_converted(method, family, tmp_path):
    """A directory of PEFT and the plain LoRA that `convert` makes of it."""
    import peft
    import torch

    base = families.torch_model(family)
    base.save_pretrained(str(tmp_path / "base"))
    names = {
        "llama": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
    }[family]
    common = dict(target_modules=names, fan_in_fan_out=family == "gpt2")
    config = {
        "patterns": lambda: peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            rank_pattern={names[0]: 2},
            alpha_pattern={names[1]: 9},
            **common,
        ),
        "dora": lambda: peft.LoraConfig(r=3, use_dora=True, **common),
        "vera": lambda: peft.VeraConfig(r=6, **common),
        "randlora": lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=10, **common
        ),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, **common
        ),
    }[method]()
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(0.1 * noise)
    x = {"token_ids": np.random.default_rng(0).integers(3, 60, (2, 7))}
    theirs = families.torch_outputs(model.eval().base_model.model, x)
    model.save_pretrained(str(tmp_path / "a"))
    arguments = ["convert", tmp_path / "a", tmp_path / "b"]
    if method in ("vera", "randlora"):
        arguments += ["--base-checkpoint", tmp_path / "base"]
    assert _run(*arguments) == 0
    plain = families.torch_model(family)
    before = families.torch_outputs(plain, x)
    again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "b"))
    ours = families.torch_outputs(again.eval().base_model.model, x)
    assert np.abs(theirs - before).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
