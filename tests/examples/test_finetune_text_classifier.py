import os
import re
import subprocess
import sys

import finetune_text_classifier as example
import pytest
import running


def test_quick_decides_what_is_not_given():
    arguments = example.parse_arguments(["--quick"])
    assert (arguments.epochs, arguments.validation_examples) == (6, 400)
    arguments = example.parse_arguments(["--quick", "--epochs", "3"])
    assert (arguments.epochs, arguments.validation_examples) == (3, 400)
    arguments = example.parse_arguments([])
    assert (arguments.epochs, arguments.validation_examples) == (20, 1000)


@pytest.mark.parametrize(
    "backend, second",
    [("jax", "tensorflow"), ("tensorflow", "jax"), ("torch", "tensorflow")],
)
def test_second_backend_is_another_one(backend, second):
    arguments = example.parse_arguments(["--backend", backend])
    assert arguments.second_backend == second


def test_stages_keep_their_times(capsys):
    stages = example.Stages()
    stages.begin("first")
    stages.begin("second")
    stages.end()
    assert list(stages.seconds) == ["first", "second"]
    assert "== first" in capsys.readouterr().out


def test_data_from_a_csv_file(tmp_path, capsys):
    path = tmp_path / "a.csv"
    rows = "".join(
        f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(60)
    )
    path.write_text("text,label\n" + rows)
    arguments = example.parse_arguments(
        ["--data", str(path), "--train-examples", "8"]
        + ["--validation-examples", "10"]
    )
    split, label_names = example.load_data(arguments)
    assert label_names == ["bad", "good"]
    assert [len(part) for part in split] == [8, 10, 10]
    assert "60 examples: 8 to train on, 10" in capsys.readouterr().out


WORDS = {"bad": ("dull", "poor", "bleak"), "good": ("fine", "great", "warm")}


@pytest.fixture
def csv_file(tmp_path):
    """Texts that one word decides, in columns of other names."""
    rows = [
        f"a {word} film number {i},{label}\n"
        for i in range(40)
        for label, words in WORDS.items()
        for word in words
    ]
    path = tmp_path / "films.csv"
    path.write_text("review,mood\n" + "".join(rows))
    return path


SIZE = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 16,
}


def _save_distilbert(path):
    """A tiny DistilBERT with random weights, as a KerasHub preset."""
    keras_hub = pytest.importorskip("keras_hub")
    words = [word for words in WORDS.values() for word in words]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += ["a", "film", "number", *words]
    tokenizer = keras_hub.models.DistilBertTokenizer(vocabulary)
    backbone = keras_hub.models.DistilBertBackbone(
        vocabulary_size=len(vocabulary), **SIZE
    )
    backbone.save_to_preset(path)
    keras_hub.models.DistilBertTextClassifierPreprocessor(
        tokenizer
    ).save_to_preset(path)


def _save_gpt2(path):
    """A tiny GPT-2 of letters: KerasHub has no classifier of this family."""
    keras_hub = pytest.importorskip("keras_hub")
    letters = "\u0120abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = {letter: i + 1 for i, letter in enumerate(letters)}
    vocabulary |= {"<|endoftext|>": 0, "\u0120a": len(vocabulary) + 1}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges=["\u0120 a"])
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary), **SIZE
    )
    backbone.save_to_preset(path)
    keras_hub.models.GPT2CausalLMPreprocessor(tokenizer).save_to_preset(path)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("KERAS_BACKEND") in ("tensorflow", "torch"),
    reason="chooses its own backends, so it runs once, along with JAX's tests",
)
@pytest.mark.parametrize(
    "save_preset, backend, second",
    [
        (_save_distilbert, "jax", "tensorflow"),
        (_save_distilbert, "tensorflow", "torch"),
        (_save_gpt2, "torch", "jax"),
    ],
)
def test_whole_run_on_any_preset_and_csv(
    save_preset, backend, second, csv_file, tmp_path
):
    root = running.HERE.parent
    preset = tmp_path / "preset"
    save_preset(preset)
    output = tmp_path / "output"
    result = subprocess.run(
        [sys.executable, example.__file__, "--quick"]
        + ["--preset", str(preset), "--sequence-length", "8"]
        + ["--data", str(csv_file), "--text-column", "review"]
        + ["--label-column", "mood", "--train-examples", "60"]
        + ["--validation-examples", "40", "--rank", "8"]
        + ["--backend", backend, "--second-backend", second]
        + ["--output-dir", str(output)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"predictions on {second} equal those on {backend}" in result.stdout
    assert "sentences answered as before the export" in result.stdout
    assert re.search(r"^RLoRA, rank 8 +\d", result.stdout, re.MULTILINE)
    assert (output / "learning_curves.png").exists()
    assert (output / "saved_model/saved_model.pb").exists()
    assert (output / "adapter.safetensors").stat().st_size < 10_000
