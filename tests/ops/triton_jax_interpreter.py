"""The Triton kernel in JAX programs, on a CPU under Triton's interpreter.

Run by test_triton_jax.py in a process of its own: Triton reads TRITON_INTERPRET
when it is imported. `jax_triton` can't run it there, so a stand-in gives the
kernel its arguments as the documentation of `jax_triton.triton_call` says; the
real one compiles it in test_triton_jax.py.
"""

import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.interpreters import mlir

import keras_randadapt as kra
from keras_randadapt import ops
from keras_randadapt.hadamard import hadamard
from keras_randadapt.ops import fwht
from keras_randadapt.ops import jax as jax_backend
from keras_randadapt.ops import numpy as reference
from keras_randadapt.ops import randomized_transform
from tests import methods
from tests import zoo
from tests.plans import make

TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1e-2}
GPU = types.SimpleNamespace(
    compute_capability="9.0",
    core_count=2,
    shared_memory_per_block_optin=232448,
)
launched = []


def triton_call(
    *arguments,
    kernel,
    out_shape,
    grid,
    name,
    num_warps,
    num_stages,
    compute_capability,
    **constants,
):
    """Arrays and numbers in order, then the result; constants by name."""
    assert compute_capability == 90 and name and num_warps and num_stages

    def run(*arrays):
        launched.append(grid)
        arrays = iter(arrays)
        given = [
            a if type(a) is int else tensor(next(arrays)) for a in arguments
        ]
        dtype = getattr(torch, str(out_shape.dtype))
        y = torch.full(out_shape.shape, torch.nan, dtype=dtype)
        kernel[grid,](*given, y, **constants)
        bits = {2: torch.int16, 4: torch.int32}[y.dtype.itemsize]
        return y.view(bits).numpy().view(out_shape.dtype)

    arrays = [a for a in arguments if type(a) is not int]
    return jax.pure_callback(run, out_shape, *arrays)


def tensor(array):
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


find_gpu = jax_backend._gpu
sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
jax_backend._HAS_JAX_TRITON = True
jax_backend._gpu = lambda: GPU
mlir.register_lowering(
    jax_backend._transform, jax_backend._lower_on_cuda, platform="cpu"
)


@pytest.fixture(autouse=True)
def launches():
    """Counts the kernel's launches: no test passes by another path."""
    launched.clear()
    yield launched
    assert launched


def normal(*shape, dtype="float32"):
    return jnp.asarray(zoo.normal(*shape), dtype)


def close(got, expected, dtype="float32"):
    assert got.dtype == dtype
    expected = np.asarray(expected)
    error = np.abs(np.asarray(got, "float64") - expected).max()
    assert error <= TOLERANCE[dtype] * np.abs(expected).max()


def exact(x):
    return np.asarray(x, "float64")


def apply(x, plan, adjoint=False, before=None, after=None):
    call = jax.jit(randomized_transform, static_argnums=(1, 2))
    return call(x, plan, adjoint, before, after)


# One axis to three; Paley cores and Hartley cores, padded and not.
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", [1, 12, 20, 43, 64, 304, 1024, 1376, 4096])
def test_fwht(order, transpose):
    matrix = hadamard(order).T if transpose else hadamard(order)
    x = normal(5, order)
    y = jax.jit(lambda x: fwht(x, transpose=transpose))(x)
    close(y, exact(x) @ matrix.T)


def test_large_order():
    x, plan = normal(1, 11008), make(11008, 1, 11008, 11008)
    close(apply(x, plan), reference.apply(exact(x), plan.program))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("stages", [1, 3])
def test_projection(stages, scatter, gather, adjoint, dtype):
    """Signs, stages, what is placed and kept: against a matrix."""
    plan = make(48, stages, 40, 30, gather, scatter)
    matrix = plan.dense().T if adjoint else plan.dense()
    # More than one block of rows, and the last one not full.
    x = normal(2, 70, matrix.shape[1], dtype=dtype)
    close(apply(x, plan, adjoint), exact(x) @ matrix.T, dtype)


def test_one_row_and_no_rows(launches):
    plan = make(64, 2, 64, 32)
    x = normal(64)
    close(apply(x, plan), plan.dense() @ exact(x))
    count = len(launches)
    assert apply(normal(0, 64), plan).shape == (0, 32)
    assert len(launches) == count


def test_gradients():
    plan = make(44, 2, 40, 30, gather=True, scatter=True)
    matrix = plan.dense()
    inputs = normal(7, 40), normal(40), normal(30)
    upstream = normal(7, 30)
    y, pull = jax.vjp(
        lambda x, before, after: apply(x, plan, False, before, after), *inputs
    )
    found = pull(upstream)
    x, before, after, upstream = map(exact, (*inputs, upstream))
    close(y, (x * before) @ matrix.T * after)
    pulled = (upstream * after) @ matrix
    close(found[0], pulled * before)
    close(found[1], np.sum(pulled * x, 0))
    close(found[2], np.sum((x * before) @ matrix.T * upstream, 0))


