"""Writes `docs/backbones.md`: what adapters reach in every backbone.

    make backbones

Names of backbones as arguments write their lines alone.
`tests/test_backbones.py` checks that the page is current.
"""

import collections
import functools
import math
import pathlib
import re
import sys

import keras_randadapt as kra
from keras_randadapt import _compat
from tests.backbones import invariants
from tests.backbones import row as row_lib
from tests.backbones import tables

COMMAND = "make backbones"
PATH = pathlib.Path(__file__).parents[2] / "docs/backbones.md"
#: Below this share of the parameters, a weight is not named.
NAMED = 0.02
_TEXT = """# Backbones

This page says what adapters reach in each backbone of KerasHub {version}.
Every one was built, tiny, with a LoRA. The tests of this library train, merge,
save, load and eject such adapters on each. This command writes the page:

```
{command}
```

- **`None`** names the layers of the default targets, and has their number.
- **`"all-linear"`** has the number of kernels that it means, experts included.
- **Linear** is the share of the parameters in the kernels of these layers.
- **Reach** is the share in all kernels that an adapter can have. It counts
  convolutions, embeddings and other layers too.
- **Out of reach** names the weights with two axes or more that no adapter
  reaches, if they have 2 % of the parameters.

The sizes are tiny. Embeddings and tables of positions have a larger share here
than in models that are used, and kernels of linear layers have a smaller one.

| backbone | `None` | `"all-linear"` | linear | reach | out of reach |
|---|---|---|---|---|---|
{lines}

## Where a backbone can't be built

{missing}
"""


def is_of_this_version():
    import keras_hub

    return f"KerasHub {_short(keras_hub.__version__)}." in PATH.read_text()


def _short(version):
    return ".".join(version.split(".")[:2])


@functools.cache
def written():
    """dict from each backbone on the page to its line."""
    lines = re.findall(r"^\| (\w+) \|.*$", PATH.read_text(), re.MULTILINE)
    found = re.finditer(r"^\| (\w+) \|.*$", PATH.read_text(), re.MULTILINE)
    names = {match[1]: match[0] for match in found}
    assert len(names) == len(lines), "A backbone is on the page twice."
    return {n: line for n, line in names.items() if n in tables.ROWS}


def line_of(name, row):
    """The line of one backbone."""
    model = row.build()
    parameters = model.count_params()
    default = _reached(model, None)
    linear = _reached(model, "all-linear", experts=True)
    every = _reached(model, invariants.takes_kernels, row.exclude)
    cells = [
        name,
        _names(default),
        f"{len(linear.sites)}" if linear else "none",
        _share(linear.parameters if linear else 0, parameters),
        _share(every.parameters, parameters),
        ", ".join(
            f"`{path}` {_share(size, parameters)}"
            for path, size in _missed(model, every)
            if size >= NAMED * parameters
        )
        or "–",
    ]
    return "| " + " | ".join(cells) + " |"


Reached = collections.namedtuple("Reached", "sites parameters")


def _reached(model, targets, exclude=None, experts=False):
    """The sites that `targets` means, or `None` where it is refused."""
    try:
        invariants.inject(model, targets, exclude=exclude, experts=experts)
    except ValueError as error:
        if experts and "several experts" in str(error):
            return _reached(model, targets, exclude)
        if not re.search('targets=(None|"all-linear")', str(error)):
            raise
        return None
    adapters = model._randadapt.adapters("default").values()
    parameters = sum(
        a.site.input_dim * a.site.output_dim * (a.site.stack or 1)
        for a in adapters
    )
    found = Reached(kra.sites(model), parameters)
    kra.eject(model)
    return found


def _names(reached):
    if reached is None:
        return "none, an error"
    counts = collections.Counter(
        re.sub(r"_\d+$", "", layer.name) for layer in reached.sites.values()
    )
    return ", ".join(f"`{n}` {count}" for n, count in sorted(counts.items()))


def _missed(model, reached):
    """The weights out of reach, the largest first, those of a name as one."""
    of_sites = {
        id(variable)
        for layer in reached.sites.values()
        for variable in _compat.owned_variables(layer)
    }
    sizes = collections.Counter()
    for variable in model.variables:
        axes = sum(size > 1 for size in variable.shape)
        if axes > 1 and id(variable) not in of_sites:
            name = "/".join(variable.path.split("/")[-2:])
            name = re.sub(r"_\d+\b", "", name)
            sizes[name] += math.prod(variable.shape)
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _share(size, total):
    return f"{100 * size / total:.0f} %"


def main(names):
    import keras_hub

    lines = written() if PATH.exists() else {}
    for name in names or tables.ROWS:
        lacking = row_lib.lacks(tables.ROWS[name])
        if lacking:
            print(f"{name} needs {lacking} here: its line stays.")
            continue
        lines[name] = line_of(name, tables.ROWS[name])
        print(lines[name], flush=True)
    missing = [
        f"- {name} needs {package} on {backend}."
        for name, row in tables.ROWS.items()
        for backend, package in row.needs.items()
    ]
    missing += [
        f"- {name} came with KerasHub {version}."
        for name, version in tables.SINCE.items()
    ]
    PATH.write_text(
        _TEXT.format(
            version=_short(keras_hub.__version__),
            command=COMMAND,
            lines="\n".join(lines[n] for n in tables.ROWS if n in lines),
            missing="\n".join(missing),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
