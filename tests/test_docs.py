"""The code blocks of README and docstrings run, and say what they print."""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def _blocks(text):
    return [inspect.cleandoc("\n" + code) for _, code in BLOCK.findall(text)]


NEEDS_MULTI_OPTIMIZER = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="learning-rate groups need Keras's MultiOptimizer",
)


@NEEDS_MULTI_OPTIMIZER
def test_readme(tmp_path, monkeypatch, capsys):
    """In order, in one namespace. A preset comes from the network, so here
    its name gives a model of the same class."""
    import keras_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        keras_hub.models.BertTextClassifier,
        "from_preset",
        lambda name, num_classes, preprocessor: zoo.bert_classifier(128)[0],
    )
    text = README.read_text()
    blocks = _blocks(text)
    assert len(blocks) == text.count("```python") >= 4
    namespace = {}
    for i, code in enumerate(blocks):
        exec(compile(code, f"README.md block {i}", "exec"), namespace)
        if i == 0:
            printed = capsys.readouterr().out.strip()
            assert printed in text
            assert (tmp_path / "task.safetensors").stat().st_size < 2600


def _public():
    for module in (
        kra,
        kra.optimizers,
        kra.ops.counter,
        kra.regularizers,
        kra.ops,
        kra.bases,
        kra.analysis,
        kra.callbacks,
    ):
        for name, value in vars(module).items():
            if name.startswith("_") or inspect.ismodule(value):
                continue
            if _blocks(inspect.getdoc(value) or ""):
                marks = []
                if name == "learning_rate_groups":
                    marks = [NEEDS_MULTI_OPTIMIZER]
                yield pytest.param(
                    value, id=f"{module.__name__}.{name}", marks=marks
                )


@pytest.mark.parametrize("value", list(_public()))
def test_docstring(value, tmp_path, monkeypatch):
    """With a classifier and data at hand, adapted already where the example
    starts from an adapted model."""
    monkeypatch.chdir(tmp_path)
    model, x, _ = zoo.bert_classifier(128)
    y = zoo.integers(4, high=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    namespace = {
        "kra": kra,
        "keras": keras,
        "np": np,
        "model": model,
        "classifier": model,
        "x": x,
        "y": y,
    }
    code = "\n".join(_blocks(inspect.getdoc(value)))
    if "kra.inject" not in code:
        kra.inject(model, kra.LoRA(2), keep_trainable="logits")
        kra.save_adapter(model, "sentiment.safetensors")
    exec(compile(code, f"docstring of {value}", "exec"), namespace)


def test_every_public_name_has_a_docstring():
    for name, value in vars(kra).items():
        if not name.startswith("_"):
            assert inspect.getdoc(value), name
