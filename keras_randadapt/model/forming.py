"""Forms the adapted kernels once a call of `generate` or `predict`.

The adapters of a site cost something in every step, beside the base product. A
call whose steps all compute with the same weights can fold the adapters into
the kernels before its first step, and then each step is one of the base model.
Nothing of the model changes: the kernels are tensors of the call, so another
thread may use the model meanwhile.
"""

import contextlib
import functools
import math
import threading

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import transaction
from keras_randadapt.sites import formed
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.linear import is_linear

#: The part of the base's bytes that a call may take by default.
_PART = 4


class _Call:
    """A call of `predict`.

    Attributes:
        model: The model.
        addresses: tuple of the sites whose kernels are formed.
        kernels: dict from address to kernel, once the call has formed them.
    """

    def __init__(self, model, addresses):
        self.model = model
        self.addresses = addresses
        self.kernels = None


class _Local(threading.local):
    def __init__(self):
        self.call = None


_local = _Local()


def methods_of(base):
    """The methods of an adapted class that form kernels before their steps.

    Args:
        base: The model's own class.

    Returns:
        dict from name to function.
    """
    found = {
        "predict": _predict_of(base),
        "predict_step": _predict_step_of(base),
    }
    if callable(getattr(base, "generate_step", None)):
        found["generate_step"] = _generate_step_of(base)
    return found


def _generate_step_of(base):
    @functools.wraps(base.generate_step)
    def generate_step(self, *args, **kwargs):
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
        found = kernels(self, sites_to_form(self, _tokens(inputs)))
        with formed.shown(_by_site(self, found)):
            return base.generate_step(self, *args, **kwargs)

    return generate_step


def _predict_of(base):
    @functools.wraps(base.predict)
    def predict(self, *args, **kwargs):
        x = kwargs["x"] if "x" in kwargs else [*args, None][0]
        with _predicting(self, _inputs(x)):
            return base.predict(self, *args, **kwargs)

    return predict


@contextlib.contextmanager
def _predicting(model, inputs):
    """The block of a call of `predict`, which forms kernels at most once.

    TensorFlow's compiled function reads variables alone, and a kernel in a
    variable would stay there between calls. It forms nothing.

    Args:
        model: An adapted model.
        inputs: See `sites_to_form`.
    """
    transaction.recover(model)
    backend = keras.config.backend()
    if backend not in ("jax", "torch"):
        yield
        return
    addresses = sites_to_form(model, inputs, whole=True)
    if backend == "torch":
        import torch

        with torch.no_grad():
            found = kernels(model, addresses)
        with formed.shown(_by_site(model, found)):
            yield
        return
    before = _local.call
    try:
        _local.call = _Call(model, addresses)
        yield
    finally:
        _local.call = before


def wrap_predict_function(model):
    """Lets a new predict function of JAX get formed kernels as arguments.

    Keras hands the state of a batch on to the next one, and its second part
    has whatever `predict_step` returns there.
    """
    function = model.predict_function
    if keras.config.backend() != "jax" or hasattr(function, "forms"):
        return function
    # With a distribution, Keras says how each part of the state is laid out.
    if keras.distribution.distribution() is not None:
        return function
    import jax

    trainable = model.trainable_variables
    others = model.non_trainable_variables

    def form(addresses, trainable_values, other_values):
        pairs = [
            *zip(trainable, trainable_values, strict=True),
            *zip(others, other_values, strict=True),
        ]
        with keras.StatelessScope(state_mapping=pairs):
            return kernels(model, addresses)

    form = jax.jit(form, static_argnums=0)

    def step(state, iterator):
        call = _local.call
        if call is None or call.model is not model or not call.addresses:
            return function(state, iterator)
        if call.kernels is None:
            call.kernels = form(call.addresses, *state)
        packed = {"variables": state[1], "kernels": call.kernels}
        y, (first, packed) = function((state[0], packed), iterator)
        call.kernels = packed["kernels"]
        return y, (first, packed["variables"])

    step.forms = True
    model.predict_function = step
    return step


