"""`load_adapter`: reads an adapter file into a model."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_randadapt.adapters import configs
from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model import distribution
from keras_randadapt.model import file_checks
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import moving_state
from keras_randadapt.model import paths
from keras_randadapt.model import report
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import transaction
from keras_randadapt.model import weighting


def load_adapter(
    model: keras.Model,
    filepath: str | bytes | os.PathLike,
    name: str | None = None,
    *,
    preset: str | None = None,
    check_base: str | None = None,
    allow_non_finite: bool = False,
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

        check_base: What to do if the kernels of the sites are not those that
            the adapter was trained on, or if the file does not tell. It is
            `"error"`, `"warn"`, `"ignore"` or `None`, which is `"error"` for
            methods that compute their update from the base kernels (PiSSA,
            OLoRA, DoRA, HiRA, Hydra, SHiRA by magnitude) and `"warn"` for the
            others. A file of an earlier version, which does not tell, is then
            a warning for all.
            Copies of the same weights in 16, 8 or 4 bits count as the same.
        allow_non_finite: Whether to load a file with NaN or infinity.

    Returns:
        A `Report` of the adapter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, of a newer format, or
            holds tensors that its metadata does not describe, NaN or infinity;
            if the base weights are others and matter; if the model is
            of another class, has other layers or lacks a site; if a shape or
            dtype differs; if a basis can't be rebuilt with the same values;
            or if another adapter has the name. The model is then unchanged.

    Example:

    ```python
    kra.load_adapter(model, "sentiment.safetensors")
    ```
    """
    if check_base not in (None, "error", "warn", "ignore"):
        raise ValueError(
            '`check_base` must be "error", "warn", "ignore" or `None`. '
            f"Received: check_base={check_base!r}"
        )
    loading = checked(
        model, paths.check_path(filepath), name, preset, allow_non_finite
    )
    # The warning is for the caller of this function.
    check = functools.partial(loading.check_base_weights, check_base)
    if loading.present:
        check()
        with _changing(loading) as change:
            loading.assign(change)
    else:
        with attach.changing(model) as change:
            attach.attach(change, loading.attachment)
            # Quantized kernels can be read now that their layers are sites. An
            # error takes back what was attached.
            check()
            # The values are assigned after attaching, because some adapters
            # then get their first values from the kernel.
            loading.assign(change)
    return report.Report(model, loading.attachment.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """A file that was checked against a model: it can be loaded.

    Attributes:
        model: The model.
        path: The file's path.
        tensors: Its tensors.
        metadata: Its metadata.
        rename: See `file_checks.relocation`.
        attachment: The `Attachment` of the adapter.
        present: Whether the model has the adapter, so that only values change.
        values: dict from address to the arrays of the adapter there.
        kept_values: dict from address to the arrays of a kept layer.
        moved: dict from key to array; see `moving_state`.
    """

    model: keras.Model
    path: str
    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]
    rename: Callable[[str], str]
    attachment: attach.Attachment
    present: bool
    values: dict[str, list[np.ndarray]]
    kept_values: dict[str, list[np.ndarray]]
    moved: dict[str, np.ndarray]

    def check_base_weights(self, wanted):
        """Compares the fingerprints; see `load_adapter`.

        Args:
            wanted: `check_base`.
        """
        if wanted is None:
            template = self.attachment.template
            told = file_format.BASE_KEY in self.tensors
            wanted = "error" if told and template.depends_on_base else "warn"
        file_checks.check_base_weights(
            self.path,
            self.metadata,
            self.tensors,
            self.attachment.layers,
            self.rename,
            wanted,
        )
        file_checks.check_chosen(
            self.path, self.metadata, self.rename, self.attachment.built
        )

    def assign(self, change):
        """Gives the attached adapter the file's values.

        Args:
            change: A `transaction.Change`.
        """
        name = self.attachment.name
        for address, arrays in self.values.items():
            adapter = self.attachment.built[address]
            for weight, array in zip(adapter.stored_weights(), arrays):
                change.assign(weight, array)
        attach.assign_kept(change, name, self.kept_values)
        _assign_moved(change, name, self.moved, self.metadata)


