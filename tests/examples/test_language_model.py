"""A language model that any KerasHub preset gives, on a tiny one."""

import json
import os
import re
import string
import subprocess
import sys

import finetune_causal_lm as program
import keras
import language_model
import meanings
import numpy as np
import pytest
import token_rows

import keras_randadapt as kra

pytestmark = pytest.mark.one_backend

LETTERS = "\u0120\u010a[],:." + string.ascii_letters + string.digits


def save_preset(path):
    """A tiny GPT-2 with random weights, whose tokens are letters."""
    keras_hub = pytest.importorskip("keras_hub")
    vocabulary = {letter: i + 1 for i, letter in enumerate(LETTERS)}
    vocabulary |= {"<|endoftext|>": 0, "\u0120a": len(vocabulary) + 1}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges=["\u0120 a"])
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=128,
    )
    backbone.save_to_preset(path)
    keras_hub.models.GPT2CausalLMPreprocessor(tokenizer).save_to_preset(path)
    return path


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return save_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture(scope="module")
def lm(preset):
    return language_model.load(str(preset))


def test_examples_train_on_what_follows_the_prompt(lm):
    x, y, weight = lm.examples(["ab:", "c"], ["b", "a a"], 8)
    chosen = [lm.decode(y[i][weight[i] > 0].tolist()) for i in range(2)]
    assert chosen == [" b<|endoftext|>", " a a<|endoftext|>"]
    # GPT-2's texts start with a token, and each target is the next token.
    assert x["token_ids"][:, 0].tolist() == lm.start * 2
    np.testing.assert_array_equal(x["token_ids"][:, 1:], y[:, :-1])
    assert lm.fits("ab:", "b", 6) and not lm.fits("ab:", "b", 5)
    with pytest.raises(ValueError, match="at least 7"):
        lm.examples(["ab:"], ["b"], 5)


def test_a_token_across_the_boundary_is_trained():
    """A tokenizer may join the prompt's last letter to what follows."""
    ids = {"a": [1], "a b": [2, 3], "c": [4], "c d": [4, 5]}
    lm = language_model.LanguageModel(None, ids.get, str, [9], 8)
    _, y, weight = lm.examples(["a", "c"], ["b", "d"], 4)
    assert y[0][weight[0] > 0].tolist() == [2, 3, 8]
    assert y[1][weight[1] > 0].tolist() == [5, 8]


def test_log_likelihoods_are_those_of_the_whole_text(lm):
    texts = [f"b{letter}" for letter in "abcdefghij"]
    x, y, weight = lm.examples(["a:"] * len(texts), texts, 9)
    found = lm.log_likelihoods(x, y, weight)
    logits = keras.ops.convert_to_numpy(lm.model(x)).astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    likely = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for i in (0, 8, 9):
        expected = sum(
            np.log(likely[i, j, y[i, j]]) for j in np.flatnonzero(weight[i])
        )
        assert found[i] == pytest.approx(expected, rel=1e-5)
    assert lm.nats(x, y, weight) == pytest.approx(-found.sum() / weight.sum())


def test_generation_takes_the_likeliest_token(lm):
    prompts = ["ab:", "c", "dd dd", "e"]
    rows = lm.generated_ids(prompts, 10, batch_size=3)
    assert len(rows) == 4 and any(rows)

    def likeliest(ids):
        padded, mask = token_rows.pad([ids], 10)
        x = {"token_ids": padded, "padding_mask": mask}
        logits = keras.ops.convert_to_numpy(lm.model(x))
        return logits[0, len(ids) - 1].argmax()

    for prompt, row in zip(prompts, rows):
        ids = lm.prompt_ids(prompt)
        for token in row:
            assert token == likeliest(ids)
            ids = ids + [token]
        # It ends where the text is full, or at the end token.
        assert len(ids) == 10 or likeliest(ids) == lm.end
    assert lm.generate(prompts, 10, 3) == [lm.decode(r).strip() for r in rows]


def rows(count):
    return [
        (f"name[{a}{b}], kind[x{a}]", f"{a}{b} is x{a}.")
        for a in "abcdefgh"
        for b in "abcdefgh"
    ][:count]


def arguments(tmp_path, *more):
    return program.parse_arguments(
        ["--train-examples", "8", "--held-out", "3", "--epochs", "2"]
        + ["--shots", "1", "--rank", "8", "--length", "64"]
        + ["--output-dir", str(tmp_path), *more]
    )


