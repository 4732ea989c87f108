"""`save_adapter`: writes an adapter file."""

import functools
import os
import warnings

import keras
import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import configs
from keras_randadapt.model import checks
from keras_randadapt.model import file_format
from keras_randadapt.model import paths
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import tensor_data


def save_adapter(
    model: keras.Model,
    filepath: str | bytes | os.PathLike,
    name: str | None = None,
    *,
    preset: str | None = None,
) -> None:
    """Saves one adapter: its trained weights, config and seed.

    The file holds nothing that a seed rebuilds, and of the base model only the
    layers that are kept trainable and the state that training moved, such as
    running means. It identifies the base model by its class, a hash of its
    layers' addresses and shapes, and a fingerprint of each site's kernel. A
    digest tells damage. The file is written beside its
    destination and then moved there, so it is never incomplete. Another thread
    may call this function during `fit`; on JAX it then waits for the end of
    the batch.

    Args:
        model: An adapted model.
        filepath: Path of the file, by convention `*.safetensors`. A file that
            is there is replaced and keeps its mode; symbolic links are
            followed.
        name: Optional string. The adapter's name; by default the only one.
        preset: Optional string. The name of the KerasHub preset of the base
            model. Loading can then check it.

    Raises:
        TypeError: If `filepath` is no path.
        ValueError: If the model has no adapter, or several and no `name`, or
            if `filepath` is empty, has the ending of another format or leads
            to what is no regular file.
        FileNotFoundError: If there is no folder for the file.
        OSError: If the file can't be written.

    Example:

    ```python
    kra.save_adapter(model, "sentiment.safetensors")
    ```
    """
    state_lib.check_is_model(model)
    if not state_lib.is_adapted(model):
        # It raises the error for models without adapters.
        state_lib.state_of(model)
    target = paths.check_writable(paths.check_path(filepath))
    data = model._randadapt.between_steps.run(
        functools.partial(file_of, model, name, preset)
    )
    paths.replace(target, data)


def file_of(model, name, preset=None):
    """The bytes of an adapter file."""
    state = state_lib.state_of(model)
    if state.block == "merged":
        # The kernels hold the deltas, so they have another fingerprint.
        state_lib.check_no_block(model)
    name = checks.one_name(state, name)
    _warn_of_others(model, state)
    tensors = file_format.site_tensors(state, name)
    tensors.update(file_format.kept_tensors(state, name))
    tensors.update(file_format.moved_tensors(state, name))
    _warn_of_not_finite(name, tensors)
    tensors[file_format.BASE_KEY] = file_format.base_tensor(state, name)
    record = state.records[name]
    digest_of = functools.partial(
        file_format.layers_digest, model, record.addresses, record.kept
    )
    metadata = file_format.describe(model, name, preset, digest_of)
    metadata["digest"] = file_format.digest(tensors, metadata)
    return tensor_data.data_of(
        tensors, {file_format.METADATA_KEY: configs.canonical(metadata)}
    )


def _warn_of_not_finite(name, tensors):
    """Warns of NaN and infinity, which `load_adapter` refuses."""
    wrong = [
        key for key, array in tensors.items() if not np.all(np.isfinite(array))
    ]
    if wrong:
        warnings.warn(
            f"The adapter '{name}' has NaN or infinity in {len(wrong)} of its "
            f"{len(tensors)} tensors: {sorted(wrong)[:5]}. Training diverged, "
            "most likely: lower the learning rate. `load_adapter` refuses the "
            "file unless it is given `allow_non_finite=True`.",
            AdapterWarning,
            stacklevel=5,
        )


def _warn_of_others(model, state):
    """Warns of trained weights that belong to no adapter."""
    ours = set()
    for name, record in state.records.items():
        layers = [*state.adapters(name).values()]
        # In a block, the trained adapters are those that were active before.
        if name in state.active or state.block:
            layers += [state.layers[address] for address in record.kept]
        ours.update(id(weight) for layer in layers for weight in layer.weights)
    others = [w.path for w in model.trainable_weights if id(w) not in ours]
    if others:
        warnings.warn(
            f"{len(others)} weights are trainable that are no adapter's, so no "
            f"adapter file holds them: {others[:5]}. Name their layers in "
            "`keep_trainable` at injection instead of unfreezing them.",
            AdapterWarning,
            stacklevel=5,
        )
