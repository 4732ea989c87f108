"""The Triton kernel on a CPU, under Triton's interpreter.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET
when it is imported.
"""

import functools

import numpy as np
import pytest
import torch

import keras_randadapt as kra
from keras_randadapt import random
from keras_randadapt.hadamard import hadamard
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import fwht
from keras_randadapt.ops import numpy as reference
from keras_randadapt.ops import randomized_transform
from keras_randadapt.ops import triton as kernels
from tests import methods
from tests import zoo

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Counts the kernel's launches: no test passes by another path."""
    launched = []
    kernel = kernels._kernel

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_kernel", Counting())
    yield launched
    assert launched


def normal(*shape, dtype=torch.float32):
    return torch.tensor(zoo.normal(*shape)).to(dtype)


def close(got, expected, dtype=torch.float32):
    assert got.dtype == dtype
    expected = np.asarray(expected)
    error = np.abs(got.detach().double().numpy() - expected).max()
    assert error <= TOLERANCE[dtype] * np.abs(expected).max()


def make(order, stages, inputs, outputs, gather=False, scatter=False):
    """A plan, as `tests/ops/test_transforms.py` makes them."""
    signs = random.signs(0, "test", (stages, order))
    return RandomizedTransform(
        order,
        signs,
        inputs,
        outputs,
        random.permutation(0, "in", order)[:inputs] if scatter else None,
        random.permutation(0, "out", order)[:outputs] if gather else None,
    )


# Powers of two; Paley cores, symmetric (36, 76) and not (12, 20, 44); Hartley
# cores (7, 43); cores that fill their tile and that do not; one axis to three.
ORDERS = (1, 2, 7, 12, 20, 36, 44, 64, 128, 256, 304, 768, 1024, 1376, 4096)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_fwht(order, transpose):
    matrix = hadamard(order).T if transpose else hadamard(order)
    x = normal(5, order)
    close(fwht(x, transpose=transpose), x.double().numpy() @ matrix.T)