def test_forward_mode_and_vmap():
    plan = make(44, 2, 40, 30)
    x = normal(7, 3, 40)
    y, tangent = jax.jvp(lambda x: apply(x, plan), (x,), (2 * x,))
    close(tangent, 2 * exact(y))
    mapped = jax.jit(jax.vmap(lambda x: apply(x, plan), 1, 1))(x)
    close(mapped, exact(x) @ plan.dense().T)


def test_rlora():
    """The adapter that the kernel is for, its gradients too."""
    adapter = kra.RLoRA(8)
    adapter.build((48, 40))
    methods.randomize(adapter)
    a, b = adapter.basis_a.dense(), adapter.basis_b.dense()
    alpha, beta = (exact(v.value) for v in adapter.variables)
    dense = (beta[:, None] * b) @ (alpha[:, None] * a)
    x, upstream = normal(7, 48), normal(7, 40)
    y, pull = jax.vjp(jax.jit(lambda x: adapter.delta(x, True)), x)
    close(y, exact(x) @ dense.T)
    close(pull(upstream)[0], exact(upstream) @ dense)


class TestProducts:
    """Where matrix products run instead."""

    @pytest.fixture(autouse=True)
    def launches(self):
        launched.clear()
        yield
        assert not launched

    def check(self, function=None, shape=(7, 40)):
        plan, x = make(44, 2, 40, 30), normal(*shape)
        function = function or (lambda x: apply(x, plan))
        close(function(x), exact(x) @ plan.dense().T)

    def test_outside_compiled_functions(self):
        plan = make(44, 2, 40, 30)
        self.check(lambda x: randomized_transform(x, plan))

    def test_in_exported_programs(self):
        plan, x = make(44, 2, 40, 30), normal(7, 40)
        exported = jax.export.export(jax.jit(lambda x: apply(x, plan)))(x)
        assert "callback" not in exported.mlir_module()
        self.check(exported.call)

    def test_where_there_is_no_gpu(self, monkeypatch):
        monkeypatch.setattr(jax_backend, "_gpu", lambda: None)
        self.check()

    def test_where_jax_triton_does_not_work(self, monkeypatch):
        def imported():
            for name in list(sys.modules):
                if name.endswith("ops.triton_jax"):
                    monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(ops, "triton_jax", raising=False)
            jax_backend._launcher.cache_clear()

        too_old = types.SimpleNamespace(triton_call=lambda *args, **more: None)
        for module in (None, too_old):
            monkeypatch.setitem(sys.modules, "jax_triton", module)
            imported()
            with pytest.warns(UserWarning, match="jax_triton` does not work"):
                self.check()
        jax_backend._launcher.cache_clear()

    def test_its_import_leaves_the_environment(self):
        """Even one that fails after it has changed it."""
        from keras_randadapt.ops import triton_jax

        for before in ({}, {"FOLDER": "kernels"}):
            os.environ.pop("FOLDER", None)
            os.environ.update(before)
            with pytest.raises(ImportError):
                with triton_jax._unchanged("FOLDER"):
                    os.environ["FOLDER"] = ""
                    raise ImportError
            assert os.environ.pop("FOLDER", None) == before.get("FOLDER")

    def test_turned_off(self, monkeypatch):
        monkeypatch.setattr(jax_backend, "_HAS_JAX_TRITON", False)
        self.check()

    @pytest.mark.parametrize(
        "change",
        [
            {"compute_capability": "7.5"},
            {"compute_capability": "10.0"},
            {"shared_memory_per_block_optin": 1000},
            {"shared_memory_per_block_optin": None},
            {"core_count": None},
        ],
        ids=str,
    )
    def test_on_other_gpus(self, change, monkeypatch):
        known = {**vars(GPU), **change}
        known = {key: value for key, value in known.items() if value}
        gpu = types.SimpleNamespace(**known)
        monkeypatch.setattr(jax_backend, "_gpu", lambda: gpu)
        self.check()

    def test_on_gpus_of_two_kinds(self, monkeypatch):
        """On which of them a program is to run, only JAX knows."""

        def gpu(kind, capability):
            return types.SimpleNamespace(
                device_kind=kind, compute_capability=capability
            )

        one, another = gpu("A", "8.0"), gpu("B", "9.0")
        cases = [([one, one], one), ([one, another], None)]
        for gpus, found in cases:
            monkeypatch.setattr(jax, "local_devices", lambda backend: gpus)
            for interpreted in (False, True):
                monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
                find_gpu.cache_clear()
                assert find_gpu() is (None if interpreted else found)
        find_gpu.cache_clear()

    def test_where_devices_share_an_array(self):
        plan = make(44, 2, 40, 30)
        mesh = jax.make_mesh((2,), ("data",))
        rows = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec("data")
        )
        function = jax.jit(lambda x: apply(x, plan))
        self.check(lambda x: function(jax.device_put(x, rows)), (8, 40))

    def test_of_float64(self):
        with jax.enable_x64(True):
            plan = make(44, 2, 40, 30)
            x = zoo.normal(7, 40).astype("float64")
            y = apply(jnp.asarray(x), plan)
            assert y.dtype == "float64"
            np.testing.assert_allclose(y, x @ plan.dense().T, rtol=1e-10)
