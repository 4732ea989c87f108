import functools
import math

import numpy as np
import pytest

from keras_randadapt import hadamard as module
from keras_randadapt.hadamard import group_factors
from keras_randadapt.hadamard import hadamard
from keras_randadapt.hadamard import hadamard_cores
from keras_randadapt.hadamard import hadamard_factors
from keras_randadapt.hadamard import is_supported
from keras_randadapt.hadamard import largest_order
from keras_randadapt.hadamard import window_order
from keras_randadapt.random import digest

pytestmark = pytest.mark.one_backend

PALEY = [12, 20, 28, 36, 44, 60, 76, 84, 108, 140, 148]
# Paley I: the skew construction, whose transpose is another matrix.
NOT_SYMMETRIC = [20, 44, 140]


def assert_orthogonal(matrix, scale):
    n = len(matrix)
    np.testing.assert_allclose(
        matrix @ matrix.T, scale * np.eye(n), atol=1e-11 * scale
    )


@pytest.mark.parametrize("order", range(1, 161))
def test_small_orders_are_orthogonal(order):
    assert_orthogonal(hadamard(order), 1)
    assert_orthogonal(hadamard(order, normalize=False), order)


@pytest.mark.parametrize("order", [768, 1280, 1600, 1018])
def test_common_widths_are_orthogonal(order):
    assert_orthogonal(hadamard(order), 1)


@pytest.mark.parametrize("order", [3072, 3584, 11008, 25600, 29568, 2**20])
def test_factors_multiply_to_the_order(order):
    factors = hadamard_factors(order)
    assert math.prod(map(len, factors)) == order
    for factor in factors:
        assert_orthogonal(factor, len(factor))
        assert factor.dtype == "float64"


@pytest.mark.parametrize("exponent", range(11))
def test_powers_of_two_are_sylvester(exponent):
    sylvester = np.array([[1]])
    for _ in range(exponent):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    matrix = hadamard(2**exponent, normalize=False)
    np.testing.assert_array_equal(matrix, sylvester)


def test_powers_of_two_are_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    matrix = hadamard(256, normalize=False)
    np.testing.assert_array_equal(matrix, linalg.hadamard(256))


@pytest.mark.parametrize("order", PALEY + [768, 1280, 1600, 2400, 3072, 3584])
def test_true_hadamard_orders_have_signs(order):
    for factor in hadamard_factors(order):
        np.testing.assert_array_equal(np.abs(factor), 1)


@pytest.mark.parametrize("order", PALEY)
def test_paley_symmetry(order):
    matrix = hadamard(order, normalize=False)
    assert np.array_equal(matrix, matrix.T) == (order not in NOT_SYMMETRIC)


@pytest.mark.parametrize("order", [3, 5, 7, 43, 101])
def test_hartley_matches_its_definition(order):
    index = np.arange(order)
    angle = 2 * np.pi * np.outer(index, index) / order
    matrix = hadamard(order, normalize=False)
    np.testing.assert_allclose(
        matrix, np.cos(angle) + np.sin(angle), atol=1e-11
    )


# The matrices are part of the adapter file format, as the random draws are.
@pytest.mark.parametrize(
    "order,expected",
    {
        20: "ebfbc523a6a6baae",
        28: "e663f741bc7da9fd",
        44: "a57181ad3857160c",
        768: "90f9a85c5f5ebb3f",
        1024: "522e37da4a44868a",
        1280: "3b46ae62eff8d7d7",
        1600: "38029398f88fa012",
        2400: "77dbd6f19cd9fefc",
    }.items(),
)
def test_golden_matrices(order, expected):
    assert digest(hadamard(order, normalize=False).astype("int8")) == expected


@pytest.mark.parametrize("order", [24, 240, 768, 1600, 86 * 8])
def test_grouping_does_not_change_the_matrix(order):
    expected = hadamard(order, normalize=False)
    sizes = set()
    for pass_cost in (0, 30, 10_000):
        grouped = group_factors(hadamard_cores(order), pass_cost)
        product = functools.reduce(np.kron, grouped)
        np.testing.assert_allclose(product, expected, rtol=1e-12)
        sizes.add(len(grouped))
    assert 1 in sizes and len(sizes) > 1


def test_grouping_by_the_cost_of_a_side():
    cores = hadamard_cores(768)
    shapes = [
        [len(matrix) for matrix in group_factors(cores, 36, left_cost)]
        for left_cost in (1, 3)
    ]
    assert shapes == [[24, 32], [12, 64]]


@pytest.mark.parametrize(
    "order,largest",
    {1024: 32, 768: 32, 3072: 32, 4096: 16, 11008: 43, 65536: 32}.items(),
)
def test_factors_are_balanced(order, largest):
    assert max(map(len, hadamard_factors(order))) <= largest


@pytest.mark.parametrize(
    "order,hartley",
    {
        # 1600 = 20 * 20 * 4: two Paley cores rather than one Hartley core.
        1600: (),
        11008: (43,),
        # 3 goes into a Paley core, so that only 43 coordinates are inexact.
        43 * 12: (43,),
        25: (25,),
        # Too large in one piece.
        11**3: (11, 121),
    }.items(),
)
def test_hartley_cores_are_as_small_as_can_be(order, hartley):
    assert module._hartley_cores(order) == hartley


def test_support():
    assert all(is_supported(order) for order in range(1, 1031))
    assert is_supported(1021) and not is_supported(1031)
    assert not is_supported(0) and not is_supported(-4)
    assert is_supported(np.int64(768))


@pytest.mark.parametrize("limit", [*range(1, 70), 1031, 30522, 50257, 151936])
def test_largest_order(limit):
    order = largest_order(limit)
    assert limit / 2 < order <= limit
    for factor in hadamard_factors(order):
        np.testing.assert_array_equal(np.abs(factor), 1)


def test_window_order():
    for order in (1, 2, 3, 7, 243, 768, 11008, 128256):
        assert window_order(order) is None
    assert window_order(30522) == largest_order(30522)
    # Supported, but windows are cheaper than a dense core of 1021.
    assert is_supported(1021) and window_order(1021) == largest_order(1021)


def test_unsupported_order_names_what_works():
    with pytest.raises(ValueError) as error:
        hadamard(30522)
    message = str(error.value)
    for number in ("`order` 30522", "5087", "30520", "30523"):
        assert number in message
    assert is_supported(30520) and is_supported(30523)
    assert not is_supported(30521)


@pytest.mark.parametrize("function", [hadamard, hadamard_factors, window_order])
def test_bad_order(function):
    for order in (0, -8):
        with pytest.raises(ValueError, match=f"`order`.*{order}"):
            function(order)
    for order in (4.0, "4", None, True):
        with pytest.raises(TypeError, match="`order`"):
            function(order)


def test_bad_limit():
    with pytest.raises(ValueError, match="`limit`.*0"):
        largest_order(0)
    with pytest.raises(TypeError, match="`limit`"):
        largest_order(10.5)


def test_cores_are_shared_and_read_only():
    cores = hadamard_cores(768)
    assert [len(core) for core in cores] == [12, 2, 2, 2, 2, 2, 2]
    assert hadamard_cores(768)[0] is cores[0]
    assert not any(core.flags.writeable for core in cores)
