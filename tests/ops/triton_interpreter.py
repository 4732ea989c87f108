"""The Triton kernel on a CPU, under Triton's interpreter.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET
when it is imported.
"""

import functools

import keras
import numpy as np
import pytest
import torch

import keras_randadapt as kra
from keras_randadapt.hadamard import hadamard
from keras_randadapt.ops import fwht
from keras_randadapt.ops import numpy as reference
from keras_randadapt.ops import randomized_transform
from keras_randadapt.ops import torch as torch_backend
from keras_randadapt.ops import triton as kernels
from tests import methods
from tests import zoo
from tests.methods import site_of
from tests.plans import make

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Counts the kernel's launches: no test passes by another path."""
    launched = []
    kernel = kernels.kernel

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "kernel", Counting())
    yield launched
    assert launched


def normal(*shape, dtype=torch.float32):
    return torch.tensor(zoo.normal(*shape)).to(dtype)


def close(got, expected, dtype=torch.float32):
    assert got.dtype == dtype
    expected = np.asarray(expected)
    error = np.abs(got.detach().double().numpy() - expected).max()
    assert error <= TOLERANCE[dtype] * np.abs(expected).max()


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
def test_compiled_graphs_have_one_operator(scaled):
    from torch._dynamo.backends.common import aot_autograd

    plan = make(44, 2, 40, 30, gather=True)
    x, after = normal(7, 40).requires_grad_(), normal(30)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    def apply(x):
        y = randomized_transform(x, plan, after=after if scaled else None)
        return fwht(y[:, :20])

    compiled = torch.compile(
        apply, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)
    )
    y = compiled(x)
    close(y, apply(x).detach().double())
    y.sum().backward()
    assert len(graphs) == 2
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("keras_randadapt.transform.default") == 2
        assert not any("mm" in target for target in targets)


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


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_need_no_kernel(strict, tmp_path):
    """Nor this library: they run wherever PyTorch does."""
    plan = make(44, 2, 40, 30, gather=True)

    class Module(torch.nn.Module):
        def forward(self, x):
            return randomized_transform(x, plan)

    x = normal(7, 40)
    y = Module()(x)
    program = torch.export.export(Module(), (x,), strict=strict)
    assert "keras_randadapt" not in str(program.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    close(loaded.module()(x), y.double())


def test_autocast_leaves_the_dtype():
    plan = make(44, 2, 40, 30)
    x = normal(7, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = randomized_transform(x, plan)
    close(y, x.double().numpy() @ plan.dense().T)


@pytest.mark.parametrize(
    "dims",
    [
        (0, None, None),
        (1, None, None),
        (None, 0, None),
        (0, 0, None),
        (1, 0, 1),
    ],
    ids=str,
)
def test_vmap(dims):
    """Of the data, of scales, or of both."""
    plan = make(44, 2, 40, 30, gather=True)
    x, before, after = (
        array[0] if dim is None else array
        for array, dim in zip(
            (normal(5, 7, 40), normal(5, 40), normal(5, 30)), dims
        )
    )
    y = torch.func.vmap(
        lambda x, before, after: randomized_transform(
            x, plan, before=before, after=after
        ),
        in_dims=dims,
    )(
        *(
            array if dim is None else array.movedim(0, dim)
            for array, dim in zip((x, before, after), dims)
        )
    )
    x, before, after = (t.double().numpy() for t in (x, before, after))
    # Scales of one example each go with all its rows.
    before = before.reshape(-1, 1, 40) if before.ndim == 2 else before
    after = after.reshape(-1, 1, 30) if after.ndim == 2 else after
    close(y, (x * before) @ plan.dense().T * after)


def test_forward_mode():
    plan = make(44, 2, 40, 30)
    inputs = normal(7, 40), normal(40), normal(30)
    tangents = normal(7, 40) + 1, normal(40) + 1, normal(30) + 1

    def apply(x, before, after):
        return randomized_transform(x, plan, False, before, after)

    x, before, after, dx, dbefore, dafter = (
        t.double().numpy() for t in (*inputs, *tangents)
    )
    dense = plan.dense().T
    expected = ((dx * before + x * dbefore) @ dense) * after
    expected += (x * before) @ dense * dafter
    close(torch.func.jvp(apply, inputs, tangents)[1], expected)
    y = torch.func.jvp(
        lambda x: randomized_transform(x, plan), (inputs[0],), (inputs[0],)
    )[1]
    close(y, x @ dense)


def test_constants_of_inference_mode_serve_training():
    plan = make(52, 2, 40, 30)
    x, after = normal(7, 40).requires_grad_(), normal(30).requires_grad_()
    with torch.inference_mode():
        randomized_transform(x, plan, after=after)
    y = randomized_transform(x, plan, after=after)
    (found,) = torch.autograd.grad(y.sum(), after)
    close(found, np.sum(x.detach().double().numpy() @ plan.dense().T, 0))


def test_opcheck():
    """PyTorch's own checks of an operator: its schema, and fake tensors."""
    plan = make(44, 2, 40, 30, gather=True, scatter=True)
    x, before, after = normal(7, 40), normal(40), normal(30)
    torch.library.opcheck(
        torch_backend._transform,
        (x, plan.program.key, before, after),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rlora():
    """The adapter that the kernel is for, its gradients too."""
    adapter = kra.RLoRA(8)
    adapter.build_at(site_of((48, 40)))
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


def test_rlora_under_function_transforms():
    """Gradients of single examples, stacked adapters, second derivatives."""
    adapter = kra.RLoRA(8)
    adapter.build_at(site_of((48, 40)))
    methods.randomize(adapter)
    x = normal(5, 48)
    alpha, beta = (v.value.detach() for v in adapter.variables)

    def loss(alpha, beta, x):
        mapping = list(zip(adapter.variables, (alpha, beta)))
        with keras.StatelessScope(state_mapping=mapping):
            return (adapter.delta(x, True) ** 2).sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    whole = grad(loss, 1)(alpha, beta, x)
    single = vmap(grad(loss, 1), (None, None, 0))(alpha, beta, x)
    close(single.sum(0), whole.double())
    stacked = vmap(grad(loss, 1), (None, 0, None))(
        alpha, torch.stack([beta, 2 * beta]), x
    )
    # The loss is quadratic in beta.
    close(stacked[0], whole.double())
    close(stacked[1], 2 * whole.double())
    second = grad(lambda beta: (grad(loss, 1)(alpha, beta, x) * beta).sum())
    close(second(beta), 2 * whole.double())
    compiled = torch.compile(grad(loss, 1), backend="aot_eager")
    close(compiled(alpha, beta, x), whole.double())
