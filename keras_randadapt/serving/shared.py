"""`Shared`: what all tenants of a bank have in common."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import file_format
from keras_randadapt.model import load
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch
from keras_randadapt.serving import computation
from keras_randadapt.serving import layout as layout_lib
from keras_randadapt.serving import low_rank
from keras_randadapt.serving import table as table_lib
from keras_randadapt.serving import tenants
from keras_randadapt.serving.head import TenantHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """The adapter of a bank's first tenant, attached to the bank's model.

    Attributes:
        first: The `File` of the first tenant.
        template: Its template.
        built: dict from address to built adapter.
        layers: dict from address to layer.
        kept: Addresses of the heads.
        last: The address of the head that may have fewer classes, or `None`.
        layout: The `Layout` of rows.
    """

    first: tenants.File
    template: Any
    built: dict[str, Any]
    layers: dict[str, keras.layers.Layer]
    kept: list[str]
    last: str | None
    layout: layout_lib.Layout

    def row(self, file):
        """The weights of another tenant, after all checks.

        Args:
            file: Its `File`.

        Returns:
            Its row, and the number of its classes or `None`.

        Raises:
            ValueError: If it can't share the bank.
        """
        if low_rank.is_plain(self.template):
            file = low_rank.of_rank(file, self.template.rank)
        if self.last in self.kept:
            file.fill_up(self.last, self.layers[self.last])
        tenants.check_alike(self.first, file)
        tenants.check_base(file, self.first)
        return self.own_row(file), file.classes

    def units_of_last(self):
        """The classes of the head that may have fewer, or `None`."""
        if self.last not in self.kept:
            return None
        return self.layers[self.last].units

    def check_can_be_smaller(self, path, classes):
        """Raises `ValueError` if no head can have so few classes."""
        tenants.check_can_be_smaller(
            path, self.last, self.layers[self.last], classes
        )

    def fill_up(self, row, classes):
        """Gives absent classes the lowest logit of this model's dtype.

        Args:
            row: A row, which is changed.
            classes: int or `None`.
        """
        if classes is None or classes == self.units_of_last():
            return
        key = self.last, layout_lib.HEADS
        (part,) = [
            part
            for part in self.layout.parts
            if part.key == key and part.weight == "bias"
        ]
        layer = self.layers[self.last]
        row[part.start + classes : part.stop] = tenants.lowest(layer)

    def own_row(self, file):
        """The row of a file that was checked."""
        return self.layout.row(
            tenants.values(file, self.built, self.layers, self.kept)
        )


def attached(model, file, capacity, check=None):
    """Attaches the adapter of the first file, and heads.

    Args:
        model: A model without adapters.
        file: The `File` of the first tenant.
        capacity: int, the number of tenants that there must be room for.
        check: Optional function of the `Shared` that raises an error if it is
            not what was expected.

    Returns:
        A `Shared`, and an empty `Table`.

    Raises:
        ValueError: If the file does not fit. The model is then unchanged.
    """
    layers = state_lib.layers_of(model)
    last = tenants.last_dense(model, file.metadata["kept"], layers)
    if last is not None:
        file.fill_up(last, layers[last])
    loading = load.checked(
        model,
        file.path,
        layout_lib.ADAPTER,
        content=(file.tensors, file.metadata),
    )
    attachment = loading.attachment
    kept, built = attachment.kept, attachment.built
    keys = [*file_format.site_keys(file.tensors), *file.metadata["kept"]]
    if any(loading.rename(key) != key for key in keys):
        raise ValueError(
            f"'{file.path}' is of a part of this model or of a larger one. "
            "Make the bank of the model that the adapter was trained on."
        )
    tenants.check_method(
        file.path, attachment.template, layers, list(built), kept
    )
    heads = build.build_adapters(
        TenantHead(), layout_lib.HEADS, layers, kept, {}
    )
    values = tenants.values(file, built, layers, kept)
    shared = Shared(
        first=file,
        template=attachment.template,
        built=built,
        layers=layers,
        kept=kept,
        last=last,
        layout=layout_lib.Layout(
            [(key, name, np.shape(v)) for (key, name), v in values.items()]
        ),
    )
    if check is not None:
        check(shared)
    # Files of version 1 do not tell their base weights.
    told = file_format.BASE_KEY in file.tensors
    with attach.changing(model) as change:
        attach.attach(change, _attachment(attachment, built))
        loading.check_base_weights("error" if told else "warn")
        if heads:
            attach.attach(change, _attachment(attachment, heads, TenantHead()))
            names = (layout_lib.ADAPTER, layout_lib.HEADS)
            attach.activate(change, names, train=())
            attach.refresh(change)
        for address in [*built, *heads]:
            change.set(layers[address].adapter, "per_example", True)
        base = _base_row(shared, change)
        # The memory may not suffice.
        table = table_lib.Table(capacity, base)
    try:
        # A model can be called when its change has ended.
        computation.check_batches(model, shared.layout, base)
    except BaseException:
        switch.eject(model)
        raise
    return shared, table


def _base_row(shared, change):
    """The row with which the model computes as the base model does."""
    base = {}
    for address, adapter in shared.built.items():
        values = _without_effect(adapter)
        for weight in adapter.stored_weights():
            key = (address, layout_lib.ADAPTER), weight.name
            base[key] = values[weight.name]
            # The model itself computes as the base model does, too.
            change.assign(weight, values[weight.name])
    for address in shared.kept:
        layer = shared.layers[address]
        key = address, layout_lib.HEADS
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        base[key, "kernel"] = layer.to_view(kernel)
        if layer.bias is not None:
            base[key, "bias"] = keras.ops.convert_to_numpy(layer.bias)
    return shared.layout.row(base)


def _without_effect(adapter):
    """Weights with which an adapter that was just built changes nothing."""
    first = {
        weight.name: keras.ops.convert_to_numpy(weight)
        for weight in adapter.stored_weights()
    }
    zeros = {name: np.zeros_like(value) for name, value in first.items()}
    # An initializer may have given it an update from the start.
    for values in (first, zeros):
        if _changes_nothing(adapter, values):
            return values
    raise ValueError(
        f"The adapter at '{adapter.site.address}' changes the base model both "
        "as it was built and with weights of zeros, so no row of a bank can "
        "stand for the base model."
    )


def _changes_nothing(adapter, values):
    if getattr(adapter, "delta_per_example", None) is None:
        return True
    x = np.random.default_rng(0).normal(size=(1, 1, adapter.input_dim))
    weights = {
        name: keras.ops.convert_to_tensor(value[None].astype("float32"))
        for name, value in values.items()
    }
    y = adapter.delta_per_example(
        keras.ops.convert_to_tensor(x.astype("float32")), weights
    )
    return not np.any(keras.ops.convert_to_numpy(y))


def _attachment(like, built, template=None):
    """An `Attachment` of the bank, which keeps no layer trainable."""
    heads = template is not None
    return attach.Attachment(
        template=template if heads else like.template,
        name=layout_lib.HEADS if heads else layout_lib.ADAPTER,
        layers=like.layers,
        kept=[],
        sources={},
        built=built,
        frozen=True,
    )
