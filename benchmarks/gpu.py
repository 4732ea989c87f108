"""Checks and times the transforms and adapters on a GPU, with PyTorch and JAX.

    python benchmarks/gpu.py            # minutes, on one GPU

Each of these runs in its own processes:

- It compares `fwht` and the randomized projection with float64, for many orders
  and dtypes, and prints the largest error over the largest number.
- It divides their times by that of copying the tensor on the device, for 256M
  elements. The projection is RLoRA's of rank 512 with two stages. It reads the
  tensor and writes a part of it, so it may take less time than a copy.
- It measures training steps of a stack of Llama blocks and their memory, with
  `training_step.py`. The shape is that of a model of 1B parameters, in bfloat16
  with 4,096 tokens.

PyTorch runs the Triton kernel of `keras_randadapt/ops/triton.py`, and JAX runs
matrix products. The table at the end has the figures that issue trackers ask
for first.

`--quick` runs small sizes of everything, also on a CPU. It uses the kernel if
`TRITON_INTERPRET=1` is set.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

FOLDER = pathlib.Path(__file__).parent
BACKENDS = ("torch", "jax")
ORDERS = (16, 64, 256, 768, 1024, 1536, 3584, 4096, 8192, 11008, 28672, 32768)
SIZES = (768, 1024, 2048, 4096, 8192, 11008, 16384, 32768)
DTYPES = ("float32", "bfloat16", "float16")
TIMED = ("float32", "bfloat16")
# With so many elements, launching a kernel takes less time than running it.
ELEMENTS = 1 << 28
RANK = 512
#: The error of a few roundings, as a fraction of the largest number.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


class Device:
    """The operations that differ between the backends."""

    def __init__(self, quick):
        import keras

        self.launches, self.rounds = (1, 1) if quick else (10, 9)
        self.backend = keras.config.backend()
        if self.backend == "torch":
            import torch

            self.is_gpu = torch.cuda.is_available()
            self.name = (
                torch.cuda.get_device_name() if self.is_gpu else "no GPU"
            )
            self.copy = torch.clone
            self.compiled = lambda function: function
        else:
            import jax

            device = jax.devices()[0]
            self.is_gpu = device.platform == "gpu"
            self.name = device.device_kind if self.is_gpu else "no GPU"
            zero = jax.numpy.zeros(())
            self.copy = jax.jit(lambda x: x + zero.astype(x.dtype))
            self.compiled = jax.jit

    def way(self):
        """Whether transforms run in the kernel, as words for a heading."""
        import keras_randadapt as kra

        x = self.random(16, 1024, "float32")
        if self.backend == "jax":
            text = self.compiled(kra.ops.fwht).lower(x).as_text()
            kernel = "triton_kernel_call" in text
        else:
            from keras_randadapt.ops import torch as backend

            function = backend._kernel(projection(1024, RANK).program, x)
            kernel = "triton" in getattr(function, "__module__", "")
        return "the kernel" if kernel else "no kernel"

    def tensor(self, array, dtype):
        import keras

        return keras.ops.cast(keras.ops.convert_to_tensor(array), dtype)

    def random(self, rows, columns, dtype):
        import keras

        x = keras.random.normal((rows, columns), dtype="float32", seed=0)
        return keras.ops.cast(x, dtype)

    def time(self, function, x):
        """The milliseconds of a launch, the median over rounds."""
        times = []
        for _ in range(self.rounds):
            # The first call compiles.
            self.wait(function(x))
            start = time.perf_counter()
            for _ in range(self.launches):
                y = function(x)
            self.wait(y)
            times.append(1e3 * (time.perf_counter() - start) / self.launches)
        return statistics.median(times)

    def host_time(self, function, x):
        """The microseconds of a launch on the host."""
        self.wait(function(x))
        start = time.perf_counter()
        for _ in range(100):
            y = function(x)
        elapsed = time.perf_counter() - start
        self.wait(y)
        return 1e6 * elapsed / 100

    def wait(self, y):
        if self.backend == "jax":
            y.block_until_ready()
        elif self.is_gpu:
            import torch

            torch.cuda.synchronize()


def projection(order, rank):
    """The plan of RLoRA's first basis for a dimension."""
    from keras_randadapt import random
    from keras_randadapt.ops import RandomizedTransform

    signs = random.signs(0, "benchmark", (2, order))
    kept = np.sort(random.permutation(0, "rows", order)[:rank])
    return RandomizedTransform(order, signs, order, rank, output_index=kept)


