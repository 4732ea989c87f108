"""The state of an adapted model, and checks that precede a change."""

import math
import threading

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.model import between_steps
from keras_randadapt.model import compiled_functions
from keras_randadapt.model import transaction
from keras_randadapt.sites import addresses


class AdapterRecord:
    """One named adapter of a model.

    Attributes:
        template: The unbuilt `Adapter` of which its adapters are clones.
        addresses: Structural addresses of its sites, in model order.
        kept: Structural addresses of the layers that it keeps trainable,
            mostly heads.
        sources: dict from a site's address to that of the layer whose input
            its adapter gets; see `Adapter.sources`.
        kept_values: dict from address to list of arrays, the values of its
            kept layers while the adapter is inactive. `None` while it is
            active and the layers have them.
        weight: Its `sites.weighted.Weight`, or `None` if it never had another
            than 1.
        moving: dict from key to array, the values of state that its training
            moved, while it is inactive; see `moving_state`. `None` if nothing
            was moved.
    """

    def __init__(self, template, addresses, kept, sources):
        self.template = template
        self.sources = dict(sources)
        self.addresses = list(addresses)
        self.kept = list(kept)
        self.kept_values = None
        self.moving = None
        self.weight = None

    @property
    def changed(self):
        """Addresses of its sites and their source layers, each once."""
        return list(dict.fromkeys([*self.addresses, *self.sources.values()]))


class AdaptedState:
    """The state that an adapted model keeps.

    It is a plain object, because Keras's saving walks into every list, dict
    and layer that is an attribute of a model.

    Attributes:
        layers: dict from structural address to layer, of the whole model.
        records: dict from adapter name to `AdapterRecord`.
        active: tuple of the active adapters' names.
        frozen: tuple of the names of active adapters that are not trained.
        shown: tuple of the names of the adapters with which the sites compute.
            It is `active`, or empty inside a block.
        functions: `CompiledFunctions`, by `shown`.
        block: `"merged"` or `"disabled"` inside a block of that name, at whose
            end the former state is restored. `None` outside.
        layer_flags: `(layer, flag)` pairs, the `trainable` flags before
            injection.
        variable_flags: `(variable, flag)` pairs, likewise.
        base_values: dict from address to list of arrays, the kept layers'
            values in the base model, which `disabled` and `eject` restore. An
            entry is used only while an active adapter keeps the layer;
            otherwise the layer itself has the values.
        use: The function `attach.use`, which modules that `attach` imports
            call by this attribute.
        moving: dict from key to variable, the state that training may move;
            see `moving_state`.
        base_moving: dict from key to array, the base model's values of that
            state. `None` where they are the present ones, but not yet copied.
        attachments: list of functions that remove what callbacks attached to
            the model during `fit`.
        fitting: Whether `fit` is running.
        in_step: Whether a training step is running, or being traced.
        between_steps: `BetweenSteps`, which runs functions of other threads
            during `fit`.
        parts: list of the layers that it claimed: itself and those inside.
        memory_limit: The bytes of kernels that one call of `generate` or
            `predict` may form, or `None` for the default of `forming`.
    """

    def __init__(self, layers, layer_flags, variable_flags, parts, moving, use):
        self.layers = layers
        self.records = {}
        self.active = ()
        self.frozen = ()
        self.shown = ()
        self.functions = compiled_functions.CompiledFunctions()
        self.block = None
        self.layer_flags = layer_flags
        self.variable_flags = variable_flags
        self.base_values = {}
        self.use = use
        self.moving = moving
        self.base_moving = None
        self.attachments = []
        self.fitting = False
        self.in_step = False
        self.between_steps = between_steps.BetweenSteps()
        self.parts = parts
        self.memory_limit = None

    @property
    def trained(self):
        """The names of the active adapters that are trained."""
        return tuple(name for name in self.active if name not in self.frozen)

    @property
    def site_addresses(self):
        """Addresses of all sites, in the model's order."""
        used = set()
        for record in self.records.values():
            used.update(record.addresses)
        return [address for address in self.layers if address in used]

    @property
    def site_layers(self):
        return [self.layers[address] for address in self.site_addresses]

    def trainable_by_site(self):
        """dict from address to the active adapters' trainable weights.

        Sites without such weights are left out. Some methods share weights
        between sites; these belong to the first of them.
        """
        sites = {}
        seen = set()
        for address in self.site_addresses:
            for adapter in self.layers[address].adapter.active():
                for variable in adapter.trainable_variables:
                    if id(variable) not in seen:
                        seen.add(id(variable))
                        sites.setdefault(address, []).append(variable)
        return sites

    @property
    def penalized_weights(self):
        """The weights whose penalties count inside a block.

        They are those of the adapters that the block computes with, or what
        was trainable before injection where it computes with none.
        """
        if self.shown:
            layers = [
                layer
                for name in self.shown
                for layer in (
                    *self.adapters(name).values(),
                    *(self.layers[a] for a in self.records[name].kept),
                )
            ]
            return [
                weight
                for layer in layers
                for weight in _compat.trainable_by_nature(layer)
            ]
        flags = {id(variable): flag for variable, flag in self.variable_flags}
        return [
            variable
            for layer, flag in self.layer_flags
            if flag
            for variable in _compat.owned_variables(layer)
            if flags.get(id(variable))
        ]

    @property
    def changed_layers(self):
        """The sites and their source layers."""
        changed = {
            a for record in self.records.values() for a in record.changed
        }
        return [self.layers[a] for a in self.layers if a in changed]

    def forget_relayed(self):
        """Drops inputs that source layers relayed and no site has taken."""
        for record in self.records.values():
            for address in record.sources:
                self.layers[address].adapter.forget()

    def step_counters(self):
        """The active adapters' step counters, each once."""
        counters = {}
        for name in self.active:
            for adapter in self.adapters(name).values():
                for layer in _compat.flatten_layers(adapter):
                    counter = getattr(layer, "step_counter", None)
                    if counter is not None:
                        counters[id(counter)] = counter
        return list(counters.values())

    def adapters(self, name):
        """dict from address to built adapter, of one named adapter."""
        return {
            address: self.layers[address].adapter.get(name)
            for address in self.records[name].addresses
        }


