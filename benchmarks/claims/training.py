"""What the experiments share: adapters from arguments, and short training."""

import pathlib
import tempfile

import keras
import numpy as np

import keras_randadapt as kra

#: No run has more test examples than are predicted at once.
PREDICTED_AT_ONCE = 4096


def keep_compiled_programs():
    """Keeps JAX's compiled programs in a folder for later runs.

    A run of a second would otherwise be compiled for as long again, because
    every run injects an adapter of its own.
    """
    if keras.config.backend() != "jax":
        return
    import jax

    folder = pathlib.Path(tempfile.gettempdir(), "keras_randadapt-xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def adapter_of(arguments, seed):
    """The template that the arguments of a run name.

    Args:
        arguments: dict with `"adapter"`, the name of a class, and optionally
            `"options"`, a dict of what its `__init__` takes.
        seed: int.

    Returns:
        An adapter template.
    """
    options = arguments.get("options", {})
    return getattr(kra, arguments["adapter"])(seed=seed, **options)


def logits(model, x):
    """Predictions in float64, whatever the number of examples."""
    return np.asarray(
        model.predict(x, batch_size=PREDICTED_AT_ONCE, verbose=0), "float64"
    )


def accuracy(outputs, labels):
    """The share of examples whose largest output is at the label."""
    return float(np.mean(np.argmax(outputs, axis=-1) == labels))


def classification_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
