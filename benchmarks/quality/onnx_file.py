"""A reader of the weights in ONNX files.

An ONNX file is a protocol buffer. It consists of fields, each of which has a
number, a type and content (https://protobuf.dev/programming-guides/encoding).
The numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
The `onnx` package is a compiled library of 20 MB, while this reads few fields.
"""

import mmap
import typing

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Field numbers.
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_NAME, NODE_OPERATOR = 1, 3, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9

# Data types of tensors by number.
FLOAT, INT64 = 1, 7
DTYPES = {FLOAT: np.dtype("<f4"), INT64: np.dtype("<i8")}


class Node(typing.NamedTuple):
    """One operation: its name, its type and the names of its inputs."""

    name: str
    operator: str
    inputs: tuple


def read(path):
    """Reads the nodes and the stored tensors of an ONNX file.

    Args:
        path: The file.

    Returns:
        A list of `Node`, and the initializers, a dict of NumPy arrays.

    Raises:
        ValueError: If the file is no ONNX file or is cut short, or if a tensor
            is not stored as raw bytes of float32 or int64.
    """
    with open(path, "rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _parse(memoryview(content))
        except (IndexError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a whole ONNX file ({error}): install or "
                "download it again."
            ) from error


def _parse(model):
    graphs = _fields(model).get(MODEL_GRAPH)
    if not graphs:
        raise IndexError("it has no graph")
    graph = _fields(graphs[0])
    nodes = [_node(message) for message in graph.get(GRAPH_NODE, [])]
    tensors = dict(
        _tensor(message) for message in graph.get(GRAPH_INITIALIZER, [])
    )
    return nodes, tensors


def _node(message):
    fields = _fields(message)
    return Node(
        name=_text(fields, NODE_NAME),
        operator=_text(fields, NODE_OPERATOR),
        inputs=tuple(
            bytes(name).decode("utf-8") for name in fields.get(NODE_INPUT, [])
        ),
    )


def _tensor(message):
    fields = _fields(message)
    name = _text(fields, TENSOR_NAME)
    data_type = fields.get(TENSOR_TYPE, [0])[0]
    if data_type not in DTYPES or TENSOR_RAW not in fields:
        raise ValueError(
            f"Tensor {name!r} of ONNX data type {data_type} is not stored as "
            "raw bytes of float32 (1) or int64 (7), which are read here."
        )
    shape = []
    for dims in fields.get(TENSOR_DIMS, []):
        # A field has one number, or all numbers are packed in one field.
        shape += [dims] if isinstance(dims, int) else _varints(dims)
    raw, dtype = fields[TENSOR_RAW][0], DTYPES[data_type]
    if len(raw) != int(np.prod(shape)) * dtype.itemsize:
        raise IndexError(f"tensor {name!r} has {len(raw)} bytes for {shape}")
    return name, np.frombuffer(raw, dtype).reshape(shape)


def _text(fields, number):
    return bytes(fields.get(number, [b""])[-1]).decode("utf-8")


def _fields(message):
    """A message's fields, a dict from field numbers to lists of contents."""
    fields = {}
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(message, position)
        else:
            if kind == BYTES:
                size, position = _varint(message, position)
            elif kind in (FIXED64, FIXED32):
                size = 8 if kind == FIXED64 else 4
            else:
                raise IndexError(f"a field has type {kind}")
            value = message[position : position + size]
            position += size
            if position > len(message):
                raise IndexError(f"field {number} is cut short")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(message, position):
    """Reads an integer with 7 bits in each byte, the lowest bits first."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _varints(message):
    values = []
    position = 0
    while position < len(message):
        value, position = _varint(message, position)
        values.append(value)
    return values
