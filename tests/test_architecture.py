"""The plan of the house: what imports what, and how large a module is.

Everything is read from the source, imports inside functions included.
"""

import ast
import functools
import pathlib

import pytest

# It reads the source, which is the same on every backend.
pytestmark = pytest.mark.one_backend

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "keras_randadapt"
#: Folders with programs that import the package.
PROGRAMS = ("benchmarks", "examples", "guides")
MOST_FLOORS = 9
MOST_LINES = 450

#: Modules that may use private API: `_compat`, and one module a backend.
MAY_BE_PRIVATE = (
    f"{PACKAGE}._compat",
    f"{PACKAGE}.ops.jax",
    f"{PACKAGE}.ops.tensorflow",
    f"{PACKAGE}.ops.torch",
    f"{PACKAGE}.per_example",
)


@functools.cache
def _modules():
    """dict from module name to path, of the package and the programs."""
    modules = {}
    for folder in (PACKAGE, *PROGRAMS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            modules[".".join(parts)] = path
    return modules


@functools.cache
def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(name):
    """Names of the modules that a module imports, anywhere in it."""
    modules = _modules()
    found = set()
    for node in ast.walk(_tree(modules[name])):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {one for one in found if one in modules} - {name}


def _room(name):
    """A loose module, or the folder right below the package or the root."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 else PACKAGE


def _floors(graph):
    """dict from node to floor: one above the highest that it imports.

    Raises:
        ValueError: If there is a circle.
    """
    floors = {}

    def floor(node, above):
        if node in above:
            circle = [*above[above.index(node) :], node]
            raise ValueError(f"circle of imports: {' -> '.join(circle)}")
        if node not in floors:
            below = [floor(one, [*above, node]) for one in sorted(graph[node])]
            floors[node] = 1 + max(below, default=-1)
        return floors[node]

    for node in sorted(graph):
        floor(node, [])
    return floors


def test_no_circle_of_modules():
    _floors({name: _imports(name) for name in _modules()})


def test_rooms_have_at_most_nine_floors():
    graph = {}
    for name in _modules():
        found = {_room(one) for one in _imports(name)} - {_room(name)}
        graph.setdefault(_room(name), set()).update(found)
    floors = _floors(graph)
    assert max(floors.values()) + 1 <= MOST_FLOORS, floors


@pytest.mark.parametrize(
    "rooms", [("adapters", "model"), ("sites", "adapters")]
)
def test_what_a_room_knows_nothing_of(rooms):
    """Adapters know nothing of models, and sites nothing of methods."""
    lower, upper = (f"{PACKAGE}.{room}" for room in rooms)
    for name in _modules():
        if name.startswith(lower):
            found = [one for one in _imports(name) if one.startswith(upper)]
            assert not found, name


def test_models_know_no_method():
    """`low_rank` alone makes adapters of a class of its own choice."""
    methods = {
        name
        for name in _modules()
        if name.startswith(f"{PACKAGE}.adapters.")
        and name.rpartition(".")[2] not in ("base", "configs", "variables")
    }
    for name in _modules():
        if name.startswith(f"{PACKAGE}.model."):
            assert not methods & _imports(name), name
            if not name.endswith(".model.low_rank"):
                assert f"{PACKAGE}.adapters" not in _imports(name), name


def test_modules_are_of_reasonable_size():
    sizes = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in _modules().items()
        if name.startswith(PACKAGE)
    }
    too_long = {n: size for n, size in sizes.items() if size > MOST_LINES}
    assert not too_long


def _own_names():
    """Every private name that the package defines itself."""
    names = {"_randadapt"}
    for name, path in _modules().items():
        if not name.startswith(PACKAGE):
            continue
        for node in ast.walk(_tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(
                node.ctx, ast.Store
            ):
                if isinstance(node.value, ast.Name):
                    names.add(node.attr)
    return names


def _is_private(name, own):
    return (
        name.startswith("_") and not name.startswith("__") and name not in own
    )


def _private_uses(name, own):
    for node in ast.walk(_tree(_modules()[name])):
        if isinstance(node, ast.Attribute) and _is_private(node.attr, own):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            outside = parts[0] not in (PACKAGE, "__future__")
            private = (
                ".src" in node.module or "tensorflow.python" in node.module
            )
            private = private or any(part.startswith("_") for part in parts)
            if outside and private:
                yield node.lineno, node.module


def test_private_api_is_in_its_modules():
    own = _own_names()
    found = [
        (name, *use)
        for name in _modules()
        if name.startswith(PACKAGE) and not name.startswith(MAY_BE_PRIVATE)
        for use in _private_uses(name, own)
    ]
    assert not found


def test_every_private_symbol_has_a_test():
    from keras_randadapt import _compat

    text = (ROOT / "tests" / "test_compat.py").read_text(encoding="utf-8")
    untested = [
        name
        for name in _compat.__all__
        if f"_compat.{name}" not in text and f'"{name}"' not in text
    ]
    assert not untested


def test_tab_shows_the_public_api_and_nothing_else():
    import keras_randadapt as kra

    assert set(dir(kra)) == set(kra.__all__)
    for name in kra.__all__:
        assert getattr(kra, name) is not None
    for module in (kra.adapters, kra.analysis, kra.bases, kra.callbacks):
        assert set(dir(module)) == set(module.__all__), module.__name__
    for module in (kra.ops, kra.optimizers, kra.peft, kra.regularizers):
        assert set(dir(module)) == set(module.__all__), module.__name__
    # The module is above its public name's.
    assert callable(kra.optimizers.learning_rate_groups)