def errors(device, orders, dtype):
    """The largest relative error over all orders and both directions."""
    import keras

    from keras_randadapt.ops import numpy as reference
    from keras_randadapt.ops import randomized_transform

    found = []
    for order, adjoint in itertools.product(orders, (False, True)):
        plan = projection(order, max(1, order // 2))
        dim = plan.output_dim if adjoint else plan.input_dim
        x = np.random.default_rng(order).standard_normal((5, dim))
        x = device.tensor(x, dtype)
        exact = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
        program = plan.adjoint_program if adjoint else plan.program
        expected = reference.apply(exact.astype("float64"), program)
        apply = device.compiled(
            lambda x: randomized_transform(x, plan, adjoint)
        )
        got = apply(x)
        got = keras.ops.convert_to_numpy(keras.ops.cast(got, "float32"))
        error = np.abs(got - expected).max() / np.abs(expected).max()
        found.append((float(error), order))
    # NaN counts as the largest error.
    return max(found, key=lambda pair: (math.isnan(pair[0]), pair[0]))


def ratios(device, order, dtype, elements):
    """The times of fwht, projection and adjoint, divided by a copy's."""
    import keras

    from keras_randadapt.ops import fwht
    from keras_randadapt.ops import randomized_transform

    plan = projection(order, min(RANK, order))
    rows = elements // order
    x = device.random(rows, order, dtype)
    part = device.random(rows, plan.output_dim, dtype)
    copy = device.time(device.copy, x)
    bytes_moved = 2 * x.dtype.itemsize * rows * order
    functions = {
        "fwht": (fwht, x),
        "projection": (lambda x: randomized_transform(x, plan), x),
        "adjoint": (lambda x: randomized_transform(x, plan, True), part),
    }
    found = {
        name: device.time(device.compiled(function), argument) / copy
        for name, (function, argument) in functions.items()
    }
    keras.utils.clear_session()
    return {"copy_gb_s": bytes_moved / copy / 1e6, **found}


def compile_kernels(job):
    """Runs the functions of the tables on few rows, to fill Triton's cache."""
    order, dtype, sizes = job
    device = Device(quick=True)
    if order in ORDERS:
        errors(device, [order], dtype)
    if order in sizes and dtype in TIMED:
        ratios(device, order, dtype, 16 * order)


def kernels(arguments):
    """Errors and ratios of one backend, printed and returned as JSON."""
    from keras_randadapt.ops import fwht
    from keras_randadapt.ops import randomized_transform

    device = Device(arguments.quick)
    if not device.is_gpu and not arguments.quick:
        sys.exit(f"{device.backend} sees no GPU; --quick runs without one.")
    orders = ORDERS[:5] if arguments.quick else ORDERS
    sizes = SIZES[:2] if arguments.quick else SIZES
    elements = 1 << 14 if arguments.quick else ELEMENTS
    if device.backend == "torch" and device.is_gpu:
        # There are some hundred kernels, and each compiles for a second.
        jobs = itertools.product({*orders, *sizes}, DTYPES, [sizes])
        processes = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            min(8, len(os.sched_getaffinity(0))), mp_context=processes
        ) as pool:
            list(pool.map(compile_kernels, jobs))
    print(f"\n{device.backend} on {device.name}, {device.way()}\n")
    print("| dtype | largest error | at d | tolerance |\n" + "| --- " * 4 + "|")
    found = {"device": device.name, "wrong": 0, "ratios": {}}
    for dtype in DTYPES:
        error, order = errors(device, orders, dtype)
        tolerance = TOLERANCE[dtype]
        found["wrong"] += not error <= tolerance
        print(f"| {dtype} | {error:.1e} | {order} | {tolerance:.0e} |")
    print(
        f"\n| d | dtype | copy, GB/s | fwht / copy | projection, r={RANK} / "
        "copy | its adjoint / copy |\n" + "| --- " * 6 + "|"
    )
    for dtype, order in itertools.product(TIMED, sizes):
        r = ratios(device, order, dtype, elements)
        found["ratios"][f"{dtype} {order}"] = r
        print(
            f"| {order} | {dtype} | {r['copy_gb_s']:.0f} | {r['fwht']:.2f} | "
            f"{r['projection']:.2f} | {r['adjoint']:.2f} |",
            flush=True,
        )
    plan, x = projection(1024, RANK), device.random(16, 1024, "float32")
    calls = {
        "copy": device.copy,
        "fwht": device.compiled(fwht),
        "projection": device.compiled(lambda x: randomized_transform(x, plan)),
    }
    print("\nOf the host's time, a call takes, in microseconds:", end="")
    for name, call in calls.items():
        print(f" {name} {device.host_time(call, x):.0f}", end="")
    print()
    print(json.dumps(found))


def run(backend, *command):
    """Runs a benchmark on a backend, shows and returns the lines it prints."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            # Without this, JAX would allocate most of the GPU's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if not line.startswith("{"):
            print(line, end="", flush=True)
    if process.wait():
        sys.exit(f"{backend}: {command} failed")
    return lines


def everything(arguments):
    start = time.monotonic()
    quick = ["--quick"] if arguments.quick else []
    found = {}
    for backend in BACKENDS:
        command = [__file__, "--backend", backend, *quick]
        found[backend] = json.loads(run(backend, *command)[-1])
    step = [FOLDER / "training_step.py", "--dtype", "bfloat16"]
    step += ["--model", "tiny" if arguments.quick else "llama-1b"]
    step += ["--tokens", "256" if arguments.quick else "4096", "--only"]
    methods = ["LoRA(8)", "LoRA(64)", "RLoRA(512)", "RandLoRA"]
    for backend in BACKENDS:
        run(backend, *step, *methods)
        run(backend, *step, *methods, "--memory")

    devices = ", ".join(sorted({f["device"] for f in found.values()}))
    print(f"\nIn short ({devices}; {time.strftime('%Y-%m-%d')}):\n")
    print("| figure | " + " | ".join(BACKENDS) + " |")
    print("| --- " * (1 + len(BACKENDS)) + "|")
    wrong = [str(f["wrong"]) for f in found.values()]
    print(f"| dtypes with a wrong result | {' | '.join(wrong)} |")
    for dtype in TIMED:
        cells = []
        for one in found.values():
            all_sizes = {
                int(key.split()[1]): ratio["fwht"]
                for key, ratio in one["ratios"].items()
                if key.startswith(dtype) and 1024 <= int(key.split()[1]) <= 8192
            }
            cells.append(f"{max(all_sizes.values()):.2f}")
        print(
            f"| largest fwht / copy, {dtype}, d = 1024 to 8192 | "
            f"{' | '.join(cells)} |"
        )
    print(f"\n{time.monotonic() - start:.0f} s")
    return any(one["wrong"] for one in found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--backend", choices=BACKENDS, help="its kernels alone")
    arguments = parser.parse_args()
    return (kernels if arguments.backend else everything)(arguments)


if __name__ == "__main__":
    sys.exit(main())
