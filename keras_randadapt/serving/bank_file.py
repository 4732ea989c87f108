"""Bank files: all tenants of a bank in one safetensors file.

The tensor `tenants` has a row for each tenant; see `Layout`. `#base` has the
fingerprints of the base kernels, as in an adapter file. The metadata, a JSON
text, have the names, a digest of each row, the layout, and the metadata of the
adapter file that the bank was opened with. A row can be read alone.
"""

import hashlib
import json
import math
import threading

import numpy as np

from keras_randadapt.adapters import configs
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import paths
from keras_randadapt.model import tensor_data
from keras_randadapt.serving import layout as layout_lib
from keras_randadapt.serving import tenants

VERSION = 1
_ROWS = "tenants"

_LONGEST_HEADER = 100_000_000

# The number of rows that are read or written at once.
_AT_ONCE = 256


def write(filepath, shared, kept):
    """Writes a bank file.

    Args:
        filepath: string.
        shared: The bank's `Shared`.
        kept: A `Kept`, the tenants to write.
    """
    target = paths.check_writable(filepath)
    names = list(kept.tenants)
    classes = [tenant.classes for tenant in kept.tenants.values()]
    tensors = {}
    base = shared.first.tensors.get(file_format.BASE_KEY)
    if base is not None:
        tensors[file_format.BASE_KEY] = np.ascontiguousarray(base, "<f4")
    digests = [
        _digest(name, count, row)
        for rows, part in _some(kept, names, classes)
        for row, (name, count) in zip(rows, part)
    ]
    metadata = {
        "version": VERSION,
        "names": names,
        "classes": classes,
        "digests": digests,
        "layout": _described(shared.layout),
        "first": shared.first.metadata,
    }
    metadata["digest"] = file_format.digest(tensors, metadata)
    shape = len(names), shared.layout.size
    header = _header(metadata, tensors, shape)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(
            f"{len(names)} tenants are too many for one file: safetensors "
            f"takes headers of {_LONGEST_HEADER} bytes, and theirs has "
            f"{len(header)}. Save them as several banks."
        )
    paths.replace(target, _pieces(header, tensors, kept, names))


def _header(metadata, tensors, shape):
    text = {file_format.BANK_KEY: configs.canonical(metadata)}
    header, offset = {"__metadata__": text}, 0
    shapes = {key: array.shape for key, array in tensors.items()}
    for key, dims in {**shapes, _ROWS: shape}.items():
        end = offset + 4 * dims[0] * dims[1]
        header[key] = {
            "dtype": "F32",
            "shape": list(dims),
            "data_offsets": [offset, end],
        }
        offset = end
    data = json.dumps(header, separators=(",", ":")).encode()
    # safetensors begins tensors at multiples of 8 bytes.
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _pieces(header, tensors, kept, names):
    yield header
    for array in tensors.values():
        yield array.tobytes()
    for rows, _ in _some(kept, names, names):
        yield rows.astype("<f4", copy=False).tobytes()


