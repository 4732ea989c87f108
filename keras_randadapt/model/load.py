"""`load_adapter`: reads an adapter file into a model."""

import os

import keras

from keras_randadapt.adapters import configs
from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model import file_checks
from keras_randadapt.model import paths
from keras_randadapt.model import report
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import transaction


def load_adapter(
    model: keras.Model,
    filepath: str | bytes | os.PathLike,
    name: str | None = None,
    *,
    preset: str | None = None,
) -> report.Report:
    """Loads a saved adapter into a model and attaches it if necessary.

    A file loads on every backend, and a file that was trained on a task also
    loads into its backbone. Loading is strict, and every check is made before
    anything changes. The base model must have the same layers with the same
    shapes as the model of the file, not only the same sites. In a KerasHub
    task only the backbone is compared. Layers that were kept trainable are
    compared weight by weight. Kernels may be float, int8 or int4.

    In a model without adapters, the loaded adapter is active. Beside other
    adapters it is attached inactive; see `set_active`. If the model has an
    adapter of this name, config and sites, the file replaces its weights.

    Args:
        model: A built Keras model of the architecture that the adapter was
            trained on.
        filepath: Path of the file.
        name: The adapter's name in the model. The default is its name in the
            file.
        preset: Optional string. The preset of this model. If the file has one
            too, the two must be equal.

    Returns:
        A `Report` of the adapter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, of a newer format, or
            holds tensors that its metadata does not describe; if the model is
            of another class, has other layers or lacks a site; if a shape or
            dtype differs; if a basis can't be rebuilt with the same values;
            or if another adapter has the name. The model is then unchanged.

    Example:

    ```python
    kra.load_adapter(model, "sentiment.safetensors")
    ```
    """
    path = paths.check_path(filepath)
    tensors, metadata = file_checks.read(path)
    try:
        template = configs.deserialize(metadata["adapter"])
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'{path}' describes an adapter that can't be made here: {error}"
        ) from error
    name = metadata["name"] if name is None else name
    checks.check_model(model)
    layers = state_lib.layers_of(model)
    rename, added, removed = file_checks.relocation(
        path, metadata, tensors, model, layers
    )
    template = template.relocated(rename)
    file_checks.check_base(path, metadata, model, preset)

    addresses = [rename(key) for key in file_checks.site_keys(tensors)]
    kept = [rename(key) for key in metadata["kept"]]
    sources = {
        rename(key): rename(source)
        for key, source in metadata.get("sources", {}).items()
    }
    order = {address: i for i, address in enumerate(layers)}
    by_address = {
        rename(key): tensors[key] for key in file_checks.site_keys(tensors)
    }
    file_checks.check_views(
        path, metadata, addresses, layers, template.site_kinds
    )
    file_checks.check_layers(
        path, metadata, model, addresses, kept, added, removed
    )
    addresses.sort(key=order.get)
    checks.check_attachable(model, layers, addresses, kept)
    present = state_lib.is_adapted(model) and name in model._randadapt.records
    if present:
        file_checks.check_same(
            path, model, name, template, addresses, kept, sources
        )
        built = model._randadapt.adapters(name)
    else:
        checks.check_new_name(model, name)
        try:
            built = build.build_adapters(
                template, name, layers, addresses, sources
            )
        except ValueError as error:
            raise ValueError(
                f"'{path}' describes an adapter that does not fit its sites: "
                f"{error}"
            ) from error
    file_checks.check_bases(path, metadata, built)
    values = file_checks.adapter_values(path, built, by_address)
    kept_values = file_checks.kept_values(
        path, metadata, tensors, rename, layers
    )

    # From here on, nothing in the file can cause an error.
    if present:
        with transaction.change(model) as change:
            _assign(change, built, values)
            _assign_kept(change, name, kept_values)
        return report.Report(model, name)
    attachment = attach.Attachment(
        template=template,
        name=name,
        layers=layers,
        kept=kept,
        sources=sources,
        built=built,
    )
    with attach.changing(model) as change:
        attach.attach(change, attachment)
        # The values are assigned after attaching, because some adapters then
        # get their first values from the kernel.
        _assign(change, built, values)
        _assign_kept(change, name, kept_values)
    return report.Report(model, name)


def _assign(change, built, values):
    for address, arrays in values.items():
        for weight, array in zip(built[address].stored_weights(), arrays):
            change.assign(weight, array)


def _assign_kept(change, name, kept_values):
    state = change.model._randadapt
    record = state.records[name]
    if record.kept_values is not None:
        change.set(record, "kept_values", kept_values)
        return
    for address, arrays in kept_values.items():
        for weight, array in zip(state.layers[address].weights, arrays):
            change.assign(weight, array)
