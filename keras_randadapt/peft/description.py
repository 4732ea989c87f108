"""What PEFT directories hold, and in what two of them differ."""

import os

import numpy as np

from keras_randadapt.model import differences as differences_lib
from keras_randadapt.peft import canonical
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import experts
from keras_randadapt.peft import methods
from keras_randadapt.peft import sources

#: float32 rounds more than this part of an update where it is refactored.
_SAME = 1e-6

#: Options that are compared elsewhere, as modules are, or that say nothing of
#: the adapter.
_NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "target_modules",
    "target_parameters",
)


def described(directory):
    """What a directory holds, as a dict of JSON values.

    A directory that `load` refuses is described too, and why it does.

    Args:
        directory: The path of a directory of PEFT.

    Returns:
        dict.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged.
    """
    return _described(directory_lib.check_path(directory))[0]


def _described(path):
    """`(told, source, parts)`; the last two are `None` if `load` refuses it."""
    config = directory_lib.read_config(path)
    header = directory_lib.read_header(path)
    source, parts, others, refused = None, {}, [], None
    try:
        source = sources.read(path, finite=False)
        parts, others = sources.parts(source)
    except ValueError as error:
        source, refused = None, str(error)
    tensors = {} if source is None else {**source.tensors, **source.heads}
    heads = [] if source is None else sorted(source.heads)
    told = {
        "directory": path,
        "bytes": os.path.getsize(os.path.join(path, directory_lib.WEIGHTS)),
        "method": methods.label(config.get("peft_type"), config),
        "config": config,
        "base_model": config.get("base_model_name_or_path"),
        "dtypes": sorted({dtype for dtype, _ in header.values()}),
        "parameters": sum(
            int(np.prod(shape, dtype=object)) for _, shape in header.values()
        ),
        "finite": all(bool(np.all(np.isfinite(t))) for t in tensors.values())
        if tensors
        else None,
        "sites": {
            module: _site(source, part, start, header)
            for (module, part), start in zip(
                parts.items(), _starts(parts).values()
            )
        },
        "kept": [*others, *heads],
        "refused": refused,
    }
    return told, source, parts


def _starts(parts):
    """dict from a module to the start of the names of its tensors."""
    parameters = [name for name, one in parts.items() if one.kind == "experts"]
    starts = experts.starts_of(parameters)
    return {
        module: f"{canonical.START}{starts.get(module, module)}.lora_"
        if module in starts
        else f"{canonical.START}{module}."
        for module in parts
    }


def _site(source, part, start, header):
    update = part.update
    rank = source.options.get("r") if update is None else update.a.shape[-2]
    dims = part.dims
    if part.kind == "experts":
        dims = part.weight_shape[0], *dims
    return {
        "shape": "x".join("?" if n is None else str(n) for n in dims),
        "rank": rank,
        "scaling": None if update is None else float(update.scaling),
        "values": sum(
            int(np.prod(shape, dtype=object))
            for key, (_, shape) in header.items()
            if key.startswith(start)
        ),
    }


def lines(told):
    """The lines of a text for people.

    Args:
        told: What `described` gave.
    """
    sites = told["sites"].values()
    rows = [
        ("format", f"PEFT, {told['bytes']:,} bytes of tensors"),
        ("adapter", told["method"]),
        ("base model", told["base_model"] or "not told"),
        ("dtype", ", ".join(told["dtypes"])),
        ("rank", _range(one["rank"] for one in sites)),
        ("scaling", _range(one["scaling"] for one in sites)),
        ("dropout", _dropout(told["config"])),
        ("sites", f"{len(sites):,}" if sites else None),
        ("parameters", f"{told['parameters']:,}"),
        ("kept tensors", ", ".join(told["kept"]) or None),
        ("values", "NaN or infinity" if told["finite"] is False else None),
        ("not loaded", told["refused"]),
    ]
    yield told["directory"]
    for label, value in rows:
        if value is not None:
            yield f"  {label:<14}{value}"
    for module, site in told["sites"].items():
        yield f"    {site['shape']:>12}{site['values']:>12,}  {module}"


