"""A reader of those parts of the GGUF format that SmolLM2's file uses.

The format is public (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
All numbers are little-endian. A file consists of a header, metadata, a table of
tensors and their data. The `gguf` package reads it too, but reading two kinds
of quantized blocks takes ten lines and saves a dependency.
"""

import mmap
import struct

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# The formats of `struct` by the number of a metadata type. Strings and arrays
# have the numbers below.
SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"]))
SCALARS.update({10: "Q", 11: "q", 12: "d"})
STRING = 8
ARRAY = 9

BLOCK = 32
# The weights of a block share a scale, and in Q4_1 also a minimum.
Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)])
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


def read(path):
    """Reads a GGUF file.

    Args:
        path: The file.

    Returns:
        The metadata, a dict, and the tensors, a dict of float32 NumPy arrays.
        Shapes are NumPy's: the dimension that is contiguous comes last, so a
        linear layer's weight is `(outputs, inputs)`.

    Raises:
        ValueError: If the file is no GGUF file, is cut short, or has a tensor
            of a type other than F32, F16, Q4_1 and Q8_0.
    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file.")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(content)
    except (struct.error, IndexError) as error:
        raise ValueError(
            f"{path} ends too early for a GGUF file ({error}). It may have "
            "been cut short: install or download it again."
        ) from error


def _parse(content):
    cursor = _Cursor(content, len(MAGIC))
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(
            f"GGUF versions {VERSIONS} are read here. Received: {version}"
        )
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(entry_count):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        dims = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
        table.append((name, dims, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, dims, kind, offset in table:
        # The format lists the contiguous dimension first.
        tensors[name] = _tensor(content, name, dims[::-1], kind, start + offset)
    return metadata, tensors


def _tensor(content, name, shape, kind, offset):
    if kind not in READERS:
        raise ValueError(
            f"Tensor {name!r} has GGUF type {kind}. Read here are F32 (0), "
            "F16 (1), Q4_1 (3) and Q8_0 (8)."
        )
    dtype, block, dequantize = READERS[kind]
    count = int(np.prod(shape))
    if block > 1 and shape[-1] % block:
        raise ValueError(
            f"Tensor {name!r} of shape {tuple(shape)} is quantized in blocks "
            f"of {block}, which do not divide its last dimension."
        )
    size = count // block * dtype.itemsize
    if offset + size > len(content):
        raise IndexError(f"tensor {name!r}")
    blocks = np.frombuffer(content, dtype, count // block, offset)
    return dequantize(blocks).reshape(shape)


def dequantize_q4_1(blocks):
    """Computes `scale * q + minimum`, q from 0 to 15.

    Args:
        blocks: A structured array of type `Q4_1`, shape `(blocks,)`.

    Returns:
        A float32 array of shape `(blocks, 32)`. The low nibbles of the 16
        bytes are the first half of a block and the high nibbles the second.
    """
    nibbles = blocks["nibbles"]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    scale = blocks["scale"].astype("float32")[:, None]
    minimum = blocks["minimum"].astype("float32")[:, None]
    return q.astype("float32") * scale + minimum


def dequantize_q8_0(blocks):
    """Computes `scale * q`, q from -128 to 127.

    Args:
        blocks: A structured array of type `Q8_0`, shape `(blocks,)`.

    Returns:
        A float32 array of shape `(blocks, 32)`.
    """
    scale = blocks["scale"].astype("float32")[:, None]
    return blocks["values"].astype("float32") * scale


def _float32(values):
    return values.astype("float32")


# For the number of each tensor type: the dtype in the file, the weights of a
# block, and the conversion to float32.
READERS = {
    0: (np.dtype("<f4"), 1, _float32),
    1: (np.dtype("<f2"), 1, _float32),
    3: (Q4_1, BLOCK, dequantize_q4_1),
    8: (Q8_0, BLOCK, dequantize_q8_0),
}


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, content, position):
        self.content = content
        self.position = position

    def scalar(self, form):
        (value,) = struct.unpack_from("<" + form, self.content, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def string(self):
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.content):
            raise IndexError("a string")
        return self.content[start : self.position].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"GGUF has no metadata type {kind}.")
        return self.scalar(SCALARS[kind])