@pytest.mark.one_backend("torch")
def test_the_task_leaves_the_model_as_it_was(lm, tmp_path):
    task = program.Task(lm, rows(20), arguments(tmp_path))
    assert task.length == max(
        len(lm.prompt_ids(f"{meanings.prompt(m)} {t}")) for m, t in rows(20)
    )
    before = lm.model.get_weights()
    scores, texts = task.judge()
    assert list(scores) == list(program.SCORES) and len(texts) == 3
    adapter, rate = program.methods(task.arguments)["RLoRA, rank 8"]
    trained, _, report = task.train(adapter(0), rate, seed=0)
    assert report.adapter_parameters > 0
    assert trained["nats"] < scores["nats"]
    kra.eject(lm.model)
    for one, other in zip(lm.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    again, same = task.judge()
    assert same == texts
    assert again["nats"] == pytest.approx(scores["nats"], rel=1e-6)


def test_tables_of_runs(tmp_path):
    base = dict(nats=2.0, bleu=0.05, chrf=0.1, rouge_l=0.2, mentioned=0.3)
    better = dict(nats=1.0, bleu=0.3, chrf=0.5, rouge_l=0.4, mentioned=0.9)
    other = better | dict(nats=0.8)
    size = dict(parameters=1234, bytes=5678)
    found = [
        {"method": "base", **base},
        {"method": "base, 1 example", **base},
        {"method": "RLoRA", "seed": 0, **better, **size},
        {"method": "RLoRA", "seed": 1, **other, **size},
    ]
    program.write_rows(found, tmp_path / "runs.csv")
    assert program.read_rows(tmp_path / "runs.csv") == found
    lines = program.table(found).splitlines()
    assert lines[2].split() == "base 0 none 2.000 5.0 10.0 20.0 30.0".split()
    assert "RLoRA" in lines[4] and "1,234" in lines[4] and "5.7 kB" in lines[4]
    assert "0.900 ± 0.141" in lines[4] and "50.0 ± 0.0" in lines[4]
    # 12.706 times the standard error of 0.1.
    assert "-1.100 ± 1.271" in program.gains(found).splitlines()[2]


@pytest.mark.one_backend("tensorflow")
def test_generation_from_a_saved_model(lm):
    """Without a cache and without Keras, it writes what `generate` writes."""
    import ask_language_model
    import tensorflow as tf

    class Served:
        def serve(self, x):
            x = {name: value.numpy() for name, value in x.items()}
            return tf.constant(keras.ops.convert_to_numpy(lm.model(x)))

    for prompt, length in (("ab:", 12), ("c", 5)):
        (expected,) = lm.generated_ids([prompt], length)
        ids = lm.prompt_ids(prompt)
        written = ask_language_model.generate(Served(), ids, length, lm.end)
        assert written == expected and len(written) <= length - len(ids)
    # The first likeliest token as the end gives nothing.
    first = ask_language_model.generate(Served(), ids, length, -1)[0]
    assert ask_language_model.generate(Served(), ids, length, first) == []


@pytest.mark.slow("five processes, each with Keras and a backend")
@pytest.mark.one_backend("jax")
@pytest.mark.parametrize(
    "backend, more",
    [
        ("torch", ["--seeds", "2"]),
        ("jax", ["--quantize", "int4"]),
        ("torch", ["--dtype", "bfloat16"]),
    ],
)
def test_whole_run_on_any_preset_and_csv(backend, more, preset, tmp_path):
    data = tmp_path / "data.csv"
    lines = "".join(f'"{meaning}",{text}\n' for meaning, text in rows(40))
    data.write_text("mr,ref\n" + lines)
    output = tmp_path / "output"
    root = str(program.running.HERE.parent)
    result = subprocess.run(
        [sys.executable, program.__file__, "--preset", str(preset)]
        + ["--data", str(data), "--backend", backend, *more]
        + ["--train-examples", "8", "--held-out", "3", "--epochs", "2"]
        + ["--shots", "1", "--rank", "8", "--output-dir", str(output)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    printed = result.stdout
    assert "tokens written, " in printed
    if "bfloat16" not in more:
        assert "tokens written, as before the export, without" in printed
    assert re.search(r"^base +0 +none +\d", printed, re.MULTILINE)
    for name in ("RLoRA, rank 8", "LoRA, rank 8", "RandLoRA, rank 32"):
        assert re.search(rf"^{name} +\d", printed, re.MULTILINE)
    assert (printed.count("minus base") == 1) == ("--seeds" in more)
    assert (output / "saved_model/saved_model.pb").exists()
    assert len((output / "runs.csv").read_text().splitlines()) > 5
    assert json.loads((output / program.TASK).read_text())["backend"] == backend
