"""Keras's private API for layers, models and saving."""

import contextlib
import functools

import keras
from keras.src.backend import set_keras_mask
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.saving import object_registration
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.saving_lib import _walk_saveable
from keras.src.saving.saving_lib import get_attr_skipset
from keras.src.utils import naming
from keras.src.utils.tracking import no_automatic_dependency_tracking

from keras_randadapt._compat import plain_kernels

__all__ = [
    "alias_registered_class",
    "attach_sublayer",
    "call_context",
    "calls_in_graph",
    "causal_padding",
    "detach_sublayer",
    "flatten_layers",
    "instance_attributes",
    "is_in_call",
    "is_nnx_enabled",
    "is_saveable",
    "KeepsTrainingFlag",
    "kernel_of",
    "layer_trainable_flag",
    "may_rematerialize",
    "name_scope",
    "no_automatic_dependency_tracking",
    "open_name_scope",
    "owned_variables",
    "refresh_torch_parameters",
    "restore_sublayer",
    "set_keras_mask",
    "set_layer_trainable_flag",
    "snake_case",
    "sublayers",
    "trainable_by_nature",
    "training_phase",
    "unpickle_model",
    "unrounded",
    "walk_attributes",
]


def flatten_layers(layer):
    """`layer` and all layers below it, each once, `layer` first."""
    return layer._flatten_layers()


def owned_variables(layer):
    """The variables that `layer` itself created, without its sublayers'."""
    return layer._trainable_variables + layer._non_trainable_variables


def trainable_by_nature(layer):
    """The weights at and below `layer` that are trainable unless frozen.

    Unlike `trainable_weights`, it includes the weights of frozen layers.
    """
    return [
        variable
        for part in flatten_layers(layer)
        for variable in part._trainable_variables
    ]


def set_layer_trainable_flag(layer, value):
    """Sets one layer's flag without touching its variables or sublayers."""
    layer._trainable = value


def open_name_scope(layer):
    """The scope in which Keras names the variables of a layer it builds."""
    return _entered(layer._open_name_scope())


def name_scope(name, parent):
    """Keras's `name_scope` below another path.

    Keras's own stays open if an exception is raised on the way out of its
    block, and all later variables have it in their paths.

    Args:
        name: The scope's name.
        parent: The path that it is below.
    """
    return _entered(keras.name_scope(name, override_parent=parent))


@contextlib.contextmanager
def _entered(scope):
    before = list(_name_scopes())
    try:
        try:
            scope.__enter__()
            yield
        finally:
            _leave_name_scope(scope, before)
    finally:
        # Leaving may have been interrupted.
        _leave_name_scope(scope, before)


def _leave_name_scope(scope, before):
    if any(one is scope for one in _name_scopes()):
        scope.__exit__(None, None, None)
    _name_scopes()[:] = before


def _name_scopes():
    return global_state.get_global_attribute(
        "name_scope_stack", default=[], set_to_default=True
    )


def attach_sublayer(layer, name, sublayer):
    """Makes `sublayer` a tracked attribute of a layer already built.

    Keras locks a built layer against new state. The layer is unlocked for this
    assignment.
    """
    layer._tracker.unlock()
    try:
        setattr(layer, name, sublayer)
    finally:
        layer._tracker.lock()


def detach_sublayer(layer, name):
    """Undoes `attach_sublayer`."""
    sublayer = getattr(layer, name)
    delattr(layer, name)
    layer._tracker.untrack(sublayer)


def sublayers(layer):
    """A copy of the list of a layer's tracked sublayers, in their order."""
    return list(layer._layers)


def restore_sublayer(layer, name, sublayer, order):
    """Restores an attribute that `attach` or `detach_sublayer` changed.

    Either function may have been interrupted at any point.

    Args:
        layer: A built layer.
        name: The attribute's name.
        sublayer: Its former value, or `None` if there was none.
        order: The former result of `sublayers(layer)`.
    """
    current = getattr(layer, name, None)
    if current is not sublayer:
        if current is not None:
            detach_sublayer(layer, name)
        if sublayer is not None:
            attach_sublayer(layer, name, sublayer)
    layer._layers[:] = order
    layer._tracker.stored_ids["layers"] = {id(one) for one in order}
    layer._tracker.lock()


def layer_trainable_flag(layer):
    """A layer's own flag, regardless of its variables and sublayers."""
    return layer._trainable


def calls_in_graph(layer):
    """The number of direct calls of a layer in functional models."""
    return len(layer._inbound_nodes)


def training_phase(layer):
    """The `training` flag of the call in progress.

    Convolutions and embeddings have no `training` argument, so Keras does not
    pass it to them, but the call context has it.
    """
    return bool(layer._get_call_context().get_value("training"))


def is_in_call():
    """Whether a layer is being called, or traced, at the moment."""
    return global_state.get_global_attribute("current_call_ctx") is not None


