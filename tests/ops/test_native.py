"""The compiled transforms of a CPU, and that nothing depends on them."""

import ctypes
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from keras_randadapt.hadamard import hadamard
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import fwht
from keras_randadapt.ops import native
from keras_randadapt.ops import numpy as reference
from keras_randadapt.ops.transforms import _cached_program
from tests.ops import test_transforms

pytestmark = pytest.mark.needs_optimizer

BACKEND = keras.config.backend()
HERE = pathlib.Path(__file__).parent
compiled = pytest.mark.skipif(
    native.library() is None, reason="installed without a C compiler"
)
on_a_backend_with_it = pytest.mark.skipif(
    BACKEND not in ("jax", "tensorflow", "torch"), reason="has no use for it"
)
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="tests JAX")
only_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="tests TensorFlow"
)
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="tests PyTorch")


@pytest.fixture
def loaded_anew():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_it_is_built_where_there_is_a_compiler():
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    if os.environ.get("KERAS_RANDADAPT_NATIVE") == "0":
        pytest.skip("it is turned off")
    assert native.library() is not None, "install the package anew"


@pytest.mark.parametrize("case", test_transforms.CASES[6::4], ids=str)
def test_transforms_work_without_it(case, monkeypatch, loaded_anew):
    """By matrix products; all of `test_transforms.py` is a slow test."""
    monkeypatch.setenv("KERAS_RANDADAPT_NATIVE", "0")
    monkeypatch.setattr(native, "apply", None)
    test_transforms.test_randomized_transform(case)
    test_transforms.test_gradient_is_the_adjoint(case)


def test_fwht_works_without_it(monkeypatch, loaded_anew):
    monkeypatch.setenv("KERAS_RANDADAPT_NATIVE", "0")
    monkeypatch.setattr(native, "apply", None)
    test_transforms.test_fwht_axis(2)
    test_transforms.test_fwht_gradient(0, False)


@on_a_backend_with_it
@pytest.mark.slow(reason="runs all of another file")
def test_all_works_without_it():
    """`test_transforms.py`, by matrix products."""
    chosen = ["-m", "not slow", HERE / "test_transforms.py"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen],
        env={**os.environ, "KERAS_RANDADAPT_NATIVE": "0"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert " passed" in process.stdout


def test_it_can_be_turned_off(monkeypatch, loaded_anew):
    monkeypatch.setenv("KERAS_RANDADAPT_NATIVE", "0")
    assert native.library() is None
    assert native.translate(_cached_program(64, True, False)) is None


def test_a_file_that_cannot_be_loaded(monkeypatch, tmp_path, loaded_anew):
    class Spec:
        origin = str(tmp_path / "_native.so")

    pathlib.Path(Spec.origin).write_text("for another processor")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: Spec)
    with pytest.warns(UserWarning, match="install the package anew"):
        assert native.library() is None


@compiled
def test_a_file_of_another_version(monkeypatch, loaded_anew):
    monkeypatch.setattr(native, "_FORMAT", native._FORMAT + 1)
    with pytest.warns(UserWarning, match="of another version"):
        assert native.library() is None


def run(program, x, before=None, after=None, **options):
    """`after * T (before * x)` by compiled code."""
    x, before, after = (
        None if array is None else np.ascontiguousarray(array, np.float32)
        for array in (x, before, after)
    )
    # One row more, to see that nothing is written beyond the last.
    y = np.full((len(x) + 1, program.output_dim), np.nan, np.float32)
    native.apply(
        native.translate(program),
        x.ctypes.data,
        y.ctypes.data,
        len(x),
        None if before is None else before.ctypes.data,
        None if after is None else after.ctypes.data,
        **options,
    )
    assert np.isnan(y[-1]).all()
    return y[:-1]


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, "float32")


def close(got, expected):
    error = np.abs(got - expected).max()
    assert error <= 4e-6 * max(1, np.abs(expected).max())


def make(order, stages, inputs, outputs, scatter=False, gather=False):
    """A plan, as `test_transforms.py` makes them."""
    return RandomizedTransform(
        order,
        random.signs(0, "test", (stages, order)),
        inputs,
        outputs,
        random.permutation(0, "in", order)[:inputs] if scatter else None,
        random.permutation(0, "out", order)[:outputs] if gather else None,
    )


# Runs of 8 to 64, one and several radices; Paley cores, symmetric (36) and not
# (12, 20, 44); Hartley cores (7, 43); powers of two too small to be a run.
ORDERS = (
    *(1, 2, 3, 4, 7, 8, 12, 16, 20, 24, 32, 36, 40, 43, 44, 48, 64, 128, 256),
    *(300, 512, 768, 1024, 1280, 1376, 2048, 3072, 4096, 11008, 16384),
)


