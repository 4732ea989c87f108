"""One process tests one backend: `KERAS_BACKEND` picks it.

`pytest` alone runs every test that is asked for. `tests/run_backends.py` runs
the backends and tells each process, with `--rotate`, to leave out the tests
that another one runs (`tests/rotation.py`).
"""

import gc
import importlib.util
import os

# Before TensorFlow is imported by anything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

from tests import cpu_guard
from tests import rotation

BACKEND = keras.config.backend()
#: What a developer sets wins over what a test is marked with.
_OPTIMIZATIONS_ARE_SET = "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ


def pytest_addoption(parser):
    cpu_guard.pytest_addoption(parser)
    parser.addoption(
        "--rotate",
        metavar="BACKENDS",
        help="run tests that need one backend on one of these, split by commas",
    )
    parser.addoption(
        "--rotation-day",
        type=int,
        default=0,
        metavar="DAY",
        help="the day moves every test with one backend to the next",
    )
    parser.addoption(
        "--every-backend",
        action="store_true",
        help="run every test on every backend, whatever `--rotate` says",
    )
    parser.addoption(
        "--optimized",
        action="store_true",
        help="let JAX optimize what it compiles in all tests",
    )


def pytest_configure(config):
    cpu_guard.pytest_configure(config)
    for line in (
        "slow(reason): takes longer than some seconds; run by `make test-full`",
        "one_backend(choice=None): needs no more than one backend of a run, "
        "the named one or one picked by a number or by the test's name",
        "every_backend: runs on all, in a module or class marked `one_backend`",
        "needs_optimizer: looks at what a compiler has made, so JAX optimizes "
        "its programs",
    ):
        config.addinivalue_line("markers", line)
    for line in (
        # The category is the package's own, as the module that a warning is
        # said to come from is the caller's. A test that expects one uses
        # `pytest.warns`.
        "error::keras_randadapt.AdapterWarning",
        # Keras's conversions of tensors, thousands of times a run.
        "ignore:__array__ implementation doesn't accept a copy keyword"
        ":DeprecationWarning:keras.src.backend",
    ):
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config, items):
    option = config.option
    config.elsewhere = 0
    if not option.rotate or option.every_backend:
        return
    backends = option.rotate.split(",")
    kept, others = [], []
    for item in items:
        mark = item.get_closest_marker("one_backend")
        name = item.nodeid.partition("[")[0]
        alone = mark is not None or rotation.NEEDS_ONE.search(name)
        if item.get_closest_marker("every_backend"):
            alone = False
        here = not alone or BACKEND == rotation.backend_of(
            mark.args[0] if mark and mark.args else None,
            name,
            backends,
            option.rotation_day,
        )
        (kept if here else others).append(item)
    if others:
        items[:] = kept
        config.hook.pytest_deselected(items=others)
        config.elsewhere = len(others)


def pytest_report_collectionfinish(config):
    option = config.option
    if not option.rotate:
        return None
    if option.every_backend:
        return f"every test runs on each of {option.rotate}"
    return (
        f"{config.elsewhere} tests that need one backend are left to another "
        f"one of {option.rotate} (day {option.rotation_day}; "
        "`--every-backend` runs them here)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    # KerasHub takes seconds to import, which the first test that builds one of
    # its models would pay for. A run of a few tests may need none of it.
    if session.config.option.rotate and importlib.util.find_spec("keras_hub"):
        importlib.import_module("keras_hub")
    # Keras collects garbage whenever an attribute of a layer is deleted, as
    # quantization does for every layer. It need not look at what the imports
    # have made, which takes a third of a second each time.
    gc.collect()
    gc.freeze()
    cpu_guard.pytest_runtestloop(session)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if BACKEND != "jax" or _OPTIMIZATIONS_ARE_SET:
        return
    import jax

    # A quarter of the suite's time on JAX is optimization of programs that
    # run once. JAX reads this whenever it compiles, and a test's processes do
    # when they start.
    quick = (
        not item.config.option.optimized
        and item.get_closest_marker("needs_optimizer") is None
    )
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick)