@contextlib.contextmanager
def call_context(layer, training):
    """Opens the context of a layer's call, where no call is in progress.

    On JAX, Keras's training calls `call` and not the layer itself. The layers
    below would then find no context and no `training` flag.

    Args:
        layer: The layer whose `call` is about to run.
        training: bool. The flag of the call.
    """
    try:
        layer._get_call_context().set_value("training", training)
        yield
    finally:
        layer._maybe_reset_call_context()


class KeepsTrainingFlag:
    """A mixin for classes of layers that branch on `training`.

    On JAX, Keras's rematerialization turns every keyword argument into a
    traced tensor, on which no branch is possible.
    """

    def rematerialized_call(self, layer_call, *args, **kwargs):
        if "training" not in kwargs:
            return super().rematerialized_call(layer_call, *args, **kwargs)
        training = kwargs["training"]

        @functools.wraps(layer_call)
        def call(*args, **kwargs):
            return layer_call(*args, **{**kwargs, "training": training})

        return super().rematerialized_call(call, *args, **kwargs)


def may_rematerialize(layer):
    """Whether `keras.RematScope` may run a layer's `call` twice."""
    mode = layer._remat_mode
    if mode is None:
        return False
    if mode.mode == "list_of_layers":
        return layer.name in mode.layer_names
    return mode.mode in ("full", "larger_than")


def walk_attributes(saveable):
    """`(attribute name, value)` pairs in the order of Keras's weight files."""
    # Keras caches the set of its own attributes under another name than it
    # reads, so it would make a layer to compute them in every call.
    kind = saveable._obj_type()
    key = f"saving_attr_skiplist_{kind}"
    if global_state.get_global_attribute(key) is None:
        global_state.set_global_attribute(key, get_attr_skipset(kind))
    return _walk_saveable(saveable)


def is_saveable(value):
    return isinstance(value, KerasSaveable)


def snake_case(name):
    """A class name in the spelling of weight files, as `"einsum_dense"`."""
    return naming.to_snake_case(name)


def unpickle_model(buffer):
    """The model of the bytes to which Keras pickles a model."""
    return keras.Model._unpickle_model(buffer)


def alias_registered_class(cls, name):
    """Serializes instances of `cls` under a registered name.

    Keras finds registered names by the exact class, and injection makes a new
    class for every class of model.
    """
    object_registration.GLOBAL_CUSTOM_NAMES[cls] = name


def refresh_torch_parameters(model):
    """Makes every layer list its current parameters, on torch.

    A layer lists its parameters once, when it is built. `zero_grad()` skips
    parameters that are not listed, so their gradients would accumulate.
    """
    if keras.config.backend() != "torch":
        return
    for layer in flatten_layers(model):
        # `hasattr` is used, and not `_modules`, because functional models keep
        # the list elsewhere and list no parameter until they track them again.
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def kernel_of(layer):
    """The variable behind a layer's public kernel, such as `kernel`.

    Returns:
        A variable, or `None` for a layer that has neither.
    """
    if isinstance(layer, keras.layers.Embedding):
        return layer._embeddings
    kernel = getattr(layer, "_kernel", None)
    if kernel is None:
        # GPTQ and AWQ replace the kernel by one of another name.
        kernel = getattr(layer, "quantized_kernel", None)
    if kernel is None:
        kernel = vars(layer).get(plain_kernels.plain_kernel_name(layer))
    return kernel


def unrounded(value):
    """A variable's value in its own dtype, also where Keras casts it.

    Inside the `call` of a layer that computes in 16 bits, Keras casts every
    variable on the way to a tensor, and a later cast to float32 does not bring
    the lost bits back.

    Args:
        value: A variable, or a tensor, which is returned as it is.
    """
    if not isinstance(value, keras.Variable):
        return value
    with AutocastScope(None):
        # `convert_to_tensor` returns the variable itself on TensorFlow.
        return value.value


def causal_padding(layer):
    """The widths by which a causal convolution pads its inputs."""
    return layer._compute_causal_padding()


def is_nnx_enabled():
    """Whether Keras runs on Flax's NNX, whose modules refuse class swaps."""
    is_enabled = getattr(keras.config, "is_nnx_enabled", None)
    return bool(is_enabled and is_enabled())


@contextlib.contextmanager
def instance_attributes(layer, **values):
    """Sets attributes during a block, without Keras tracking them.

    Keras's quantized products add the bias and apply the activation. A site
    sets both to `None` meanwhile, because its delta comes before them.
    """
    before = {name: vars(layer)[name] for name in values if name in vars(layer)}
    try:
        vars(layer).update(values)
        yield
    finally:
        for name in values:
            if name in before:
                vars(layer)[name] = before[name]
            else:
                vars(layer).pop(name, None)