@pytest.mark.one_backend
@compiled
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_fwht(order, normalize, transpose):
    program = _cached_program(order, normalize, transpose)
    for rows in (1, 5):
        x = normal(rows, order)
        close(run(program, x), reference.apply(x.astype("float64"), program))


@pytest.mark.one_backend
@compiled
@pytest.mark.parametrize("order", [1, 2, 4, 7, 12, 20, 48, 64, 768, 1024])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_selections(order, stages):
    """Of all coordinates, all but one, some, one; in order and scattered."""
    dims = sorted({1, min(3, order), -(-order // 8), order - 1 or 1, order})
    options = (False, True)
    for inputs, outputs, scatter, gather in itertools.product(
        dims, dims, options, options
    ):
        plan = make(order, stages, inputs, outputs, scatter, gather)
        for program in (plan.program, plan.adjoint_program):
            if not program.steps:
                continue
            x = normal(5, program.input_dim)
            expected = reference.apply(x.astype("float64"), program)
            close(run(program, x), expected)


@pytest.mark.one_backend
@compiled
@pytest.mark.parametrize("order", [7, 64, 768])
def test_scales(order):
    plan = make(order, 2, order, order // 2, gather=True)
    for program in (plan.program, plan.adjoint_program):
        x = normal(5, program.input_dim)
        before, after = normal(program.input_dim), normal(program.output_dim)
        expected = reference.apply(x.astype("float64"), program, before, after)
        close(run(program, x, before, after), expected)
        expected = reference.apply(x.astype("float64"), program, before)
        close(run(program, x, before), expected)
        expected = reference.apply(x.astype("float64"), program, after=after)
        close(run(program, x, after=after), expected)


@pytest.mark.one_backend
@compiled
def test_threads_share_the_rows():
    """However many there are, the numbers are the same."""
    plan = make(768, 2, 768, 500, gather=True)
    # Enough for several, and not a multiple of what one takes.
    x = normal(2001, 768)
    expected = run(plan.program, x, threads=1)
    close(expected, reference.apply(x.astype("float64"), plan.program))
    for threads in (0, 2, 3, 1000):
        np.testing.assert_array_equal(
            run(plan.program, x, threads=threads), expected
        )


@compiled
@only_torch
def test_threads_of_openmp():
    from keras_randadapt.ops import torch as torch_backend

    parallel = torch_backend._parallel()
    if parallel is None:
        pytest.skip("this PyTorch has none")
    calls = []

    @ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    def counting(function, argument, threads, flags):
        calls.append(threads)
        parallel(
            ctypes.c_void_p(function), ctypes.c_void_p(argument), threads, flags
        )

    program = make(768, 2, 768, 500).program
    x = normal(1001, 768)
    got = run(program, x, threads=2, parallel=counting)
    np.testing.assert_array_equal(got, run(program, x, threads=1))
    assert calls == [2]


@pytest.mark.one_backend
@compiled
def test_no_rows():
    assert run(_cached_program(64, True, False), normal(0, 64)).shape == (0, 64)


@compiled
class TestWhatItTakes:
    def test_not_windows(self):
        # Of a dimension with a large prime: two transforms that overlap.
        assert native.translate(make(2 * 1031, 1, 9, 9).program) is None

    def test_not_large_cores(self):
        # Dense products that a matrix library makes faster.
        assert native.translate(_cached_program(76, True, False)) is None
        assert native.translate(_cached_program(64, True, False)) is not None

    def test_translated_once(self):
        program = make(24, 1, 24, 24).program
        assert native.translate(program) is native.translate(program)


def calls(monkeypatch):
    """A list that gets the rows of each call from PyTorch."""
    found = []
    apply = native.apply

    def counting(translated, x, y, rows, *arguments):
        found.append(rows)
        apply(translated, x, y, rows, *arguments)

    monkeypatch.setattr(native, "apply", counting)
    return found


@compiled
@only_torch
def test_what_torch_applies_with_it(monkeypatch):
    import torch

    found = calls(monkeypatch)
    x = torch.tensor(normal(3, 5, 64), requires_grad=True)
    fwht(x).sum().backward()
    assert found == [15, 15]
    # Not side by side in memory.
    close(
        fwht(torch.tensor(normal(64, 4)).T).numpy(),
        fwht(torch.tensor(np.ascontiguousarray(normal(64, 4).T))).numpy(),
    )
    found.clear()
    compiled = torch.compile(fwht, fullgraph=True, backend="aot_eager")
    close(compiled(x).detach().numpy(), fwht(x).detach().numpy())
    assert found == [15, 15]
    found.clear()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        fwht(x.to(dtype))
    fwht(x.to("meta"))
    exported = torch.export.export(Transform(), (x.detach(),))
    assert "keras_randadapt" not in str(exported.graph)
    assert found == []


if BACKEND == "torch":
    import torch

    class Transform(torch.nn.Module):
        def forward(self, x):
            return fwht(x)


def lowered(function, x):
    import jax

    return jax.jit(function).lower(x).as_text()


@compiled
@only_jax
def test_what_jax_applies_with_it():
    import jax

    from keras_randadapt.ops import jax as jax_backend

    x = jax.numpy.asarray(normal(3, 5, 64))
    name = jax_backend._NATIVE
    assert name in lowered(fwht, x)
    assert name in lowered(jax.grad(lambda x: fwht(x)[0, 0, 0]), x)
    assert name in lowered(jax.vmap(fwht), x)
    for dtype in ("float16", "bfloat16"):
        assert name not in lowered(fwht, x.astype(dtype))
    exported = jax.export.export(jax.jit(fwht))(x)
    assert name not in exported.mlir_module()


@compiled
@only_jax
def test_jax_on_several_devices():
    """XLA would gather what it does not know how to divide."""
    program = (
        "import os, jax, numpy as np\n"
        "from keras_randadapt.ops import fwht\n"
        "from jax.sharding import NamedSharding, PartitionSpec\n"
        "mesh = jax.make_mesh((2,), ('batch',))\n"
        "sharding = NamedSharding(mesh, PartitionSpec('batch'))\n"
        "x = np.random.default_rng(0).standard_normal((8, 64), 'float32')\n"
        "f = jax.jit(fwht)\n"
        "y = f(jax.device_put(x, sharding))\n"
        "assert y.sharding.is_equivalent_to(sharding, 2), y.sharding\n"
        "np.testing.assert_allclose(y, f(x), atol=1e-5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@compiled
@only_jax
def test_a_jax_that_does_not_take_it(monkeypatch):
    import jax

    from keras_randadapt.ops import jax as jax_backend

    def register(*arguments, **options):
        raise RuntimeError("API versions mismatch")

    x = jax.numpy.asarray(normal(3, 24))
    expected = fwht(x)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    jax_backend._register_native.cache_clear()
    with pytest.warns(UserWarning, match="slower on a CPU"):
        text = lowered(lambda x: fwht(x), x)
    assert jax_backend._NATIVE not in text
    close(jax.jit(lambda x: fwht(x))(x), expected)
    # Old ones, which have another interface or none, are not asked.
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    monkeypatch.delattr(jax, "ffi")
    jax_backend._register_native.cache_clear()
    assert jax_backend._NATIVE not in lowered(lambda x: fwht(x), x)
    jax_backend._register_native.cache_clear()


@compiled
@only_jax
def test_a_call_that_jax_makes_in_another_way():
    import jax

    from keras_randadapt.ops import jax as jax_backend

    assert jax_backend._register_native()
    x = jax.numpy.asarray(normal(3, 24))
    call = jax.ffi.ffi_call(
        jax_backend._NATIVE, jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="in another way"):
        jax.block_until_ready(call(x))


def traced(function, *arguments):
    """How often TensorFlow's graph of a function calls it."""
    graph = function.get_concrete_function(*arguments).graph
    return [op.type for op in graph.get_operations()].count(
        "KerasRandadaptTransform"
    )


@compiled
@only_tensorflow
class TestTensorFlow:
    def inputs(self, monkeypatch):
        """A list that gets what TensorFlow's operation is called with."""
        from keras_randadapt.ops import tensorflow as backend

        found = []
        operation = backend._operation

        def listing(x, *arguments, **options):
            found.append(x)
            return operation(x, *arguments, **options)

        monkeypatch.setattr(backend, "_operation", listing)
        return found

    def test_eager(self, monkeypatch):
        import tensorflow as tf

        found = self.inputs(monkeypatch)
        x = tf.constant(normal(3, 5, 64))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = fwht(x)
        tape.gradient(y, x)
        assert [tuple(x.shape) for x in found] == [(15, 64)] * 2
        for dtype in ("float64", "bfloat16", "float16"):
            fwht(tf.cast(x, dtype))
        assert len(found) == 2

    def test_what_may_be_saved_is_without_it(self):
        import tensorflow as tf

        x = tf.constant(normal(3, 64))
        assert traced(tf.function(lambda x: fwht(x)), x) == 0

        def one_step_on_data(x):
            return fwht(x)

        # As Keras's trainer calls it.
        assert traced(tf.function(one_step_on_data), x) == 1
        compiled = tf.function(one_step_on_data, jit_compile=True)
        assert traced(compiled, x) == 0
        with tf.distribute.OneDeviceStrategy("CPU:0").scope():
            assert traced(tf.function(one_step_on_data), x) == 0
        # TensorFlow would take the same graph for an export.
        inner = tf.function(lambda x: fwht(x))

        def one_step_on_data(x):
            return inner(x)

        tf.function(one_step_on_data)(x)
        assert traced(inner, x) == 0

    def test_a_bank_predicts_with_it(self, monkeypatch, tmp_path):
        inputs = keras.Input((8,))
        model = keras.Model(inputs, keras.layers.Dense(8)(inputs))
        kra.inject(model, kra.RLoRA(8), "all-linear")
        kra.save_adapter(model, tmp_path / "a.safetensors")
        kra.eject(model)
        found = self.inputs(monkeypatch)
        with kra.serving.AdapterBank(model, tmp_path) as bank:
            del found[:]
            bank.predict(normal(2, 8), adapters=["a", None])
            assert len(found) == 2
            del found[:]
            bank.export(tmp_path / "saved")
            assert not found

    @pytest.mark.parametrize("steps", [1, 2])
    def test_keras_trains_evaluates_and_predicts_with_it(
        self, monkeypatch, steps
    ):
        found = self.inputs(monkeypatch)
        # By their names, which Keras may change.
        model = keras.Sequential([keras.Input((64,)), Transformed()])
        model.compile("sgd", "mse", steps_per_execution=steps)
        x = normal(10, 64)
        for function in (
            lambda: model.fit(x, x, batch_size=4, verbose=0),
            lambda: model.evaluate(x, x, batch_size=4, verbose=0),
            lambda: model.predict(x, batch_size=4, verbose=0),
        ):
            found.clear()
            function()
            assert found and not any(hasattr(x, "numpy") for x in found)

    def test_a_saved_model_after_training(self, tmp_path):
        import tensorflow as tf

        model = keras.Sequential([keras.Input((64,)), Transformed()])
        model.compile("sgd", "mse")
        x = normal(10, 64)
        model.fit(x, x, verbose=0)
        expected = model.predict(x, verbose=0)
        model.export(str(tmp_path / "exported"), verbose=False)
        tf.saved_model.save(model, str(tmp_path / "saved"))
        for name in ("exported", "saved"):
            graph = (tmp_path / name / "saved_model.pb").read_bytes()
            assert b"MatMul" in graph
            assert b"KerasRandadapt" not in graph
        loaded = tf.saved_model.load(str(tmp_path / "exported"))
        close(loaded.serve(x).numpy(), expected)

    def test_every_way_to_differentiate(self):
        import tensorflow as tf

        x = tf.constant(normal(5, 24))

        def forward(x):
            with tf.autodiff.ForwardAccumulator(x, x) as accumulator:
                y = fwht(x) ** 3
            return accumulator.jvp(y)

        def twice(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = fwht(x) ** 3
                gradient = inner.gradient(y, x)
            return outer.gradient(gradient, x)

        def jacobian(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(fwht(x) ** 3, 1)
            return tape.jacobian(y, x)

        def loop(x):
            for _ in tf.range(3):
                x = fwht(x)
            return tf.map_fn(fwht, x)

        for function in (forward, twice, jacobian, loop):
            assert traced(tf.function(function), x) == 0
            expected = tf.function(function)(x).numpy()
            close(function(x).numpy(), expected)
            function.__name__ = "one_step_on_data"
            signature = [tf.TensorSpec([None, 24])]
            got = tf.function(function, input_signature=signature)(x)
            close(got.numpy(), expected)

    def test_a_call_in_another_way(self):
        import tensorflow as tf

        from keras_randadapt.ops import tensorflow as backend

        translated = native.translate(_cached_program(24, True, False))
        for x in (normal(24), normal(3, 23), normal(2, 3, 24)):
            with pytest.raises(tf.errors.InvalidArgumentError, match="matrix"):
                backend._operation(
                    x, *[translated.integers, translated.floats] * 2, threads=1
                )

    def test_a_file_that_it_cannot_load(self, monkeypatch, tmp_path):
        from keras_randadapt.ops import tensorflow as backend

        path = tmp_path / "_native.so"
        path.write_text("for another processor")
        monkeypatch.setattr(native, "path", lambda: str(path))
        assert backend._load_operation() is None

    @pytest.mark.parametrize("other_copy", [False, True])
    @pytest.mark.cpu_seconds(10, reason="a process with TensorFlow")
    def test_imported_anew(self, tmp_path, other_copy):
        """As in a notebook, to take up changes, or another copy of the code."""
        program = tmp_path / "program.py"
        program.write_text(
            "import sys\n"
            "import numpy as np\n"
            "import tensorflow as tf\n"
            "def tangent_error(sign):\n"
            "    from keras_randadapt import ops\n"
            "    signs = np.ones((1, 64))\n"
            "    signs[0, ::2] = sign\n"
            "    plan = ops.RandomizedTransform(64, signs, 64, 64)\n"
            "    x = tf.reshape(tf.range(192.0), (3, 64))\n"
            "    with tf.autodiff.ForwardAccumulator(x, x) as accumulator:\n"
            "        y = ops.randomized_transform(x, plan)\n"
            "    return np.abs(accumulator.jvp(y) - y).max()\n"
            "assert tangent_error(1) < 1e-3\n"
            "from keras_randadapt.ops import fwht as first\n"
            "for name in list(sys.modules):\n"
            "    if name.startswith('keras_randadapt'):\n"
            "        del sys.modules[name]\n"
            "sys.path[:0] = sys.argv[1:]\n"
            "assert tangent_error(-1) < 1e-3\n"
            "first(tf.ones((3, 128)))\n"
            "from keras_randadapt.ops import tensorflow as backend\n"
            "print(backend._operation is not None, backend.__file__)\n"
        )
        paths = []
        if other_copy:
            package = HERE.parents[1] / "keras_randadapt"
            copy = tmp_path / "copy"
            shutil.copytree(package, copy / "keras_randadapt")
            paths = [str(copy)]
        process = subprocess.run(
            [sys.executable, program, *paths],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        has_operation, file = process.stdout.split()
        # One operation a process.
        assert has_operation == str(not other_copy)
        assert file.startswith(str(tmp_path)) == other_copy

    def test_vectorized_map_in_a_step(self):
        """As for the gradients of single examples."""
        import tensorflow as tf

        x = tf.constant(normal(6, 5, 24))

        def one_step_on_data(x):
            def gradient(x):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    loss = tf.reduce_sum(fwht(x) ** 3)
                return tape.gradient(loss, x)

            return tf.vectorized_map(gradient, x, fallback_to_while_loop=False)

        function = tf.function(one_step_on_data)
        # Of one iteration, and of all.
        assert traced(function, x) == 4
        matrix = hadamard(24)
        expected = 3 * (x.numpy() @ matrix.T) ** 2 @ matrix
        close(function(x).numpy(), expected)

    def test_other_devices(self, monkeypatch):
        import tensorflow as tf

        from keras_randadapt.ops import tensorflow as backend

        assert backend._stays_here()

        class Device:
            device_type = "CPU"
            name = "/device:CPU:0"

        def devices(device_type=None):
            return [Device]

        monkeypatch.setattr(tf.config, "list_logical_devices", devices)
        local = "/job:localhost/replica:0/task:0/device:CPU:0"
        for name, here in (
            (Device.name, True),
            (local, True),
            (local.replace("localhost", "worker"), False),
        ):
            Device.name = name
            assert backend._stays_here() is here
        Device.name, Device.device_type = "/device:GPU:0", "GPU"
        assert not backend._stays_here()

    def test_threads(self, monkeypatch):
        import tensorflow as tf

        from keras_randadapt.ops import tensorflow as backend

        assert 1 <= backend._threads() <= os.cpu_count()
        monkeypatch.setattr(
            tf.config.threading, "get_intra_op_parallelism_threads", lambda: 3
        )
        assert backend._threads() == 3


class Transformed(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return fwht(fwht(x) * self.scale)


@compiled
@pytest.mark.skipif(
    BACKEND != "jax", reason="PyTorch and TensorFlow do not share a process"
)
@pytest.mark.cpu_seconds(10, reason="a process with TensorFlow")
def test_two_copies_beside_tensorflow(tmp_path):
    """TensorFlow, which data may come from, ends a process for less."""
    package = HERE.parents[1] / "keras_randadapt"
    shutil.copytree(package, tmp_path / "keras_randadapt")
    program = (
        "import sys\n"
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "tf.constant(1) + 1\n"
        "from keras_randadapt.ops import native\n"
        "first = native.library()\n"
        "for name in list(sys.modules):\n"
        "    if name.startswith('keras_randadapt'):\n"
        "        del sys.modules[name]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from keras_randadapt.ops import native\n"
        "assert native.library()._name != first._name\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
