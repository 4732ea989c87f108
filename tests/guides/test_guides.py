"""The guides run from beginning to end, and their pages are made of them."""

import importlib.util
import json
import pathlib

import pytest

pytestmark = pytest.mark.one_backend

GUIDES = pathlib.Path(__file__).parents[2] / "guides"


def _renderer():
    spec = importlib.util.spec_from_file_location(
        "render", GUIDES / "render.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells():
    source = '"""\n# Title\n"""\n\nx = 1\n\n\ny = 2\n"""\nText.\n"""\n'
    assert list(_renderer().cells(source)) == [
        ("text", "# Title", 1),
        ("code", "x = 1\n\n\ny = 2", 5),
        ("text", "Text.", 9),
    ]


def test_a_page(tmp_path):
    guide = tmp_path / "guide.py"
    guide.write_text(
        '"""Text."""\n\nimport matplotlib.pyplot as plt\n\n'
        'plt.plot([1, 2])\nprint("one")\n'
    )
    page = _renderer().render(guide, tmp_path).read_text()
    assert page.startswith("Text.\n\n```python\nimport matplotlib")
    assert page.endswith("```\none\n```\n\n![](images/guide_0.png)\n")
    assert (tmp_path / "images/guide_0.png").stat().st_size > 1000


def test_errors_name_the_line(tmp_path):
    guide = tmp_path / "guide.py"
    guide.write_text('"""Text."""\n\n1 / 0\n')
    with pytest.raises(ZeroDivisionError) as info:
        _renderer().render(guide, tmp_path)
    assert info.traceback[-1].lineno + 1 == 3


def test_a_notebook(tmp_path):
    guide = tmp_path / "guide.py"
    guide.write_text('"""# Title\n\né"""\n\nx = 1\ny = x\n"""\nEnd.\n"""\n')
    path = _renderer().notebook(guide, tmp_path)
    assert path == tmp_path / "guide.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = content["cells"]
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == [
        ("markdown", ["# Title\n", "\n", "é"]),
        ("code", ['__file__ = "guide.py"']),
        ("code", ["x = 1\n", "y = x"]),
        ("markdown", ["End."]),
    ]
    # The format's schema asks for these, and for nothing else.
    common = {"cell_type", "id", "metadata", "source"}
    assert set(cells[0]) == common
    assert set(cells[1]) == common | {"execution_count", "outputs"}
    assert len({cell["id"] for cell in cells}) == len(cells)


def _guides():
    return sorted(p for p in GUIDES.glob("*.py") if p.name != "render.py")


def test_no_guide_hides_an_example():
    """Python and Jupyter look for modules in the guide's folder first."""
    examples = {path.stem for path in (GUIDES.parent / "examples").glob("*.py")}
    assert not examples & {path.stem for path in GUIDES.glob("*.py")}


@pytest.mark.parametrize("guide", _guides(), ids=lambda path: path.stem)
def test_notebooks_have_all_of_a_guide(guide, tmp_path):
    content = json.loads(_renderer().notebook(guide, tmp_path).read_text())
    code, text = (
        ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == k]
        for k in ("code", "markdown")
    )
    assert text[0].startswith("# ")
    expected = [one for _, one, _ in _renderer().cells(guide.read_text())]
    assert sorted(code[1:] + text) == sorted(expected)
    # Every cell is a program by itself.
    for one in code:
        compile(one, guide.name, "exec")


@pytest.mark.parametrize(
    "page", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem
)
def test_pages_are_those_of_the_guides(page):
    """A page that was not rendered again has other text or code."""
    guide = page.with_suffix(".py")
    page = page.read_text(encoding="utf-8")
    position = 0
    for kind, content, _ in _renderer().cells(guide.read_text()):
        part = content if kind == "text" else f"```python\n{content}\n```"
        position = page.index(part, position) + len(part)


@pytest.mark.slow("trains the models of the guides")
@pytest.mark.parametrize("guide", _guides(), ids=lambda path: path.stem)
def test_guide(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Enough to run every line; what it prints is not looked at.
    monkeypatch.setenv("GUIDE_EPOCHS", "2")
    monkeypatch.setenv("GUIDE_EXAMPLES", "16")
    monkeypatch.setenv("GUIDE_TENANTS", "4")
    page = _renderer().render(guide, tmp_path).read_text()
    committed = guide.with_suffix(".md").read_text()
    pictures = committed.count("![](images/")
    assert page.count(f"![](images/{guide.stem}_") == pictures


@pytest.mark.slow("trains the model of a guide")
def test_a_notebook_runs(tmp_path, monkeypatch):
    """Like Jupyter, which starts in the notebook's folder."""
    monkeypatch.setenv("GUIDE_EPOCHS", "2")
    monkeypatch.setenv("GUIDE_EXAMPLES", "16")
    monkeypatch.chdir(GUIDES)
    path = _renderer().notebook(GUIDES / "rlora.py", tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["report"].adapter_parameters == 9216
