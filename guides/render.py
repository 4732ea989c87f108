"""Runs guides and writes them as Markdown pages, with output and pictures.

    KERAS_BACKEND=jax python guides/render.py            # all guides
    KERAS_BACKEND=jax python guides/render.py rlora.py
    python guides/render.py --notebook                   # all, as notebooks

A guide is a Python file in the manner of keras.io. Its module-level strings are
text, and the code between them makes cells. The page of `rlora.py` is
`rlora.md`. The output and the pictures of a cell follow the cell. The notebook
is `rlora.ipynb`, without output, and nothing is run to write it.
"""

import argparse
import ast
import contextlib
import io
import json
import pathlib

HERE = pathlib.Path(__file__).parent


def cells(source):
    """Splits a guide into `("text" or "code", content, first line)`."""
    lines = source.splitlines()
    code_from = 0
    for node in ast.parse(source).body:
        if not (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            continue
        yield from _code(lines, code_from, node.lineno - 1)
        yield "text", node.value.value.strip(), node.lineno
        code_from = node.end_lineno
    yield from _code(lines, code_from, len(lines))


def _code(lines, start, end):
    code = "\n".join(lines[start:end]).strip("\n")
    if code.strip():
        while not lines[start].strip():
            start += 1
        yield "code", code, start + 1


def render(path, folder=HERE):
    """Runs a guide and writes its page.

    Args:
        path: The guide.
        folder: The folder of the page. Pictures go into its folder `images`.

    Returns:
        The path of the page.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Earlier figures of the process are no pictures of this guide.
    plt.close("all")
    namespace = {"__name__": "__main__", "__file__": str(path)}
    page = []
    pictures = 0
    for kind, content, line in cells(path.read_text(encoding="utf-8")):
        if kind == "text":
            page.append(content)
            continue
        page.append(f"```python\n{content}\n```")
        printed = io.StringIO()
        # With these empty lines, tracebacks show the right lines.
        code = compile("\n" * (line - 1) + content, str(path), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        # The page must not show the home folder of the person who renders it.
        text = printed.getvalue().strip().replace(str(pathlib.Path.home()), "~")
        if text:
            page.append(f"```\n{text}\n```")
        for number in plt.get_fignums():
            name = f"images/{path.stem}_{pictures}.png"
            (folder / "images").mkdir(exist_ok=True)
            plt.figure(number).savefig(folder / name, dpi=80)
            page.append(f"![]({name})")
            pictures += 1
        plt.close("all")
    output = folder / f"{path.stem}.md"
    output.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return output


def notebook(path, folder=HERE):
    """Writes a guide as a Jupyter notebook, without running it.

    Args:
        path: The guide.
        folder: The folder of the notebook. The guide's imports work in
            `guides/`, where the examples are a neighbour.

    Returns:
        The path of the notebook.
    """
    # A guide finds the examples from its own place, which a notebook does not
    # know. Jupyter starts in the notebook's folder.
    contents = [("code", f'__file__ = "{path.name}"')]
    found = cells(path.read_text(encoding="utf-8"))
    contents += [(kind, content) for kind, content, _ in found]
    # The title comes first.
    if contents[1][0] == "text":
        contents[:2] = contents[1::-1]
    output = folder / f"{path.stem}.ipynb"
    # These are the required fields of version 4.5 of the format.
    content = {
        "cells": [
            _cell(number, *content) for number, content in enumerate(contents)
        ],
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    return output


def _cell(number, kind, content):
    cell = {
        "cell_type": "code" if kind == "code" else "markdown",
        "id": f"cell-{number}",
        "metadata": {},
        "source": content.splitlines(keepends=True),
    }
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guides", nargs="*", help="files such as rlora.py")
    parser.add_argument(
        "--notebook", action="store_true", help="write notebooks, run nothing"
    )
    arguments = parser.parse_args()
    names = arguments.guides or [
        path.name
        for path in sorted(HERE.glob("*.py"))
        if path.name != "render.py"
    ]
    write = notebook if arguments.notebook else render
    for name in names:
        print(write(HERE / name), flush=True)


if __name__ == "__main__":
    main()