def _some(kept, names, classes):
    """Rows, some at a time, with the pairs of their names and classes."""
    for start in range(0, len(names), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        yield kept.rows(names[part]), list(zip(names[part], classes[part]))


def _described(layout):
    return [
        [*part.key, part.weight, list(part.shape), part.start]
        for part in layout.parts
    ]


def _digest(name, classes, row):
    total = hashlib.sha256(json.dumps([name, classes]).encode())
    total.update(row.astype("<f4", copy=False).tobytes())
    return total.hexdigest()


class BankFile:
    """A bank file that was opened and whose metadata were checked.

    Attributes:
        path: string.
        names: list of the tenants' names.
        classes: list of ints or `None`; see `Tenant`.
    """

    def __init__(self, path):
        self.path = path
        self._metadata, self._base, shape = _read(path)
        self.names = self._metadata["names"]
        self.classes = self._metadata["classes"]
        self._size = shape[1]
        self._lock = threading.Lock()
        # The file stays the one that was checked, even if another takes its
        # name. A memory map of a file that is cut short would end the process.
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._start = _start_of_rows(self._file)

    def close(self):
        self._file.close()

    def first(self, layers):
        """A `File` like the bank's first tenant, with zeros as its weights.

        Args:
            layers: dict from address to layer of the model.
        """
        sizes, tensors = {}, {}
        for address, kind, _, shape, _ in self._metadata["layout"]:
            if kind == layout_lib.ADAPTER:
                size = math.prod(shape)
                sizes[address] = sizes.get(address, 0) + size
        if sum(sizes.values()) > self._size:
            raise self._damaged("its layout is not that of its rows")
        for address, size in sizes.items():
            tensors[address] = np.zeros(size, "float32")
        metadata = self._metadata["first"]
        file_reading.check_form(
            self.path, {"kept": metadata.get("kept")}, _FORM_OF_KEPT
        )
        for address in metadata["kept"]:
            weights = getattr(layers.get(address), "weights", [None])
            for i, weight in enumerate(weights):
                shape = () if weight is None else weight.shape
                tensors[f"{address}#{i}"] = np.zeros(shape, "float32")
        if self._base is not None:
            tensors[file_format.BASE_KEY] = self._base
        file_reading.check_version(self.path, metadata)
        file_reading.check_described(
            self.path, tensors, metadata, with_digest=False
        )
        return tenants.File(self.path, tensors, metadata)

    def check(self, shared):
        """Raises `ValueError` unless rows are those of a bank.

        Args:
            shared: The bank's `Shared`.
        """
        layout = _described(shared.layout)
        if layout != self._metadata["layout"] or (
            self._size != shared.layout.size
        ):
            raise self._damaged("its layout is not that of its rows")
        units = shared.units_of_last()
        for name, classes in zip(self.names, self.classes):
            if (classes is None) != (units is None) or (
                units is not None and not 0 < classes <= units
            ):
                raise self._damaged(
                    f"it has a head of {classes} classes for {name!r}, and "
                    f"the model's has {units}"
                )
        if units is not None:
            shared.check_can_be_smaller(self.path, min(self.classes))

    def _rows(self, start, stop):
        count = 4 * self._size
        with self._lock:
            self._file.seek(self._start + start * count)
            data = _read_all(self._file, (stop - start) * count)
        for i in range(start, stop):
            piece = data[(i - start) * count : (i - start + 1) * count]
            row = np.frombuffer(piece[: len(piece) // 4 * 4], "<f4")
            told = self._metadata["digests"][i]
            if _digest(self.names[i], self.classes[i], row) != told:
                raise ValueError(
                    f"The tenant {self.names[i]!r} of '{self.path}' is "
                    "damaged: its weights do not have the digest that they "
                    "were saved with. Remove it, and add it again from its "
                    "own file."
                )
            if not np.all(np.isfinite(row)):
                raise ValueError(
                    f"The tenant {self.names[i]!r} of '{self.path}' has NaN "
                    "or infinity among its weights."
                )
        rows = np.frombuffer(data, "<f4").reshape(stop - start, self._size)
        return rows.astype("float32")

    def fill(self, table, shared, lazy):
        """Adds the tenants to an empty table.

        Args:
            table: A `Table`.
            shared: The bank's `Shared`.
            lazy: bool. Whether rows are read when they are asked for.
        """

        def filled(start, rows):
            for classes, row in zip(self.classes[start:], rows):
                shared.fill_up(row, classes)
            return rows

        def row(number):
            return filled(number, self._rows(number, number + 1))[0]

        def parts():
            for start in range(0, len(self.names), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(self.names))
                yield start, filled(start, self._rows(start, stop))

        if lazy:
            table.add_file(self.names, self.classes, read=row)
        else:
            table.add_file(self.names, self.classes, parts=parts())

    def _damaged(self, what):
        return ValueError(f"'{self.path}' is damaged: {what}.")


def _read(path):
    """The metadata, the fingerprints and the shape of the rows of a file."""
    paths.check_readable(path)
    with tensor_data.opened(path, "bank file") as file:
        header = file.metadata() or {}
        if file_format.METADATA_KEY in header:
            raise ValueError(
                f"'{path}' is the file of one adapter. Make a bank, and "
                "give it to `add`."
            )
        if file_format.BANK_KEY not in header:
            raise ValueError(
                f"'{path}' is a safetensors file, but not one that "
                "`AdapterBank.save` wrote."
            )
        metadata = json.loads(header[file_format.BANK_KEY])
        keys = set(file.keys())
        rows = file.get_slice(_ROWS) if _ROWS in keys else None
        shape = None if rows is None else tuple(rows.get_shape())
        dtype = None if rows is None else rows.get_dtype()
        others = {
            key: file.get_tensor(key) for key in keys & {file_format.BASE_KEY}
        }
    if not isinstance(metadata, dict):
        raise ValueError(f"'{path}' is damaged: its metadata are no object.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"'{path}' is a bank file of version "
            f"{str(metadata.get('version'))[:20]}; this release of "
            f"keras_randadapt reads version {VERSION}. Upgrade "
            "keras_randadapt."
        )
    file_reading.check_form(path, metadata, _FORM)
    counts = {len(metadata[key]) for key in ("names", "classes", "digests")}
    if (
        keys - {_ROWS, file_format.BASE_KEY}
        or dtype != "F32"
        or len(shape) != 2
        or counts != {shape[0]}
        or not shape[0]
    ):
        raise ValueError(
            f"'{path}' is damaged: it does not have a row of numbers for each "
            "of its names."
        )
    if metadata["digest"] != file_format.digest(others, metadata):
        raise ValueError(
            f"'{path}' is damaged: its names and layout do not have the digest "
            "that they were saved with."
        )
    return metadata, others.get(file_format.BASE_KEY), shape


def _start_of_rows(file):
    """The place in an open file, which was checked, where its rows begin."""
    length = int.from_bytes(_read_all(file, 8), "little")
    header = json.loads(_read_all(file, length))
    return 8 + length + header[_ROWS]["data_offsets"][0]


def _read_all(file, count):
    """So many bytes of an unbuffered file, or all that are left."""
    pieces = []
    while count > 0 and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _are_names(value):
    return (
        isinstance(value, list)
        and all(isinstance(one, str) and one for one in value)
        and len(set(value)) == len(value)
    )


def _are_digests(value):
    return isinstance(value, list) and all(
        isinstance(one, str) and len(one) == 64 for one in value
    )


def _are_counts(value):
    return isinstance(value, list) and all(
        one is None or (type(one) is int and one > 0) for one in value
    )


def _is_layout(value):
    return isinstance(value, list) and all(
        isinstance(part, list)
        and [type(one) for one in part] == [str, str, str, list, int]
        and all(type(dim) is int and dim >= 0 for dim in part[3])
        and len(part[3]) <= 8
        for part in value
    )


_FORM = {
    "version": (True, "a number", lambda value: value == VERSION),
    "names": (True, "a list of distinct names", _are_names),
    "classes": (True, "a list of numbers", _are_counts),
    "digests": (True, "a list of digests", _are_digests),
    "layout": (True, "a list of weights", _is_layout),
    "first": (True, "an object", lambda value: isinstance(value, dict)),
    "digest": (True, "a string", lambda value: isinstance(value, str)),
}
_FORM_OF_KEPT = {"kept": (True, "a list of distinct strings", _are_names)}
