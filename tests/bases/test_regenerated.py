"""Random vectors that are drawn inside the step."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_randadapt.bases import RegeneratedUniform
from tests import gradients
from tests import methods
from tests import zoo
from tests.ops.test_counter import compiled
from tests.ops.test_counter import reference_words


def reference_vectors(basis):
    """Bytes of Threefry's words, the lowest first: `(2 b - 255) / 256`."""
    rows = []
    for i in range(basis.count):
        words = reference_words(basis._key, 0, i, -(-basis.size // 4))
        data = words.astype("<i4").view(np.uint8)[: basis.size]
        rows.append((2.0 * data - 255) / 256)
    return np.array(rows, "float32")


class TestRegeneratedUniform:
    def test_bits(self):
        basis = RegeneratedUniform(5, 11, 7, "test")
        np.testing.assert_array_equal(basis.dense(), reference_vectors(basis))
        assert basis.digest() == GOLDEN_DIGEST

    def test_distribution(self):
        values = RegeneratedUniform(50, 2000, 0, "test").dense()
        assert abs(values.mean()) < 5 / np.sqrt(3 * values.size)
        assert abs(values.var() / RegeneratedUniform.variance - 1) < 0.01
        assert np.abs(values).max() == 255 / 256
        # Rows and columns are independent.
        correlation = np.corrcoef(values) - np.eye(50)
        assert np.abs(correlation).max() < 6 / np.sqrt(2000)

    def test_seed_and_role_matter(self):
        one = RegeneratedUniform(3, 9, 0, "a").dense()
        for other in ((1, "a"), (0, "b")):
            assert np.any(one != RegeneratedUniform(3, 9, *other).dense())

    @pytest.mark.parametrize("chunk", [1, 24, 60, 1 << 20])
    def test_products_whatever_the_chunk(self, chunk):
        basis = RegeneratedUniform(7, 11, 3, "test", chunk)
        dense = basis.dense().astype("float64")
        c, v = zoo.normal(7), zoo.normal(11)
        tensor = ops.convert_to_tensor
        methods.close(basis.combine(tensor(c)), c @ dense)
        methods.close(basis.correlate(tensor(v)), dense @ v)

    @pytest.mark.cpu_seconds(10, reason="PyTorch traces twenty rounds a word")
    def test_products_under_a_compiler(self):
        """Of two chunks: torch traces each of them anew."""
        basis = RegeneratedUniform(3, 5, 3, "test", 16)
        assert basis._at_a_time == 2
        dense = basis.dense().astype("float64")
        c, v = zoo.normal(3), zoo.normal(5)
        tensor = ops.convert_to_tensor
        methods.close(compiled(basis.combine)(tensor(c)), c @ dense)
        methods.close(compiled(basis.correlate)(tensor(v)), dense @ v)

    @pytest.mark.parametrize("chunk", [24, 1 << 20])
    def test_gradients_are_the_adjoint(self, chunk):
        basis = RegeneratedUniform(7, 11, 3, "test", chunk)
        dense = basis.dense().astype("float64")
        c, v = zoo.normal(7), zoo.normal(11)
        (of_c,) = gradients.gradients(basis.combine, c, [], v)
        methods.close(of_c, dense @ v)
        (of_v,) = gradients.gradients(basis.correlate, v, [], c)
        methods.close(of_v, c @ dense)

    def test_nothing_is_kept_for_the_backward_pass(self):
        basis = RegeneratedUniform(64, 500, 3, "test", 4096)
        weight = keras.Variable(np.zeros(64, "float32"))
        kept = gradients.kept_for_backward(
            lambda x: basis.combine(x + weight), zoo.normal(64), [weight]
        )
        assert all(np.prod(shape) <= 500 for shape, _ in kept)


GOLDEN_DIGEST = "7d7cbe5ce6d8c495"
