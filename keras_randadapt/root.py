"""The outermost model of an injection: what it remembers, how it is saved.

The model keeps its identity and gets a subclass of its own class, as sites
do, so that configs and whole-model files carry the adapters.
"""

import contextlib
import functools
import io
import json
import os

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt import compiled
from keras_randadapt import site_classes
from keras_randadapt import targets
from keras_randadapt.adapters import base as adapter_base

_ASSET = "randadapt_kept.npz"


class AdapterRecord:
    """One named adapter of a model.

    Attributes:
        template: The unbuilt `Adapter` it was made from.
        addresses: Structural addresses of its sites, in model order.
        kept: Structural addresses of its trainable layers, heads mostly.
        sources: dict from a site's address to that of the layer whose input
            its adapter gets; see `Adapter.sources`.
        kept_values: While the adapter is inactive, the values that its kept
            layers will have once it is active again: address to list of
            arrays. `None` while they are live in the model.
    """

    def __init__(self, template, addresses, kept, sources):
        self.template = template
        self.sources = dict(sources)
        self.addresses = list(addresses)
        self.kept = list(kept)
        self.kept_values = None

    @property
    def changed(self):
        """Addresses of the layers that it changes, each once.

        Its sites, and the layers that hand their input to one.
        """
        return list(dict.fromkeys([*self.addresses, *self.sources.values()]))


class RootState:
    """What an adapted model remembers.

    A plain object on purpose: Keras's saving walks into every list, dict and
    layer that it finds on a model.

    Attributes:
        layers: dict from structural address to layer, of the whole model.
        records: dict from adapter name to `AdapterRecord`.
        active: tuple of the active adapters' names.
        shown: tuple of the names of the adapters that the sites compute with:
            none inside a block.
        functions: `CompiledFunctions`, by `shown`.
        block: `"merged"` or `"disabled"` inside a block of that name, whose
            end restores what was at its beginning.
        layer_flags: `(layer, flag)` pairs: `trainable` as it was before
            injection.
        variable_flags: `(variable, flag)` pairs, likewise.
        base_values: address to list of arrays: kept layers' values in the
            base model, which `disabled` and `eject` restore. Of the moment
            only while an active adapter keeps the layer; it has them itself
            otherwise.
        attachments: list of functions that take off what callbacks attached
            to the model for the length of a `fit`.
        fitting: Whether `fit` is running.
        parts: list of the models that it claimed: this one and those inside.
    """

    def __init__(self, layers, layer_flags, variable_flags, parts):
        self.layers = layers
        self.records = {}
        self.active = ()
        self.shown = ()
        self.functions = compiled.CompiledFunctions()
        self.block = None
        self.layer_flags = layer_flags
        self.variable_flags = variable_flags
        self.base_values = {}
        self.attachments = []
        self.fitting = False
        self.parts = parts

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

    @property
    def changed_layers(self):
        """The sites, and layers that hand their input to one."""
        changed = {
            a for record in self.records.values() for a in record.changed
        }
        return [self.layers[a] for a in self.layers if a in changed]

    def forget_relayed(self):
        """Drops inputs that layers handed to others that never took them."""
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
    """Raises `TypeError` unless `model` is a Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )


def is_adapted(model) -> bool:
    """Whether adapters are attached to this model itself."""
    return "_randadapt" in vars(model)


def state_of(model):
    """The `RootState` of an adapted model; an error for any other."""
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
    """Raises `RuntimeError` if a step that broke off left no values.

    Keras's trainer for JAX takes the values out of a model's variables before
    a step and puts them back after it.
    """
    if not _compat.has_values(model):
        # Inside `fit` they are put back on demand.
        _compat.sync_jax_state(model)
    if not _compat.has_values(model):
        raise RuntimeError(
            f"The variables of model '{model.name}' have no values. In JAX "
            "Keras loses them when `fit`, `evaluate` or `predict` fails "
            "in its first step, on data of a wrong shape for one. Build the "
            "model anew."
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
    """Raises `ValueError` while `fit` is running, in a callback that is."""
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
    return targets.layers_by_address(model)


def apply_trainable(model):
    """Freezes all of a model but its active adapters and their kept layers."""
    # What callbacks attached was for the weights that were trained so far.
    release(model)
    state = model._randadapt
    for layer in _compat.flatten_layers(model):
        if layer is model:
            for variable in _compat.owned_variables(layer):
                variable.trainable = False
        elif _compat.owned_variables(layer):
            # The layer and not only its variables: a frozen
            # BatchNormalization must also stop moving its statistics.
            layer.trainable = False
    for name in state.active:
        record = state.records[name]
        for adapter in state.adapters(name).values():
            adapter.trainable = True
        for address in record.kept:
            state.layers[address].trainable = True


def release(model):
    """Takes off what callbacks attached to the model."""
    if is_adapted(model):
        for detach in list(model._randadapt.attachments):
            detach()


def kept_layer_values(layer):
    """Copies of all weights at and below a layer."""
    return [
        np.array(keras.ops.convert_to_numpy(weight)) for weight in layer.weights
    ]


def assign_kept_layer_values(layer, values):
    for weight, value in zip(layer.weights, values, strict=True):
        weight.assign(value)


def wrap_optimizer(model):
    """Wraps a compiled model's optimizer as its active adapters ask for it."""
    from keras_randadapt.optimizers import wrapper

    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    wraps = []
    if is_adapted(model):
        state = model._randadapt
        if state.block == "disabled":
            # The end of the block needs the optimizer as it was.
            return
        for name in state.active:
            template = state.records[name].template
            wraps.append(functools.partial(template.wrap_optimizer, name=name))
    wrapped = wrapper.attach(optimizer, wraps)
    if wrapped is not optimizer:
        model.optimizer = wrapped