@pytest.mark.parametrize("order", [11008, 24576, 32768])
def test_large_orders(order):
    x = normal(1, order)
    y = fwht(x)
    close(torch.linalg.norm(y), torch.linalg.norm(x.double()))
    close(fwht(y, transpose=True), x.double())
    plan = make(order, 1, order, order)
    expected = reference.apply(x.double().numpy(), plan.program)
    close(randomized_transform(x, plan), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_projection(stages, scatter, gather, adjoint, dtype):
    """Signs, stages, what is placed and kept, and scales: against a matrix."""
    plan = make(48, stages, 40, 30, gather, scatter)
    matrix = plan.dense().T if adjoint else plan.dense()
    outputs, inputs = matrix.shape
    # More than one block of rows, and the last one not full.
    x = normal(2, 70, inputs, dtype=dtype)
    before, after = normal(inputs, dtype=dtype), normal(outputs, dtype=dtype)
    y = randomized_transform(x, plan, adjoint)
    close(y, x.double().numpy() @ matrix.T, dtype)
    y = randomized_transform(x, plan, adjoint, before, after)
    x = x.double().numpy() * before.double().numpy()
    close(y, x @ matrix.T * after.double().numpy(), dtype)


def test_rows_that_are_not_contiguous():
    plan = make(64, 2, 64, 32, gather=True)
    x = normal(6, 128)
    for view in (x[:, ::2], x[::2, :64], x[:, 64:], x[:1, :64].expand(6, 64)):
        expected = view.double().numpy() @ plan.dense().T
        close(randomized_transform(view, plan), expected)


def test_no_rows_and_one_row(launches):
    plan = make(64, 2, 64, 32)
    assert randomized_transform(normal(0, 64), plan).shape == (0, 32)
    assert not launches
    x = normal(64)
    close(randomized_transform(x, plan), plan.dense() @ x.double().numpy())


def test_infinity_and_nan():
    for value in (np.inf, np.nan):
        x = normal(3, 64)
        x[1, 5] = value
        y = fwht(x)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()
    # Of the bits that a GPU gives a NaN, none is zero.
    bits = torch.full((1, 64), 0x7FFFFFFF, dtype=torch.int32)
    assert torch.isnan(fwht(bits.view(torch.float32))).all()


def scaled_gradients(apply, x, before, after, upstream):
    arguments = [t.clone().requires_grad_() for t in (x, before, after)]
    return torch.autograd.grad(apply(*arguments), arguments, upstream)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(compiled):
    plan = make(44, 2, 40, 30, gather=True, scatter=True)
    matrix = plan.dense()
    x, before, after = normal(7, 40), normal(40), normal(30)
    upstream = normal(7, 30)

    def apply(x, before, after):
        return randomized_transform(x, plan, before=before, after=after)

    if compiled:
        # The graph and its gradient, without a code generator.
        apply = torch.compile(apply, fullgraph=True, backend="aot_eager")
    found = scaled_gradients(apply, x, before, after, upstream)
    x, before, after, upstream = (
        t.double().numpy() for t in (x, before, after, upstream)
    )
    pulled = (upstream * after) @ matrix
    close(found[0], pulled * before)
    close(found[1], np.sum(pulled * x, 0))
    close(found[2], np.sum((x * before) @ matrix.T * upstream, 0))


@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_graph_has_one_operator(scaled):
    plan = make(44, 2, 40, 30, gather=True)
    x, after = normal(7, 40), normal(30)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def apply(x):
        y = randomized_transform(x, plan, after=after if scaled else None)
        return fwht(y[:, :20])

    y = torch.compile(apply, fullgraph=True, backend=backend)(x)
    close(y, apply(x).double())
    calls = [n for n in graphs[0].graph.nodes if "transform" in str(n.target)]
    assert len(calls) == 2


def test_compiled_graph_outlives_its_plan():
    x = normal(7, 40)

    def compiled():
        plan = make(44, 2, 40, 30)
        apply = torch.compile(
            functools.partial(randomized_transform, plan=plan),
            backend="aot_eager",
        )
        close(apply(x), x.double().numpy() @ plan.dense().T)
        return apply, plan.dense()

    apply, matrix = compiled()
    close(apply(x), x.double().numpy() @ matrix.T)


def test_export(tmp_path):
    """The exported program has the kernel as an operator, constants and all,
    so that another process can run it."""
    plan = make(44, 2, 40, 30, gather=True)

    class Module(torch.nn.Module):
        def forward(self, x):
            return randomized_transform(x, plan)

    x = normal(7, 40)
    program = torch.export.export(Module(), (x,))
    assert "keras_randadapt.transform.default" in str(program.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    close(program.module()(x), x.double().numpy() @ plan.dense().T)


def test_autocast_leaves_the_dtype():
    plan = make(44, 2, 40, 30)
    x = normal(7, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = randomized_transform(x, plan)
    close(y, x.double().numpy() @ plan.dense().T)


def test_vmap():
    plan = make(44, 2, 40, 30, gather=True)
    x, before, after = normal(5, 7, 40), normal(40), normal(30)

    def apply(x):
        return randomized_transform(x, plan, before=before, after=after)

    for dim, batched in ((0, x), (1, x.movedim(0, 1))):
        y = torch.func.vmap(apply, in_dims=dim)(batched)
        close(y, apply(x).double())


def test_opcheck():
    """PyTorch's own checks of an operator: schema, fake tensors, autograd."""
    plan = make(44, 2, 40, 30, gather=True, scatter=True)
    x = normal(7, 40).requires_grad_()
    before, after = normal(40), normal(30).requires_grad_()
    torch.library.opcheck(
        kernels.transform_by_key, (x, plan.program.key, before, after)
    )


def test_rlora():
    """The adapter that the kernel is for, its gradients too."""
    adapter = kra.RLoRA(8)
    adapter.build((48, 40))
    methods.randomize(adapter)
    a, b = adapter.basis_a.dense(), adapter.basis_b.dense()
    x, upstream = normal(7, 48).requires_grad_(), normal(7, 40)
    y = adapter.delta(x, True)
    alpha, beta = (v.value.detach().double().numpy() for v in adapter.variables)
    dense = (beta[:, None] * b) @ (alpha[:, None] * a)
    close(y, x.detach().double().numpy() @ dense.T)
    found = torch.autograd.grad(
        y, [x, *[v.value for v in adapter.variables]], upstream
    )
    upstream = upstream.double().numpy()
    z = x.detach().double().numpy() @ a.T
    pulled = (upstream * beta) @ b
    close(found[0], upstream @ dense)
    close(found[1], np.sum(pulled * z, 0))
    close(found[2], np.sum(z * alpha @ b.T * upstream, 0))