def _range(values):
    found = sorted({one for one in values if one is not None})
    if not found:
        return None
    ends = dict.fromkeys((found[0], found[-1]))
    return " to ".join(f"{one:.6g}" for one in ends)


def _dropout(config):
    found = [v for key, v in config.items() if key.endswith("_dropout") and v]
    return str(found[0]) if found else None


def differences(first, second):
    """What differs in two directories: dicts of JSON values.

    Factors and scalings may differ where the updates are the same, so that
    updates are compared where the directories tell them.

    Args:
        first: The path of a directory of PEFT.
        second: The path of another one.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged.
    """
    found = [
        _described(directory_lib.check_path(path)) for path in (first, second)
    ]
    (one, source, parts), (other, other_source, other_parts) = found
    compared = ("method", "base_model", "dtypes", "finite", "refused")
    yield from differences_lib.of_values(
        {key: one[key] for key in compared},
        {key: other[key] for key in compared},
    )
    yield from differences_lib.of_values(
        _settings(one), _settings(other), "config {}"
    )
    if source is None or other_source is None:
        headers = [directory_lib.read_header(path) for path in (first, second)]
        shown = ({k: str(v) for k, v in header.items()} for header in headers)
        yield from differences_lib.of_values(*shown, "tensor {}")
        return
    shared = [
        module
        for module in parts.keys() & other_parts.keys()
        if _is_told(parts[module]) and _is_told(other_parts[module])
    ]
    for module in sorted(shared):
        yield from _of_updates(module, parts[module], other_parts[module])
    tensors = (
        _but(one.tensors, tuple(_starts(p)[module] for module in shared))
        for one, p in ((source, parts), (other_source, other_parts))
    )
    yield from differences_lib.of_tensors(*tensors)
    yield from differences_lib.of_tensors(source.heads, other_source.heads)


def _settings(told):
    """The config without what is compared elsewhere or says nothing."""
    return {
        key: value
        for key, value in told["config"].items()
        if key not in _NOT_COMPARED and value not in (None, False, "", [], {})
    }


def _is_told(part):
    return part.update is not None and part.update.a is not None


def _but(tensors, starts):
    return {k: one for k, one in tensors.items() if not k.startswith(starts)}


def _of_updates(module, one, other):
    if one.dims != other.dims or one.kind != other.kind:
        yield differences_lib.difference(
            f"module {module}",
            f"{one.kind} {one.dims}",
            f"{other.kind} {other.dims}",
        )
        return
    first, second = one.update, other.update
    norms = [_inner(u, u) ** 0.5 for u in (first, second)]
    square = _inner(first, first) + _inner(second, second)
    apart = max(0.0, square - 2 * _inner(first, second)) ** 0.5
    # A comparison with NaN is false.
    if not apart <= _SAME * max(norms):
        size = max(norms)
        yield differences_lib.of_norms(
            f"update of {module}", *norms, apart / size if size else 0.0
        )
    magnitudes = [
        {} if u.magnitude is None else {f"{module} (magnitude)": u.magnitude}
        for u in (first, second)
    ]
    yield from differences_lib.of_tensors(*magnitudes)
    forms = [
        f"rank {u.a.shape[-2]}, scaling {u.scaling:.6g}"
        for u in (first, second)
    ]
    if forms[0] != forms[1]:
        yield differences_lib.difference(f"form of {module}", *forms)


def _inner(first, second):
    """The inner product of two updates, which are not formed."""
    with np.errstate(over="ignore", invalid="ignore"):
        ranks = (np.swapaxes(first.b, -1, -2) @ second.b) * (
            first.a @ np.swapaxes(second.a, -1, -2)
        )
    return first.scaling * second.scaling * float(np.sum(ranks))
