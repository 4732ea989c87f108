"""What holds for an adapter on every layer of a backbone that takes one."""

import warnings

import keras
import numpy as np

import keras_randadapt as kra
from keras_randadapt.sites import linear
from tests import zoo
from tests.backbones import row as row_lib


def takes_kernels(layer):
    """As `targets`: every layer with a kernel, tables included."""
    return not linear.is_normalization(layer)


def inject(model, targets, **arguments):
    """Injects a LoRA, whatever else has a kernel that no adapter reaches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kra.AdapterWarning)
        return kra.inject(model, kra.LoRA(1, seed=1), targets, **arguments)


def train(model, x):
    """One step of `fit` whose loss has every float output."""
    # SAM has an output without a batch.
    y = keras.tree.map_structure(
        lambda part: zoo.normal(row_lib.BATCH, *part.shape[1:], seed=5),
        model(x, training=False),
    )
    model.compile(keras.optimizers.Adam(0.01), loss="mse", jit_compile=False)
    model.fit(x, y, batch_size=row_lib.BATCH, epochs=1, verbose=0)


def changed(before, variables):
    """The paths of the variables whose values are no longer those of before.

    States of random generators do not count, as they move with every draw.
    """
    return [
        v.path
        for v in variables
        if not v.path.endswith("seed_generator_state")
        and not np.array_equal(
            before[id(v)][1],
            keras.ops.convert_to_numpy(v),
            equal_nan=True,
        )
    ]


def close(y, expected):
    scale = max(1.0, float(np.max(np.abs(expected))))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * scale)


def unmoved(model, before):
    """The addresses of sites none of whose adapter's weights has changed."""
    return [
        address
        for address, adapter in model._randadapt.adapters("default").items()
        if not changed(before, adapter.trainable_variables)
    ]


def check(row, tmp_path):
    """All invariants of one backbone.

    Args:
        row: A `Row`.
        tmp_path: `pathlib.Path` of an empty folder.
    """
    model = row_lib.built(row)
    x = row_lib.inputs_of(model, row)
    base_y = zoo.outputs(model, x)
    assert np.all(np.isfinite(base_y))
    base = zoo.snapshot(model)
    base_variables, cls = list(model.variables), type(model)

    inject(model, takes_kernels, exclude=row.exclude)
    close(zoo.outputs(model, x), base_y)
    # From zeros, one of LoRA's factors has no gradient.
    zoo.randomize(model, scale=0.05)
    before = zoo.snapshot(model)
    train(model, x)
    assert changed(base, base_variables) == []
    assert sorted(unmoved(model, before)) == sorted(row.unmoved)

    y = zoo.outputs(model, x)
    difference = np.max(np.abs(y - base_y))
    assert difference > 1e-3 * np.max(np.abs(base_y))
    with kra.disabled(model):
        close(zoo.outputs(model, x), base_y)
    with kra.merged(model):
        close(zoo.outputs(model, x), y)
    assert changed(base, base_variables) == []

    adapter_file = tmp_path / "adapter.safetensors"
    kra.save_adapter(model, adapter_file)
    fresh = row_lib.built(row)
    kra.load_adapter(fresh, adapter_file)
    close(zoo.outputs(fresh, x), y)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close(zoo.outputs(loaded, x), y)

    kra.eject(model)
    assert type(model) is cls
    assert [id(v) for v in model.variables] == [id(v) for v in base_variables]
    assert changed(base, base_variables) == []
    close(zoo.outputs(model, x), base_y)
