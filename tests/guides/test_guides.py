"""The guides run from beginning to end, and their pages are made of them."""

import importlib.util
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["choosing_a_method", "rlora", "randlora", "rm_lora", "many_tenants"],
)
def test_guide(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Enough to run every line; what it prints is not looked at.
    monkeypatch.setenv("GUIDE_EPOCHS", "2")
    monkeypatch.setenv("GUIDE_EXAMPLES", "16")
    monkeypatch.setenv("GUIDE_TENANTS", "4")
    page = _renderer().render(GUIDES / f"{name}.py", tmp_path).read_text()
    assert f"![](images/{name}_0.png)" in page
