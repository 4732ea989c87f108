"""`python -m keras_randadapt`: adapter files from a shell.

Exit codes are those of `diff`: 0 for success and equal files, 1 for files that
differ, 2 for an error.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_randadapt.model import file_conversion
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import fingerprint

__all__ = ["main"]

_A_FILE = "an adapter file, as `save_adapter` writes it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after `python -m keras_randadapt`; by default
            those of the process.

    Returns:
        int, the exit code.

    Example:

    ```python
    from keras_randadapt import command_line

    kra.save_adapter(model, "task.safetensors")
    command_line.main(["inspect", "task.safetensors"])
    ```
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras_randadapt",
        description="Looks at adapter files, and makes LoRA files of them. "
        "No model is needed.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="say what a file holds and what it was trained on"
    )
    inspect.add_argument("file", metavar="FILE", help=_A_FILE)
    inspect.set_defaults(run=_inspect)
    diff = commands.add_parser(
        "diff", help="say in what two files differ; the exit code is 1 then"
    )
    diff.add_argument("files", metavar="FILE", nargs=2, help=_A_FILE)
    diff.set_defaults(run=_diff)
    convert = commands.add_parser(
        "convert", help="write a file whose adapter is a LoRA of the same"
    )
    convert.add_argument("source", metavar="IN", help=_A_FILE)
    convert.add_argument(
        "target", metavar="OUT", help="the file to write; it may be IN"
    )
    size = convert.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=int, help="the rank at every site, instead of its own"
    )
    size.add_argument(
        "--energy",
        type=float,
        help="the share of the update's energy to keep, such as 0.99",
    )
    convert.set_defaults(run=_convert)
    for command in (inspect, diff, convert):
        command.add_argument(
            "--json", action="store_true", help="print JSON for programs"
        )
    return parser


def _inspect(options):
    told = described(options.file)
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(_lines(told)))
    return 0


def described(path: str) -> dict[str, Any]:
    """What an adapter file holds, as a dict of JSON values.

    Args:
        path: The file's path.

    Returns:
        dict.

    Raises:
        ValueError: If the file is damaged or no adapter file.
        FileNotFoundError: If there is no such file.
    """
    return _described(path, *file_reading.read(path))


def _described(path, tensors, metadata):
    keys = file_format.site_keys(tensors)
    views = [view for view, n in metadata["kernel_views"] for _ in range(n)]
    base = tensors.get(file_format.BASE_KEY)
    kept = {
        address: [
            _tensor(tensors[key])
            for key in sorted(tensors)
            if key.rpartition("#")[0] == address
        ]
        for address in metadata["kept"]
    }
    return {
        "file": os.fspath(path),
        "bytes": os.path.getsize(path),
        "version": metadata["version"],
        "name": metadata["name"],
        "method": metadata["adapter"]["class"].rpartition(">")[2],
        "config": metadata["adapter"]["config"],
        "model": metadata["model"],
        "preset": metadata.get("preset"),
        "base_digest": None if base is None else fingerprint.digest(base),
        "precisions": metadata.get("precisions"),
        "weight": metadata.get("weight", 1.0),
        "frozen": metadata.get("frozen", False),
        "parameters": sum(tensors[key].size for key in keys),
        "finite": all(bool(np.all(np.isfinite(t))) for t in tensors.values()),
        "sites": {
            key: {"shape": view, "values": tensors[key].size}
            for key, view in zip(keys, views)
        },
        "kept": kept,
        "moved": metadata.get("moved", []),
    }


def _tensor(array):
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def _lines(told):
    model = told["model"]
    base = model["class"]
    if "backbone" in model:
        base += f" around a {model['backbone']}"
    rows = [
        ("format", f"version {told['version']}, {told['bytes']:,} bytes"),
        ("adapter", f"{told['method']} '{told['name']}'"),
        ("config", _arguments(told["config"])),
        ("trained on", f"{base}, layers {model['layers']}"),
        ("preset", told["preset"]),
        ("base kernels", told["base_digest"] or "not told"),
        ("sites", f"{len(told['sites']):,}"),
        ("parameters", f"{told['parameters']:,}"),
        ("kept layers", ", ".join(told["kept"]) or None),
        ("moved state", ", ".join(told["moved"]) or None),
        ("weight", None if told["weight"] == 1 else f"{told['weight']:g}"),
        ("trained", "no" if told["frozen"] else None),
        ("values", None if told["finite"] else "NaN or infinity"),
    ]
    yield told["file"]
    for label, value in rows:
        if value is not None:
            yield f"  {label:<14}{value}"
    for address, site in told["sites"].items():
        yield f"    {site['shape']:>12}{site['values']:>12,}  {address}"


def _arguments(config):
    return ", ".join(f"{key}={value!r}" for key, value in config.items())


def _convert(options):
    done = file_conversion.convert_file(
        options.source, options.target, options.rank, options.energy, verbose=0
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return 0
    print(done)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _diff(options):
    differences = list(_differences(*options.files))
    if options.json:
        print(json.dumps(differences, indent=2))
    else:
        for one in differences:
            print(f"{one['what']}: {one['first']} | {one['second']}")
    return 1 if differences else 0


def _differences(first, second):
    """What differs in two files: dicts with `what`, `first` and `second`."""
    contents = [file_reading.read(path) for path in (first, second)]
    one, other = (
        _described(path, *content)
        for path, content in zip((first, second), contents)
    )
    left_out = ("file", "bytes", "sites", "kept", "config", "model")
    for key in one:
        if key not in left_out and one[key] != other[key]:
            yield _difference(key, one[key], other[key])
    for part in ("config", "model"):
        for key in sorted(one[part].keys() | other[part].keys()):
            values = one[part].get(key), other[part].get(key)
            if values[0] != values[1]:
                yield _difference(f"{part} {key}", *values)
    tensors = [content[0] for content in contents]
    for key in sorted(tensors[0].keys() | tensors[1].keys()):
        if key == file_format.BASE_KEY:
            continue
        a, b = (one.get(key) for one in tensors)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            yield _difference(f"tensor {key}", *map(_shown, (a, b)))
        elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            size = max(_norm(a), _norm(b))
            change = _norm(a.astype("float64") - b) / size if size else 0.0
            yield _difference(
                f"values of {key}",
                f"norm {_norm(a):.6g}",
                f"norm {_norm(b):.6g}, apart by {100 * change:.3g} %",
            )


def _difference(what, first, second):
    return {"what": what, "first": first, "second": second}


def _shown(array):
    if array is None:
        return "nothing"
    return f"{array.dtype} of shape {tuple(array.shape)}"


def _norm(array):
    return float(np.linalg.norm(array.astype("float64")))