def check_is_model(model):
    """Raises `TypeError` unless `model` is a Keras model.

    Every public function calls this first, so it also takes back a change that
    was interrupted.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    transaction.recover(model)


def is_adapted(model) -> bool:
    """Whether adapters are attached to this model itself."""
    return getattr(type(model), "_own_class", None) is not None


def state_of(model):
    """The `AdaptedState` of an adapted model; other models raise an error."""
    check_is_model(model)
    if not is_adapted(model):
        raise ValueError(
            f"Model '{model.name}' has no adapter attached. Call "
            "`keras_randadapt.inject(model, adapter)` first, on this model "
            "itself rather than on a part of it."
        )
    check_has_values(model)
    return model._randadapt


def check_has_values(model):
    """Raises `RuntimeError` if an interrupted step left no values.

    Keras's trainer for JAX removes the values from a model's variables before
    a step and puts them back after it.
    """
    if not _compat.has_values(model):
        _check_thread(model)
        # Inside `fit`, Keras puts them back on demand.
        _compat.sync_jax_state(model)
    if not _compat.has_values(model):
        raise RuntimeError(
            f"The variables of model '{model.name}' have no values. In JAX "
            "Keras loses them when `fit`, `evaluate` or `predict` fails "
            "in its first step, for example on data of a wrong shape. Build "
            "the model again."
        )


def _check_thread(model):
    """Raises `RuntimeError` in another thread than the one in `fit`."""
    if not is_adapted(model):
        return
    thread = model._randadapt.between_steps.thread
    if thread not in (None, threading.get_ident()):
        raise RuntimeError(
            f"Model '{model.name}' is being trained by another thread, and in "
            "JAX its variables have no values meanwhile. `save_adapter` waits "
            "for the end of a batch; do everything else in a callback, or "
            "after `fit`."
        )


def check_no_block(model):
    """Raises `ValueError` inside a `merged` or `disabled` block."""
    if is_adapted(model) and model._randadapt.block is not None:
        raise ValueError(
            f"Model '{model.name}' is inside a `{model._randadapt.block}` "
            "block, whose end puts things back as they were. Do this after "
            "the block."
        )


def check_not_fitting(model):
    """Raises `ValueError` while `fit` is running, which is in callbacks."""
    if is_adapted(model) and model._randadapt.fitting:
        raise ValueError(
            f"Model '{model.name}' is being trained, and `fit` can't go on "
            "with other adapters. Attach, load, switch, merge and remove "
            "adapters before or after `fit`; callbacks may use the blocks "
            "`keras_randadapt.merged` and `keras_randadapt.disabled`."
        )


def layers_of(model):
    """dict from structural address to layer, of all of a model's layers."""
    if is_adapted(model):
        return model._randadapt.layers
    return addresses.layers_by_address(model)


def kept_layer_values(layer):
    """Copies of all weights at and below a layer."""
    return [
        np.array(keras.ops.convert_to_numpy(weight)) for weight in layer.weights
    ]


def assign_kept_layer_values(layer, values):
    for weight, value in zip(layer.weights, values, strict=True):
        weight.assign(value)


def stored_bytes(variable):
    """The bytes of a variable's value."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return math.prod(variable.shape) * bytes_of(dtype)


def bytes_of(dtype):
    """The bytes of one number of a dtype of Keras."""
    # NumPy alone does not know the name.
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