def _predict_step_of(base):
    @functools.wraps(base.predict_step)
    def predict_step(self, *args, **kwargs):
        packed = args[0][1] if keras.config.backend() == "jax" else None
        if not isinstance(packed, dict):
            return base.predict_step(self, *args, **kwargs)
        (trainable, _), *rest = args
        state = trainable, packed["variables"]
        with formed.shown(_by_site(self, packed["kernels"])):
            y, variables = base.predict_step(self, state, *rest, **kwargs)
        return y, {**packed, "variables": variables}

    return predict_step


def kernels(model, addresses):
    """The adapted kernels of sites, by address."""
    found = {}
    for address in addresses:
        site = model._randadapt.layers[address]
        kernel = site.from_view(
            site._merged_kernel_view(_compat.kernel_of(site))
        )
        found[address] = ops.cast(kernel, site.compute_dtype)
    return found


def _by_site(model, found):
    layers = model._randadapt.layers
    return {id(layers[address]): one for address, one in found.items()}


def _tokens(inputs):
    """The number of tokens of a batch of `generate`, or `None` if unknown."""
    ids = inputs.get("token_ids") if isinstance(inputs, dict) else None
    return _product(getattr(ids, "shape", None))


def _inputs(x):
    """The number of rows that `predict` multiplies, or `None` if unknown."""
    first = (keras.tree.flatten(x) or [None])[0]
    shape = getattr(first, "shape", None)
    if shape is None or len(shape) == 0:
        return None
    # The last axis of floats has the features, and ids have no such axis.
    is_ids = "int" in str(getattr(first, "dtype", ""))
    return _product(shape if is_ids else shape[:-1])


def _product(shape):
    if shape is None or not all(isinstance(n, int) for n in shape):
        return None
    return math.prod(shape)


def sites_to_form(model, inputs=None, whole=False):
    """The sites whose kernels fit into the memory limit and pay.

    Sites of methods whose factors are not cheap come first. Quantized kernels
    and those that compute in 16 bits are left out: the one would no longer be
    small, and in the other a small update would be rounded away.

    Args:
        model: An adapted model.
        inputs: The number of rows that each site will multiply in the call, or
            `None`, which means many.
        whole: Whether a step multiplies many rows at once. Then a formed update
            must take less multiply-adds than the rows do with thin factors. A
            step of few rows waits for memory instead.

    Returns:
        tuple of addresses.
    """
    state = model._randadapt
    templates = [state.records[name].template for name in state.shown]
    if not all(template.mergeable for template in templates):
        return ()
    costly, cheap = [], []
    for address, site in zip(state.site_addresses, state.site_layers):
        here = [
            state.records[name].template
            for name in state.shown
            if address in state.records[name].addresses
        ]
        if not _can_form(site) or not any(t.adapts_kernel for t in here):
            continue
        if inputs is not None and inputs < _needed(site, state.shown, whole):
            continue
        is_cheap = all(template.factors_are_cheap for template in here)
        (cheap if is_cheap else costly).append(address)
    left = memory_limit(state)
    found = []
    for address in costly + cheap:
        site = state.layers[address]
        size = math.prod(site.kernel_view) * state_lib.bytes_of(
            site.compute_dtype
        )
        if size <= left:
            found.append(address)
            left -= size
    return tuple(found)


def _needed(site, names, whole):
    """The number of rows from which a formed kernel pays at a site."""
    adapters = [site.adapter.get(name) for name in names]
    # An adapter may tell the rows that cost as much as its `delta_kernel`.
    needed = max(getattr(one, "inputs_to_form", 0) for one in adapters)
    if whole:
        rows, columns = site.kernel_view
        needed = max(needed, rows * columns // (rows + columns))
    return needed


def memory_limit(state):
    """The bytes that the kernels of one call may take."""
    if state.memory_limit is not None:
        return state.memory_limit
    total = sum(
        state_lib.stored_bytes(variable)
        for layer, _ in state.layer_flags
        for variable in _compat.owned_variables(layer)
    )
    return total // _PART


def _can_form(site):
    return (
        isinstance(site, AdaptedLayer)
        and is_linear(site)
        and site.quantization_mode is None
        and site.compute_dtype in ("float32", "float64")
        and not site.adapter.per_example
    )
