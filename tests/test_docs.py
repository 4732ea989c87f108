"""The code of README, of all pages and of docstrings runs.

The site's own checks, dead links among them, are those of `make docs`.
"""

import inspect
import pathlib
import re
import tomllib

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
API_EXAMPLES = ROOT / "docs/api_examples.md"
#: Pages whose blocks run one after the other, in one namespace.
PAGES = [
    ROOT / "CONTRIBUTING.md",
    *(p for p in sorted(ROOT.glob("docs/*.md")) if p != API_EXAMPLES),
]
#: Pages whose sentences are checked.
PROSE = [
    README,
    ROOT / "SECURITY.md",
    API_EXAMPLES,
    *PAGES,
    *sorted(ROOT.glob("guides/*.md")),
]

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
ANY_BLOCK = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
NAMED_BLOCK = re.compile(
    r"^## `([\w.]+)`\n+```python\n(.*?)^```", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")

pytestmark = [
    pytest.mark.one_backend("torch"),
    pytest.mark.cpu_seconds(
        20, reason="JAX and TensorFlow compile on days that are theirs"
    ),
]

NEEDS_MULTI_OPTIMIZER = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="learning-rate groups need Keras's MultiOptimizer",
)


def _blocks(text):
    return [inspect.cleandoc("\n" + code) for _, code in BLOCK.findall(text)]


def _namespace():
    """A compiled classifier and data for it, as pages and docstrings say."""
    model, x, _ = zoo.bert_classifier(128)
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return {
        "kra": kra,
        "keras": keras,
        "np": np,
        "model": model,
        "classifier": model,
        "x": x,
        "y": zoo.integers(4, high=3),
    }


def _run(code, name, namespace):
    exec(compile(code, name, "exec"), namespace)


def _run_example(code, name):
    """Runs code that may start from an adapted model."""
    namespace = _namespace()
    if "kra.inject" not in code:
        model = namespace["model"]
        kra.inject(model, kra.LoRA(2), keep_trainable="logits")
        kra.save_adapter(model, "sentiment.safetensors")
    _run(code, name, namespace)


def _bert_tiny():
    """A classifier of the shape of the preset that README names."""
    import keras_hub

    words = "a joy from start to end dull and endless film".split()
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30522,
        num_layers=2,
        num_heads=2,
        hidden_dim=128,
        intermediate_dim=512,
        max_sequence_length=512,
    )
    presets = keras_hub.models.BertTextClassifier.presets
    metadata = presets["bert_tiny_en_uncased"]["metadata"]
    assert backbone.count_params() == metadata["params"]
    return keras_hub.models.BertTextClassifier(
        backbone=backbone,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=16
        ),
    )


@NEEDS_MULTI_OPTIMIZER
def test_readme(tmp_path, monkeypatch, capsys):
    """In order, in one namespace. A preset comes from the network, so here
    its name gives a model of the same class and shape."""
    import keras_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        keras_hub.models.BertTextClassifier,
        "from_preset",
        lambda name, num_classes: _bert_tiny(),
    )
    text = README.read_text(encoding="utf-8")
    blocks = _blocks(text)
    assert len(blocks) == text.count("```python") >= 2
    namespace = {}
    for i, code in enumerate(blocks):
        _run(code, f"README.md block {i}", namespace)
        if i == 0:
            printed = capsys.readouterr().out.strip()
            assert printed in text
            assert (tmp_path / "sentiment.safetensors").stat().st_size < 14000


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_make_docs_installs_what_the_extra_names():
    """`make docs` installs constraints/docs.txt, without the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = {
        re.match("[a-z-]+", requirement)[0]
        for requirement in project["project"]["optional-dependencies"]["docs"]
    }
    pins = (ROOT / "constraints/docs.txt").read_text("utf-8")
    assert wanted <= set(re.findall("^(.+)==", pins, re.MULTILINE))


def _pages():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = _blocks(text)
        assert len(blocks) == text.count("```python"), page
        if not blocks:
            continue
        marks = []
        if "learning_rate_groups(" in text:
            marks.append(NEEDS_MULTI_OPTIMIZER)
        yield pytest.param(page, blocks, id=page.stem, marks=marks)


@pytest.mark.parametrize(("page", "blocks"), list(_pages()))
def test_page(page, blocks, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = _namespace()
    for i, code in enumerate(blocks):
        _run(code, f"{page.name} block {i}", namespace)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = ANY_BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_how_sentences_open(page):
    """A sentence that opens so says what it is about too late."""
    text = ANY_BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(
        r"(?:^|[.:!?]\s+|\n\n|\| |- )((?:Of|What|Those|Said) .*)", text
    )
    assert not found


def _modules():
    return (
        kra,
        kra.optimizers,
        kra.ops.counter,
        kra.regularizers,
        kra.ops,
        kra.bases,
        kra.analysis,
        kra.callbacks,
        kra.peft,
        kra.random,
        kra.serving,
        kra.hadamard,
    )


def _public():
    """Pairs of a public name, such as `ops.fwht`, and its value."""
    for module in _modules():
        prefix = module.__name__.partition(".")[2]
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(value):
                continue
            # A module without `__all__` shows what it defines itself.
            home = getattr(value, "__module__", None) or ""
            if home.startswith("keras_randadapt"):
                yield ".".join(filter(None, [prefix, name])), value


def _docstrings():
    for name, value in _public():
        if _blocks(inspect.getdoc(value) or ""):
            marks = []
            if name.endswith("learning_rate_groups"):
                marks = [NEEDS_MULTI_OPTIMIZER]
            yield pytest.param(value, id=name, marks=marks)


@pytest.mark.parametrize("value", list(_docstrings()))
def test_docstring(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(_blocks(inspect.getdoc(value)))
    _run_example(code, f"docstring of {value}")


def _api_examples():
    found = NAMED_BLOCK.findall(API_EXAMPLES.read_text(encoding="utf-8"))
    return [pytest.param(code, id=name) for name, code in found]


@pytest.mark.parametrize("code", _api_examples())
def test_api_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run_example(code, "docs/api_examples.md")


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in _public()]
)
def test_public_name_is_documented(name, value):
    """It has a docstring and an example, there or in docs/api_examples.md."""
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring."
    examples = API_EXAMPLES.read_text(encoding="utf-8")
    assert "Example:" in doc or f"## `{name}`\n" in examples, (
        f"Put an example of {name} into its docstring or {API_EXAMPLES.name}."
    )
