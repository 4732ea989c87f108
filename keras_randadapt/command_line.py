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
from typing import NoReturn

import numpy as np

from keras_randadapt.model import differences
from keras_randadapt.model import file_conversion
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import fingerprint
from keras_randadapt.peft import conversion
from keras_randadapt.peft import description
from keras_randadapt.peft import directory

__all__ = ["main"]

_A_FILE = "an adapter file, as `save_adapter` writes it, or a directory of PEFT"
_BETWEEN_FORMATS = (
    "Load one into its model (`keras_randadapt.load_adapter` or "
    "`keras_randadapt.peft.load`), and save it there in the other format "
    "(`keras_randadapt.peft.save` or `keras_randadapt.save_adapter`)."
)


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
        _print(f"{parser.prog}: {error}", sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras_randadapt",
        description="Looks at adapter files and directories of PEFT, and makes "
        "LoRA of them. "
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
        "convert",
        help="write a file or directory that holds the same as a LoRA",
    )
    convert.add_argument("source", metavar="IN", help=_A_FILE)
    convert.add_argument(
        "target",
        metavar="OUT",
        help="the file to write, which may be IN, or the directory",
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
    convert.add_argument(
        "--base-checkpoint",
        metavar="PATH",
        help="the base model's safetensors file or its directory, which tells "
        "the shapes that a directory of VeRA or RandLoRA lacks",
    )
    convert.set_defaults(run=_convert)
    for command in (inspect, diff, convert):
        command.add_argument(
            "--json", action="store_true", help="print JSON for programs"
        )
    return parser


def _inspect(options):
    told = described(options.file)
    lines = description.lines if "directory" in told else _lines
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        _print("\n".join(lines(told)))
    return 0


def described(path: str) -> dict[str, Any]:
    """What an adapter file or a directory of PEFT holds.

    Args:
        path: The path of the file or directory.

    Returns:
        dict of JSON values.

    Raises:
        ValueError: If a file is damaged or no adapter file.
        FileNotFoundError: If there is no such file.
    """
    if os.path.isdir(path):
        return description.described(path)
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
    size = options.rank, options.energy
    done: file_conversion.Conversion | conversion.Conversion
    if os.path.isdir(options.source):
        if os.path.splitext(options.target)[1] == ".safetensors":
            _refuse_other_format(options.target, "an adapter file")
        done = conversion.convert_directory(
            options.source, options.target, *size, options.base_checkpoint
        )
    else:
        if options.base_checkpoint is not None:
            raise ValueError(
                "`--base-checkpoint` is for directories of PEFT, and "
                f"'{options.source}' is none."
            )
        if os.path.lexists(os.path.join(options.target, directory.CONFIG)):
            _refuse_other_format(options.target, "a directory of PEFT")
        done = file_conversion.convert_file(
            options.source, options.target, *size, verbose=0
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return 0
    _print(str(done))
    for note in done.notes:
        _print(f"note: {note}", sys.stderr)
    return 0


def _refuse_other_format(target, kind) -> NoReturn:
    raise ValueError(
        f"'{target}' would be {kind}, whose layers have other names, and only "
        f"the model tells which. {_BETWEEN_FORMATS}"
    )


def _print(text, file=None):
    """Prints a text that may have parts of a file, which may be hostile."""
    for line in text.split("\n"):
        # An escape sequence would steer the terminal.
        shown = (one if one.isprintable() else ascii(one)[1:-1] for one in line)
        print("".join(shown), file=file)


def _diff(options):
    are_folders = [os.path.isdir(path) for path in options.files]
    if are_folders[0] != are_folders[1]:
        raise ValueError(
            f"'{options.files[are_folders.index(True)]}' is a directory and "
            "the other one is not. A directory of PEFT has the layers' names "
            "in transformers, and an adapter file those in Keras. "
            f"{_BETWEEN_FORMATS}"
        )
    compare = description.differences if are_folders[0] else _differences
    found = list(compare(*options.files))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for one in found:
            _print(f"{one['what']}: {one['first']} | {one['second']}")
    return 1 if found else 0


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
            yield differences.difference(key, one[key], other[key])
    for part in ("config", "model"):
        yield from differences.of_values(one[part], other[part], part + " {}")
    tensors = (
        {k: one for k, one in content[0].items() if k != file_format.BASE_KEY}
        for content in contents
    )
    yield from differences.of_tensors(*tensors)