def checked(
    model, path, name=None, preset=None, allow_non_finite=False, content=None
):
    """Reads a file and checks that it can be loaded into a model.

    Everything is checked but the base weights. Nothing is changed.

    Args:
        model: A Keras model.
        path: string.
        name: See `load_adapter`, as all that follow.
        preset: string or `None`.
        allow_non_finite: bool.
        content: Optional pair of tensors and metadata: what the file has, if it
            was read already.

    Returns:
        A `Loading`.
    """
    tensors, metadata = content or file_reading.read(path)
    if not allow_non_finite:
        file_reading.check_finite(path, tensors)
    template = template_of(path, metadata)
    name = metadata["name"] if name is None else name
    checks.check_model(model)
    layers = state_lib.layers_of(model)
    rename, added, removed = file_checks.relocation(
        path, metadata, tensors, model, layers
    )
    template = template.relocated(rename)
    file_checks.check_base(path, metadata, model, preset)

    keys = file_format.site_keys(tensors)
    by_address = {rename(key): tensors[key] for key in keys}
    kept = [rename(key) for key in metadata["kept"]]
    file_checks.check_views(
        path, metadata, list(by_address), layers, template.site_kinds
    )
    file_checks.check_layers(
        path, metadata, model, list(by_address), kept, added, removed
    )
    addresses = [address for address in layers if address in by_address]
    checks.check_attachable(model, layers, addresses, kept)
    sources = {
        rename(key): rename(source)
        for key, source in metadata.get("sources", {}).items()
    }
    present = state_lib.is_adapted(model) and name in model._randadapt.records
    if present:
        file_checks.check_same(
            path, model, name, template, addresses, kept, sources
        )
        built = model._randadapt.adapters(name)
        moving = model._randadapt.moving
    else:
        checks.check_new_name(model, name)
        distribution.check_scope(model)
        counts = {address: t.size for address, t in by_address.items()}
        built = _built(path, template, name, layers, addresses, sources, counts)
        moving = moving_state.find(layers)
    file_checks.check_bases(path, metadata, built)
    weight = float(metadata.get("weight", 1.0))
    if weight != 1 and not template.additive:
        raise ValueError(
            f"'{path}' is damaged: its adapter can only have the weight 1."
        )
    return Loading(
        model=model,
        path=path,
        tensors=tensors,
        metadata=metadata,
        rename=rename,
        attachment=attach.Attachment(
            template=template,
            name=name,
            layers=layers,
            kept=kept,
            sources=sources,
            built=built,
            weight=weight,
            frozen=metadata.get("frozen", False),
        ),
        present=present,
        values=file_checks.adapter_values(path, built, by_address),
        kept_values=file_checks.kept_values(
            path, metadata, tensors, rename, layers
        ),
        moved=file_checks.moved_values(path, metadata, tensors, rename, moving),
    )


def template_of(path, metadata):
    """The template that a file's metadata describe."""
    try:
        return configs.deserialize(metadata["adapter"])
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'{path}' describes an adapter that can't be made here: {error}"
        ) from error


def _built(path, template, name, layers, addresses, sources, counts):
    try:
        return build.build_adapters(
            template, name, layers, addresses, sources, counts
        )
    except ValueError as error:
        raise ValueError(
            f"'{path}' describes an adapter that does not fit its sites: "
            f"{error}"
        ) from error


@contextlib.contextmanager
def _changing(loading):
    """A change that replaces the values of an attached adapter.

    An active one gets the file's weight, and is trained or frozen as there.
    """
    model, name = loading.model, loading.attachment.name
    weight = {name: loading.attachment.weight}
    frozen = loading.attachment.frozen
    state = model._randadapt
    if name not in state.active:
        weight = {}
    same = (name in state.frozen) == frozen or name not in state.active
    if same and not weighting.missing(state, weight):
        # The optimizer and the compiled functions stay.
        with transaction.change(model) as change:
            yield change
            weighting.give(change, weight)
        return
    state_lib.check_not_fitting(model)
    trained = {*state.trained, name} - ({name} if frozen else set())
    with attach.changing(model) as change:
        attach.record_common(change)
        yield change
        weighting.give(change, weight)
        attach.activate(change, state.active, train=trained)
        attach.refresh(change)


def _assign_moved(change, name, moved, metadata):
    """Gives the model, or an inactive adapter, the state of a file."""
    state = change.model._randadapt
    if not state.moving or metadata["version"] < 2:
        # The files of version 1 do not tell what training moved.
        return
    base = moving_state.base_values(state)
    if name not in state.active:
        change.set(
            state.records[name], "moving", {**base, **moved} if moved else None
        )
        return
    for key, variable in moving_state.movable(state).items():
        if key in moved or key in base:
            change.assign(variable, moved.get(key, base.get(key)))
