"""Adapter files that were damaged: refused by name, and the model untouched."""

import time
import tracemalloc

import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


def _cut(data, generator):
    return data[: generator.integers(len(data))]


def _flip_bits(data, generator):
    damaged = bytearray(data)
    for place in generator.integers(len(data), size=generator.integers(1, 5)):
        damaged[place] ^= 1 << generator.integers(8)
    return bytes(damaged)


def _flip_in_the_header(data, generator):
    """The header says what follows, so damage there has most ways to go."""
    length = 8 + int.from_bytes(data[:8], "little")
    return _flip_bits(data[:length], generator) + data[length:]


def _zero_a_run(data, generator):
    start = generator.integers(len(data))
    stop = start + generator.integers(1, 64)
    return data[:start] + bytes(len(data[start:stop])) + data[stop:]


def _insert(data, generator):
    place = generator.integers(len(data))
    return (
        data[:place] + generator.bytes(generator.integers(1, 16)) + data[place:]
    )


def _change_a_digit(data, generator):
    """Numbers in the header: lengths, shapes, ranks, versions."""
    length = 8 + int.from_bytes(data[:8], "little")
    digits = [i for i in range(8, length) if data[i : i + 1].isdigit()]
    damaged = bytearray(data)
    damaged[generator.choice(digits)] = ord(str(generator.integers(10)))
    return bytes(damaged)


DAMAGES = (
    _cut,
    _flip_bits,
    _flip_in_the_header,
    _zero_a_run,
    _insert,
    _change_a_digit,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of three methods, with a head and without, and their outputs."""
    folder = tmp_path_factory.mktemp("saved")
    found = []
    expected = []
    for i, adapter in enumerate(
        (kra.LoRA(2), kra.RLoRA(5), kra.DoRA(kra.RandLoRA(3)))
    ):
        model, x, _ = zoo.classifier()
        kra.inject(model, adapter, keep_trainable=["logits"] if i else None)
        zoo.randomize(model)
        path = folder / f"{i}.safetensors"
        kra.save_adapter(model, path)
        found.append(path.read_bytes())
        expected.append(zoo.outputs(model, x))
    return found, expected


@pytest.fixture(autouse=True)
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def _check(data, path, numbers):
    files, expected = data
    model, x, _ = zoo.classifier()
    before, out = zoo.snapshot(model), zoo.outputs(model, x)
    refused = 0
    for number in numbers:
        generator = np.random.default_rng(number)
        damage = DAMAGES[number % len(DAMAGES)]
        path.write_bytes(damage(files[number % len(files)], generator))
        seconds = time.process_time()
        tracemalloc.reset_peak()
        try:
            kra.load_adapter(model, path)
        except ValueError as error:
            assert str(path) in str(error), (number, error)
            refused += 1
        else:
            # Bytes that mean nothing were damaged, or a digest's spelling.
            np.testing.assert_array_equal(
                zoo.outputs(model, x), expected[number % len(files)]
            )
            kra.eject(model)
        assert time.process_time() - seconds < 1, number
        assert tracemalloc.get_traced_memory()[1] < 100e6, number
        after = zoo.snapshot(model)
        assert before.keys() == after.keys(), number
        for key, (name, value) in before.items():
            np.testing.assert_array_equal(after[key][1], value, err_msg=name)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
    assert refused > 0.9 * len(numbers)


def test_fifty(data, tmp_path):
    _check(data, tmp_path / "damaged.safetensors", range(50))


@pytest.mark.slow(reason="ten thousand files")
def test_ten_thousand(data, tmp_path):
    _check(data, tmp_path / "damaged.safetensors", range(10_000))