class AdaptedRoot(_compat.KeepsTrainingFlag):
    """Mixed into the outermost model's own class; see `root_class`."""

    _root_base = None

    def __new__(cls, *args, **kwargs):
        # `keras.models.clone_model` calls the class of the model it clones:
        # what it gets is a model without adapters.
        return cls._root_base(*args, **kwargs)

    @property
    def trainable(self):
        return self._root_base.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        self._root_base.trainable.fset(self, value)
        if value and "_randadapt" in vars(self):
            # `model.trainable = True` must not thaw the base model.
            apply_trainable(self)

    def make_train_function(self, force=False):
        # Of a block nothing that is trained remains, and what is not used in
        # it moves all the same by what the optimizer remembers.
        check_no_block(self)
        with _compat.fresh_step(self, "train_step"):
            return super().make_train_function(force)

    def make_test_function(self, force=False):
        self._forget_functions_if(force)
        with _compat.fresh_step(self, "test_step"):
            return super().make_test_function(force)

    def make_predict_function(self, force=False):
        self._forget_functions_if(force)
        return super().make_predict_function(force)

    def _forget_functions_if(self, force):
        # What makes one function obsolete does so whatever is active.
        if force:
            self._randadapt.functions.clear()

    def compile(self, *args, **kwargs):
        # Even if it fails half-way.
        self._randadapt.functions.clear()
        super().compile(*args, **kwargs)
        wrap_optimizer(self)

    def compile_from_config(self, config):
        # Keras compiles no class from a config that has a `compile` of its
        # own, as ours: for the call, the model is of its own class.
        self._randadapt.functions.clear()
        adapted = type(self)
        self.__class__ = adapted._root_base
        try:
            self.compile_from_config(config)
        finally:
            self.__class__ = adapted
        optimizer = getattr(self, "optimizer", None)
        wrap_optimizer(self)
        wrapped = getattr(self, "optimizer", None)
        if wrapped is not optimizer and optimizer.built:
            # What a file holds of the optimizer needs variables to go to.
            wrapped.build(self.trainable_variables)

    def save(self, filepath, *args, **kwargs):
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "Keras's legacy HDF5 files can't hold adapters: save to a "
                "'.keras' file, or `merge` first. "
                f"Received: filepath={filepath}"
            )
        return self._root_base.save(self, filepath, *args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        from keras_randadapt.saving import weights_file

        state = self._randadapt
        plain = weights_file.has_adapters(filepath) is False
        held = {
            address
            for name in state.active
            for address in state.records[name].kept
        }
        base = {
            address: kept_layer_values(state.layers[address])
            for address in state.base_values.keys() - held
        }
        super().load_weights(filepath, *args, **kwargs)
        if plain:
            # It is of the base model, and so are the heads in it, which
            # adapters that keep them get as well.
            for address in state.base_values:
                layer = state.layers[address]
                state.base_values[address] = kept_layer_values(layer)
            return
        # Heads in it are an adapter's, and none that keeps these is active.
        for address, values in base.items():
            layer = state.layers[address]
            keeping = [r for r in state.records.values() if address in r.kept]
            if len(keeping) == 1:
                keeping[0].kept_values[address] = kept_layer_values(layer)
            assign_kept_layer_values(layer, values)

    def get_config(self):
        state = self._randadapt
        if state.block == "merged":
            # The kernels hold the deltas, and the config would add them.
            check_no_block(self)
        with plain_classes(self):
            base = keras.saving.serialize_keras_object(self)
        # The adapted model's own compilation is stored beside this config.
        base.pop("compile_config", None)
        return {
            "base": base,
            "adapters": [
                {
                    "name": name,
                    "adapter": adapter_base.serialize(record.template),
                    "sites": record.addresses,
                    "kept": record.kept,
                    "sources": record.sources,
                }
                for name, record in state.records.items()
            ],
            "active": list(state.active),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        from keras_randadapt import injection

        model = keras.saving.deserialize_keras_object(
            config["base"], custom_objects=custom_objects
        )
        for entry in config["adapters"]:
            injection.attach_from_config(model, entry)
        injection.set_active(model, config["active"])
        return model

    def __reduce__(self):
        # Keras names the class's own method, and pickle can't find a class
        # that was made on the fly.
        _, arguments = super().__reduce__()
        return _compat.unpickle_model, arguments

    def get_build_config(self):
        # The base's config rebuilds it before the adapters are attached.
        return None

    def build_from_config(self, config):
        return

    def save_assets(self, dir_path):
        base_save = getattr(super(), "save_assets", None)
        if base_save is not None:
            base_save(dir_path)
        arrays = {}
        state = self._randadapt
        owners = {"": state.base_values}
        for name, record in state.records.items():
            owners[name] = record.kept_values or {}
        for owner, values in owners.items():
            for address, tensors in values.items():
                for i, tensor in enumerate(tensors):
                    key = json.dumps([owner, address, i])
                    arrays[key] = tensor.astype(_portable_dtype(tensor))
        if arrays:
            # Keys are no file names, so one archive of numbered arrays.
            buffer = io.BytesIO()
            np.savez(
                buffer,
                keys=np.array(list(arrays)),
                **{f"a{i}": a for i, a in enumerate(arrays.values())},
            )
            with open(os.path.join(dir_path, _ASSET), "wb") as file:
                file.write(buffer.getvalue())

    def load_assets(self, dir_path):
        base_load = getattr(super(), "load_assets", None)
        if base_load is not None:
            base_load(dir_path)
        path = os.path.join(dir_path, _ASSET)
        if not os.path.exists(path):
            return
        state = self._randadapt
        with np.load(path, allow_pickle=False) as archive:
            for i, key in enumerate(archive["keys"]):
                owner, address, _ = json.loads(str(key))
                if owner:
                    values = state.records[owner].kept_values
                else:
                    values = state.base_values
                _, _, index = json.loads(str(key))
                values[address][index] = archive[f"a{i}"]

    def save_to_preset(self, preset_dir, *args, **kwargs):
        """Saves the preset without adapters, and a file of each beside it.

        Layers that the active adapters keep trainable are saved as they are.
        """
        from keras_randadapt import saving

        with plain_classes(self):
            self.save_to_preset(preset_dir, *args, **kwargs)
        for name in self._randadapt.records:
            saving.save_adapter(
                self,
                os.path.join(preset_dir, f"{name}.adapter.safetensors"),
                name=name,
            )


def _portable_dtype(array):
    # bfloat16 is no NumPy dtype: `np.load` gives raw bytes back.
    return "float32" if array.dtype.name == "bfloat16" else array.dtype


@keras.saving.register_keras_serializable(
    package="keras_randadapt", name="AdaptedModel"
)
class AdaptedModel(AdaptedRoot):
    """The one name under which adapted models of every class are saved."""


def root_class(base):
    """The class of an adapted model whose own class is `base`."""
    return _root_class(base)


@functools.lru_cache(maxsize=None)
def _root_class(base):
    cls = type(
        base.__name__,
        (AdaptedRoot, base),
        {
            # Keras names this module when it can't find the class, in a
            # process that has not imported the library.
            "__module__": "keras_randadapt",
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_root_base": base,
            "call": _counting_call(base),
            "fit": _releasing_fit(base),
        },
    )
    _compat.alias_registered_class(cls, AdaptedModel)
    return cls


def _counting_call(base):
    """A class's `call`, which tells the adapters of training steps."""

    @functools.wraps(base.call)
    def call(self, *args, **kwargs):
        # On JAX, `fit` calls `call` itself, in no call context.
        training = kwargs.get("training")
        if training is None:
            training = _compat.training_phase(self)
        if training:
            for counter in self._randadapt.step_counters():
                counter.assign_add(1)
        # A call that broke off, or one of a part of the model, may have left
        # something behind.
        self._randadapt.forget_relayed()
        return base.call(self, *args, **kwargs)

    return call


def _releasing_fit(base):
    """A class's `fit`, after which nothing is attached to the model.

    Callbacks can't see to that: they hear nothing of a `fit` that breaks off,
    and none knows whether it is the last to be told of the end.
    """

    @functools.wraps(base.fit)
    def fit(self, *args, **kwargs):
        check_no_block(self)
        state = self._randadapt
        state.fitting = True
        try:
            return base.fit(self, *args, **kwargs)
        finally:
            state.fitting = False
            release(self)

    return fit


@contextlib.contextmanager
def plain_classes(model):
    """For a block, the model is the un-adapted one for Keras's saving.

    It and its sites have their own classes back, and all layers the
    `trainable` flags that they had, which configs state.
    """
    adapted = type(model)
    state = model._randadapt
    flags = [(layer, layer.trainable) for layer, _ in state.layer_flags]
    with site_classes.as_base_class(*state.changed_layers):
        model.__class__ = adapted._root_base
        for layer, flag in state.layer_flags:
            _compat.set_layer_trainable_flag(layer, flag)
        try:
            yield
        finally:
            for layer, flag in flags:
                _compat.set_layer_trainable_flag(layer, flag)
            model.__class__ = adapted
