"""`AdaptedModel`: the class of an adapted model.

Like a site, the model stays the same object and gets a subclass of its own
class. Configs and whole-model files therefore contain the adapters.
"""

import contextlib
import functools
import io
import json
import os

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.adapters import configs
from keras_randadapt.model import forming
from keras_randadapt.model import moving_state
from keras_randadapt.model import save as save_lib
from keras_randadapt.model import training as training_lib
from keras_randadapt.model import transaction
from keras_randadapt.model import weights_file
from keras_randadapt.model.state import assign_kept_layer_values
from keras_randadapt.model.state import check_no_block
from keras_randadapt.model.state import kept_layer_values
from keras_randadapt.sites import layer as layer_lib

#: The one name under which adapted models of every class are saved; see
#: `whole_model`.
REGISTERED_NAME = "keras_randadapt>AdaptedModel"

_ASSET = "randadapt_kept.npz"


class AdaptedModel(_compat.KeepsTrainingFlag):
    """A mixin for an adapted model's own class; see `adapted_class`."""

    _own_class = None

    def __new__(cls, *args, **kwargs):
        # `keras.models.clone_model` calls the class of the model that it
        # clones. The clone has no adapters.
        return cls._own_class(*args, **kwargs)

    @property
    def trainable(self):
        return self._own_class.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        self._own_class.trainable.fset(self, value)
        if value and "_randadapt" in vars(self):
            # `model.trainable = True` must not thaw the base model.
            training_lib.release(self)
            training_lib.apply_trainable(self)

    @property
    def losses(self):
        state = self._randadapt
        if state.block is None:
            return super().losses
        # An adapter that is off has no penalty, nor has one that is folded
        # into the kernels.
        weights = state.penalized_weights
        with _compat.instance_attributes(self, _penalized_weights=weights):
            return super().losses

    @property
    def trainable_weights(self):
        weights = vars(self).get("_penalized_weights")
        return super().trainable_weights if weights is None else weights

    def train_step(self, *args, **kwargs):
        state = self._randadapt
        try:
            state.in_step = True
            return super().train_step(*args, **kwargs)
        finally:
            state.in_step = False

    def make_train_function(self, force=False):
        transaction.recover(self)
        # The end of a block discards what was trained in it, and momentum
        # would move weights that the block does not use.
        check_no_block(self)
        before = self.train_function
        with _compat.fresh_step(self, "train_step"):
            super().make_train_function(force)
        if keras.config.backend() == "jax":
            function = self.train_function
            if function is not before:
                self.train_function = self._randadapt.between_steps.around(
                    self, function
                )

    def make_test_function(self, force=False):
        transaction.recover(self)
        self._forget_functions_if(force)
        with _compat.fresh_step(self, "test_step"):
            return super().make_test_function(force)

    def make_predict_function(self, force=False):
        transaction.recover(self)
        self._forget_functions_if(force)
        super().make_predict_function(force)
        return forming.wrap_predict_function(self)

    def _forget_functions_if(self, force):
        # A forced rebuild invalidates the functions of every combination of
        # adapters.
        if force:
            self._randadapt.functions.clear()

    def compile(self, *args, **kwargs):
        transaction.recover(self)
        # The functions are cleared first, since `compile` may fail half-way.
        self._randadapt.functions.clear()
        super().compile(*args, **kwargs)
        training_lib.wrap_optimizer(self)

    def compile_from_config(self, config):
        # Keras does not compile models from a config if their class overrides
        # `compile`, as this one does. The model therefore has its own class
        # during the call.
        self._randadapt.functions.clear()
        adapted = type(self)
        self.__class__ = adapted._own_class
        try:
            self.compile_from_config(config)
        finally:
            self.__class__ = adapted
        optimizer = getattr(self, "optimizer", None)
        training_lib.wrap_optimizer(self)
        wrapped = getattr(self, "optimizer", None)
        if wrapped is not optimizer and optimizer.built:
            # The file's optimizer state is loaded into these variables.
            wrapped.build(self.trainable_variables)

    def save(self, filepath, *args, **kwargs):
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "Keras's legacy HDF5 files can't hold adapters: save to a "
                "'.keras' file, or `merge` first. "
                f"Received: filepath={filepath}"
            )
        return self._own_class.save(self, filepath, *args, **kwargs)

    def save_weights(self, *args, **kwargs):
        transaction.recover(self)
        return super().save_weights(*args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        transaction.recover(self)
        state = self._randadapt
        found = weights_file.has_adapters(filepath)
        plain = found is False
        usage = None
        if found and not kwargs.get("skip_mismatch"):
            if weights_file.check(filepath, state):
                usage = weights_file.usage(filepath, self)
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
            # The file is of the base model and has its heads. Active adapters
            # that keep these heads get the values as well.
            for address in state.base_values:
                layer = state.layers[address]
                state.base_values[address] = kept_layer_values(layer)
            state.base_moving = None
            return
        if usage is not None:
            weights_file.use(self, *usage)
        # The file's heads belong to an inactive adapter.
        for address, values in base.items():
            layer = state.layers[address]
            keeping = [r for r in state.records.values() if address in r.kept]
            if len(keeping) == 1:
                keeping[0].kept_values[address] = kept_layer_values(layer)
            assign_kept_layer_values(layer, values)

    def get_config(self):
        transaction.recover(self)
        state = self._randadapt
        if state.block == "merged":
            # The kernels hold the deltas already, and a model rebuilt from the
            # config would add them again.
            raise ValueError(
                f"Model '{self.name}' is inside a `merged` block, in which it "
                "has no config: a model made from it would add the adapters' "
                "updates again. To save the merged model as a whole, save a "
                "merged copy: `keras_randadapt.merge(copy.deepcopy(model))"
                ".save(...)`, outside of the block. `save_weights` and "
                "`export` work inside of it."
            )
        with plain_classes(self):
            base = keras.saving.serialize_keras_object(self)
        # The adapted model's own compilation is stored beside this config.
        base.pop("compile_config", None)
        return {
            "base": base,
            "adapters": [
                {
                    "name": name,
                    "adapter": configs.serialize(record.template),
                    "sites": record.addresses,
                    "kept": record.kept,
                    "sources": record.sources,
                }
                for name, record in state.records.items()
            ],
            "active": list(state.active),
            **_usage(state),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        # `whole_model` imports this module, so its class is found by name.
        saved = keras.saving.get_registered_object(REGISTERED_NAME)
        return saved.from_config(config, custom_objects)

    def __reduce__(self):
        # Keras refers to a method of the class, but pickle can't find a class
        # that was made at run time.
        _, arguments = super().__reduce__()
        return _compat.unpickle_model, arguments

    def get_build_config(self):
        # The base model is rebuilt from its own config before the adapters are
        # attached.
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
        for owner, key, tensor in _moved_values(state):
            key = json.dumps([owner, key, None])
            arrays[key] = tensor.astype(_portable_dtype(tensor))
        if arrays:
            # Keys may not be file names, so the archive numbers the arrays.
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
                owner, address, index = json.loads(str(key))
                if index is None:
                    _set_moved(state, owner, address, archive[f"a{i}"])
                    continue
                if owner:
                    values = state.records[owner].kept_values
                else:
                    values = state.base_values
                values[address][index] = archive[f"a{i}"]

    def save_to_preset(self, preset_dir, *args, **kwargs):
        """Saves the preset without adapters, and a file for each adapter.

        Layers that the active adapters keep trainable are saved with their
        current values.
        """
        with plain_classes(self):
            self.save_to_preset(preset_dir, *args, **kwargs)
        for name in self._randadapt.records:
            save_lib.save_adapter(
                self,
                os.path.join(preset_dir, f"{name}.adapter.safetensors"),
                name=name,
            )


def _usage(state):
    """The entries of a config that say how the adapters are used.

    They are there only where they say something, so configs without them are
    as earlier versions wrote them.
    """
    weights = {
        name: record.weight.value
        for name, record in state.records.items()
        if record.weight is not None
    }
    usage = {}
    if weights:
        usage["weights"] = weights
    if state.frozen:
        usage["frozen"] = list(state.frozen)
    return usage


def _moved_values(state):
    """What the weights do not hold of the state that training moves.

    Yields:
        `(owner, key, array)`. The owner is the name of an inactive adapter, or
        `""` for the base model.
    """
    if not state.moving:
        return
    for key, value in moving_state.base_values(state).items():
        yield "", key, value
    for name, record in state.records.items():
        if name not in state.active:
            for key, value in (record.moving or {}).items():
                yield name, key, value


def _set_moved(state, owner, key, value):
    if owner:
        record = state.records[owner]
        record.moving = {**(record.moving or {}), key: value}
    else:
        state.base_moving = {**(state.base_moving or {}), key: value}


def _portable_dtype(array):
    # NumPy has no bfloat16, so `np.load` would return raw bytes.
    return "float32" if array.dtype.name == "bfloat16" else array.dtype


def adapted_class(base):
    """The class of an adapted model whose own class is `base`."""
    return _adapted_class(base)


@functools.lru_cache(maxsize=None)
def _adapted_class(base):
    cls = type(
        base.__name__,
        (AdaptedModel, base),
        {
            # In a process that has not imported the library, Keras's error
            # names this module.
            "__module__": "keras_randadapt",
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_own_class": base,
            "call": _counting_call(base),
            "fit": _releasing_fit(base),
            **forming.methods_of(base),
        },
    )
    _compat.alias_registered_class(cls, REGISTERED_NAME)
    return cls


def _counting_call(base):
    """A class's `call`, which also counts training steps for adapters."""

    @functools.wraps(base.call)
    def call(self, *args, **kwargs):
        transaction.recover(self)
        # On JAX, `fit` calls `call` directly, outside of a call context.
        training = kwargs.get("training")
        if training is None:
            training = _compat.training_phase(self)
        if training:
            for counter in self._randadapt.step_counters():
                counter.assign_add(1)
        # An interrupted call, or a call of a part of the model, may have left
        # relayed inputs.
        self._randadapt.forget_relayed()
        if _compat.is_in_call():
            return base.call(self, *args, **kwargs)
        with _compat.call_context(self, bool(training)):
            return base.call(self, *args, **kwargs)

    return call


def _releasing_fit(base):
    """A class's `fit`, which removes what callbacks attached to the model.

    Callbacks can't do that: they are not called when `fit` is interrupted, and
    a callback does not know whether it is the last.
    """

    @functools.wraps(base.fit)
    def fit(self, *args, **kwargs):
        transaction.recover(self)
        check_no_block(self)
        state = self._randadapt
        try:
            state.fitting = True
            state.between_steps.begin()
            return base.fit(self, *args, **kwargs)
        finally:
            state.fitting = False
            training_lib.release(self)
            state.between_steps.end()

    return fit


@contextlib.contextmanager
def plain_classes(model):
    """Makes Keras's saving see the model without adapters, during a block.

    The model and its sites have their own classes, and all layers have their
    former `trainable` flags, which configs contain.
    """
    adapted = type(model)
    state = model._randadapt
    flags = [(layer, layer.trainable) for layer, _ in state.layer_flags]
    with layer_lib.as_base_class(*state.layers.values()):
        model.__class__ = adapted._own_class
        for layer, flag in state.layer_flags:
            _compat.set_layer_trainable_flag(layer, flag)
        try:
            yield
        finally:
            for layer, flag in flags:
                _compat.set_layer_trainable_flag(layer, flag)
            model.__class__ = adapted
