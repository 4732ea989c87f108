"""`Table`: the results of analyses, without a need for pandas."""

import csv
import os
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_randadapt._types import Axis
from keras_randadapt.analysis import plotting


class Table:
    """Named columns of equal length.

    Args:
        columns: dict from name to a sequence with a value for each row. A
            value may itself be an array.

    Raises:
        ValueError: If the columns differ in length.
    """

    def __init__(self, columns: Mapping[str, Iterable[Any]]):
        self._columns = {
            name: _as_column(values) for name, values in columns.items()
        }
        lengths = {name: len(values) for name, values in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"`columns` must be of equal length. Received: {lengths}"
            )

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, column: str) -> np.ndarray:
        """One column, as a NumPy array."""
        if column not in self._columns:
            raise KeyError(
                f"There is no column {column!r}. Columns: {self.columns}"
            )
        return self._columns[column]

    def rows(self) -> list[dict[str, Any]]:
        """The rows, each a dict from column to value."""
        return [
            dict(zip(self._columns, values))
            for values in zip(*self._columns.values())
        ]

    def to_dict(self) -> dict[str, list[Any]]:
        """dict from column to a list of plain Python values."""
        return {
            name: [_plain(value) for value in values]
            for name, values in self._columns.items()
        }

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes a CSV file, in which arrays are separated by spaces."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for values in zip(*self.to_dict().values()):
                writer.writerow(
                    " ".join(map(str, value))
                    if isinstance(value, list)
                    else value
                    for value in values
                )

    def __repr__(self):
        cells = [[name, *map(_shown, c)] for name, c in self._columns.items()]
        widths = [max(map(len, column)) for column in cells]
        text = [values.dtype.kind in "OU" for values in self._columns.values()]
        lines = []
        for row in zip(*cells):
            padded = (
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(row, widths, text)
            )
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)


class SiteTable(Table):
    """A table of measures, with a row for each site.

    Its first columns are `site`, the structural address, and `layer`, the
    layer's path.

    Attributes:
        measure: The column that `plot` draws.
    """

    def __init__(self, columns: Mapping[str, Iterable[Any]], measure: str):
        super().__init__(columns)
        self.measure = measure

    def plot(self, axis: Axis | None = None, column: str | None = None) -> Axis:
        """Draws a bar for each site.

        Args:
            axis: Optional matplotlib axis. A new one by default.
            column: Optional string. The column to draw; by default `measure`.

        Returns:
            The axis.
        """
        column = self.measure if column is None else column
        values = self[column]
        axis = plotting.axis_or_new(axis)
        axis.barh(np.arange(len(self)), values)
        plotting.label_sites(axis.yaxis, self["site"])
        # The model's first site comes on top.
        axis.invert_yaxis()
        axis.set_xlabel(column.replace("_", " "))
        return axis


def _as_column(values):
    values = list(values)
    if any(np.ndim(value) for value in values):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    return np.asarray(values)


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(value):
    if np.ndim(value):
        # The first singular values are the largest.
        head = " ".join(f"{number:.4g}" for number in value[:4])
        return f"{head} ..." if len(value) > 4 else head
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return str(value)
