"""`Report`: a printed summary of an attached adapter."""

import math
import weakref
from collections.abc import Mapping
from types import MappingProxyType

import keras

from keras_randadapt import _compat
from keras_randadapt.model import file_format
from keras_randadapt.model import state as state_lib
from keras_randadapt.sites import quantized


class Report:
    """The sites and the numbers of weights of one adapter. `print` it.

    Attributes:
        name: The adapter's name.
        method: The name of its class.
        sites: list of the sites' structural addresses.
        adapter_parameters: The number of the adapter's trainable weights.
        head_parameters: The number of trainable weights of the layers that
            `keep_trainable` named.
        base_parameters: The number of the model's other weights, all frozen.
            Quantized kernels count as the float kernels that they stand for,
            so a model has one number of base parameters in every precision.
        keras_base_parameters: The number of these weights in Keras's
            `count_params`. It differs in a quantized model: two numbers of a
            packed int4 kernel count once, and scales count too.
        base_bytes: The bytes of these other weights as they are stored, packed
            kernels, scales and all.
        adapter_bytes: The bytes of the adapter's and the heads' weights in
            memory.
        file_bytes: The size of the file that `save_adapter` writes, with
            heads.
        left_out: dict from the structural addresses of layers with kernels
            that `targets` means too, but that have no adapter, to the numbers
            of weights in these kernels. `inject` alone fills it.
    """

    def __init__(
        self,
        model: keras.Model,
        name: str,
        left_out: Mapping[str, int] = MappingProxyType({}),
    ):
        state = model._randadapt
        record = state.records[name]
        adapters = state.adapters(name).values()
        self.name = name
        self.method = type(record.template).__name__
        self.sites = list(record.addresses)
        self.adapter_parameters = sum(
            _size(weight)
            for adapter in adapters
            for weight in _compat.trainable_by_nature(adapter)
        )
        # An inactive adapter's head is frozen, but its weights count.
        heads = [
            weight
            for address in record.kept
            for weight in _compat.trainable_by_nature(state.layers[address])
        ]
        self.head_parameters = sum(_size(weight) for weight in heads)
        kept = {id(weight) for weight in heads}
        layers = [layer for layer, _ in state.layer_flags]
        float_sizes = {}
        for layer in layers:
            float_sizes.update(quantized.float_sizes(layer))
        base = [
            variable
            for layer in layers
            for variable in _unique(_compat.owned_variables(layer), kept)
        ]
        self.keras_base_parameters = sum(_size(variable) for variable in base)
        self.base_parameters = sum(
            float_sizes.get(id(variable), _size(variable)) for variable in base
        )
        self.base_bytes = sum(map(state_lib.stored_bytes, base))
        self.adapter_bytes = sum(map(state_lib.stored_bytes, heads)) + sum(
            state_lib.stored_bytes(weight)
            for adapter in adapters
            for part in _compat.flatten_layers(adapter)
            for weight in _unique(_compat.owned_variables(part), kept)
        )
        self._model = weakref.ref(model)
        self.file_bytes = file_format.size(model, name)
        self.left_out = dict(left_out)

    def __str__(self):
        total = (
            self.base_parameters
            + self.head_parameters
            + self.adapter_parameters
        )
        trained = self.adapter_parameters + self.head_parameters
        rows = [
            ("sites", f"{len(self.sites):,}"),
            ("adapter parameters", f"{self.adapter_parameters:,}"),
            ("head parameters", f"{self.head_parameters:,}"),
            ("frozen base parameters", f"{self.base_parameters:,}"),
            *self._rows_of_quantized(),
            ("trained", f"{100 * trained / max(total, 1):.4f} %"),
            ("adapter file", _bytes(self.file_bytes)),
        ]
        if self.left_out:
            rows += [
                ("layers left out", f"{len(self.left_out):,}"),
                ("parameters left out", f"{sum(self.left_out.values()):,}"),
            ]
        lines = [f"{self.method} '{self.name}'"]
        lines += [f"  {label:<24}{value:>16}" for label, value in rows]
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def optimizer_bytes(self) -> int | None:
        """The bytes of the optimizer's state, once `fit` has made it."""
        model = self._model()
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            return None
        return sum(map(state_lib.stored_bytes, optimizer.variables))

    def _rows_of_quantized(self):
        if self.keras_base_parameters == self.base_parameters:
            return
        yield "  as Keras counts", f"{self.keras_base_parameters:,}"
        yield "base as stored", _bytes(self.base_bytes)
        yield "adapter and heads", _bytes(self.adapter_bytes)
        if self.optimizer_bytes is not None:
            yield "optimizer", _bytes(self.optimizer_bytes)


def _size(variable):
    return math.prod(variable.shape)


def _unique(variables, without):
    for variable in variables:
        if id(variable) not in without:
            without.add(id(variable))
            yield variable


def _bytes(n):
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"
