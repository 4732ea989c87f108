"""`status`: the attached adapters of a model, printed and as data."""

import dataclasses
import math

import keras

from keras_randadapt import _compat
from keras_randadapt.model import fingerprint
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import weighting


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterStatus:
    """One attached adapter.

    Attributes:
        name: The adapter's name.
        method: The name of its class.
        active: Whether the model computes with it.
        weight: The weight of its update, or `None` if it is not active.
        trained: Whether `fit` trains it.
        sites: tuple of the sites' structural addresses.
        kept: tuple of the addresses of the layers that it keeps trainable.
        parameters: The number of its trainable weights.
        head_parameters: The number of trainable weights of its kept layers.
        base_digest: A short hash of the base kernels of its sites. It is equal
            for equal weights, and `None` inside a `merged` block, where the
            kernels are others.
    """

    name: str
    method: str
    active: bool
    weight: float | None
    trained: bool
    sites: tuple[str, ...]
    kept: tuple[str, ...]
    parameters: int
    head_parameters: int
    base_digest: str | None


class Status(tuple):
    """A tuple of `AdapterStatus`, in the order of injection. `print` it."""

    def __str__(self):
        if not self:
            return "No adapter is attached."
        rows = [_HEADINGS, *map(_row, self)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(
                # Numbers are aligned at the right.
                cell.rjust(width) if i in _NUMBERS else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        )

    __repr__ = __str__


_HEADINGS = (
    "name",
    "method",
    "active",
    "weight",
    "trained",
    "sites",
    "parameters",
    "head parameters",
    "base",
)
_NUMBERS = (3, 5, 6, 7)


def status(model: keras.Model) -> Status:
    """Tells which adapters a model has, and how it uses them.

    Args:
        model: A Keras model, with or without adapters.

    Returns:
        A `Status`: a tuple with an `AdapterStatus` for each adapter. It prints
        as a table.

    Raises:
        TypeError: If `model` is no Keras model.

    Example:

    ```python
    print(kra.status(model))
    active = [one.name for one in kra.status(model) if one.active]
    ```
    """
    state_lib.check_is_model(model)
    if not state_lib.is_adapted(model):
        return Status()
    state_lib.check_has_values(model)
    state = model._randadapt
    return Status(_adapter_status(state, name) for name in state.records)


def _adapter_status(state, name):
    record = state.records[name]
    active = name in state.active
    digest = None
    if state.block != "merged":
        rows = fingerprint.of_sites(state.layers, sorted(record.addresses))
        digest = fingerprint.digest(rows)
    return AdapterStatus(
        name=name,
        method=type(record.template).__name__,
        active=active,
        weight=weighting.of(state, [name])[name] if active else None,
        trained=name in state.trained,
        sites=tuple(record.addresses),
        kept=tuple(record.kept),
        parameters=sum(
            _count(adapter) for adapter in state.adapters(name).values()
        ),
        head_parameters=sum(_count(state.layers[a]) for a in record.kept),
        base_digest=digest,
    )


def _count(layer):
    return sum(
        math.prod(weight.shape) for weight in _compat.trainable_by_nature(layer)
    )


def _row(one):
    return (
        one.name,
        one.method,
        "yes" if one.active else "no",
        "-" if one.weight is None else f"{one.weight:g}",
        "yes" if one.trained else "no",
        f"{len(one.sites):,}",
        f"{one.parameters:,}",
        f"{one.head_parameters:,}",
        one.base_digest or "-",
    )
