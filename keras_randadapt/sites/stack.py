"""The adapters of one site, by name."""

import json
import threading

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt.sites import per_example
from keras_randadapt.sites import weighted


class Relay:
    """Hands a layer's input to an adapter of a layer that is called later."""

    def __init__(self):
        # The keys are threads, since two threads may call one model at a time.
        self._tensors = {}

    def put(self, x):
        self._tensors[threading.get_ident()] = x

    def take(self):
        # The tensor is removed, since a tensor of one trace must not be used
        # in another.
        return self._tensors.pop(threading.get_ident(), None)


class AdapterStack(keras.layers.Layer):
    """The adapters of one site, by name, and which of them are active.

    It is a sublayer of the site with the name `adapter`, so that variables
    have paths `<site>/adapter/<adapter name>/<variable>`. It does not refer to
    the site.

    Attributes:
        active_names: tuple of the names of the model's active adapters.
        frozen_names: tuple of the names of active adapters that are not
            trained.
        weighted: `(name, Weight)` pairs, for the adapters that have a weight.
        per_example: Whether the site belongs to a bank; see `per_example`.
        constants: `(name, float)` pairs, which replace the weights inside a
            block in a training step.
        relays_in: `(name, Relay)` pairs, from which adapters of this site take
            another layer's input.
        relays_out: `(name, Relay)` pairs, to which this site's input is given.
    """

    def __init__(self, name="adapter"):
        super().__init__(name=name, dtype="float32")
        self.built = True
        self.active_names = ()
        self.frozen_names = ()
        self.weighted = ()
        self.constants = ()
        self.per_example = False
        self.relays_in = ()
        self.relays_out = ()

    def relay(self, x):
        """Passes the site's input on to adapters of other sites."""
        for name, relay in self.relays_out:
            if name in self.active_names:
                relay.put(x)

    def forget(self):
        """Drops tensors that were relayed to this site and not taken."""
        for _, relay in self.relays_in:
            relay.take()

    def adapt_output(self, y, x, training):
        """The site's output, changed by the adapters that adapt outputs.

        Args:
            y: Tensor `(..., output_dim)`.
            x: Tensor `(..., input_dim)`, the site's input.
            training: Whether a training step is running.
        """
        relays = dict(self.relays_in)
        for name in self.active_names:
            adapter = self.get(name)
            if adapter is None or not adapter.adapts_output:
                continue
            source = x
            if name in relays:
                source = relays[name].take()
                if source is None:
                    raise ValueError(
                        f"The adapter '{adapter.path}' needs the input of the "
                        "first layer of its feed-forward network, which was "
                        "not called before the last one."
                    )
            y = adapter.adapt_output(y, source, training)
        return y

    def train_active(self):
        """Lets the active adapters be trained that are not frozen."""
        trained = {
            id(self.get(name))
            for name in self.active_names
            if name not in self.frozen_names
        }
        for adapter in _compat.sublayers(self):
            adapter.trainable = id(adapter) in trained

    def get(self, name):
        return getattr(self, attribute(name), None)

    def check_examples(self, layer, inputs):
        """Raises `ValueError` if a batch's examples can't be told apart."""
        if self.per_example:
            per_example.check_examples(layer, inputs)

    def active(self):
        """The active adapters of this site, in order of activation.

        Adapters with a weight are shown as `Weighted`. It is a method,
        because Keras's saving walks into lists that properties return.
        """
        found = []
        weights, constants = dict(self.weighted), dict(self.constants)
        for name in self.active_names:
            adapter = self.get(name)
            if adapter is None:
                continue
            weight = constants.get(name)
            if weight is None and name in weights:
                weight = weights[name].layer.weight
            # A method that is not additive has the constant 1, if any.
            if weight is not None and not (name in constants and weight == 1):
                adapter = weighted.Weighted(adapter, weight)
            # torch.compile can't read a context, so only a bank's sites do.
            if self.per_example:
                adapter = per_example.of_batch(adapter)
            found.append(adapter)
        return found

    def save_own_variables(self, store):
        # The stack has no variables. A weights file tells what is frozen.
        if self.frozen_names:
            text = json.dumps(self.frozen_names)
            store["frozen"] = np.frombuffer(text.encode(), "uint8")

    def load_own_variables(self, store):
        # The stack has no variables. Files of models without adapters have no
        # entry for it, and Keras's method would raise an error.
        return


class KernelStacks(keras.layers.Layer):
    """The `AdapterStack`s of a layer with several kernels, by kernel.

    It is a sublayer of the layer with the name `adapter`, so that variables
    have paths `<layer>/<kernel>/adapter/<adapter name>/<variable>`, and their
    place in a weights file is `<layer>/adapter/kernel_<kernel>`.
    """

    def __init__(self, name="adapter"):
        super().__init__(name=name, dtype="float32")
        self.built = True

    def __getitem__(self, kernel_name):
        stack = getattr(self, kernel_attribute(kernel_name), None)
        if stack is None:
            raise KeyError(kernel_name)
        return stack

    def __contains__(self, kernel_name):
        return hasattr(self, kernel_attribute(kernel_name))

    def __iter__(self):
        # Without it, Python would iterate over the indices 0, 1 and so on.
        return iter([stack.name for stack in _compat.sublayers(self)])

    def active(self):
        """The active adapters of all kernels."""
        return [a for stack in _compat.sublayers(self) for a in stack.active()]

    def train_active(self):
        for stack in _compat.sublayers(self):
            stack.train_active()

    def save_own_variables(self, store):
        # It has no variables.
        return

    def load_own_variables(self, store):
        # Files of models without adapters have no entry for it.
        return


def kernel_attribute(kernel_name):
    """The attribute of a `KernelStacks` that holds the stack of a kernel."""
    return f"kernel_{kernel_name}"


def weight_attribute(name):
    """The attribute of an `AdapterStack` that holds an adapter's weight."""
    return f"weight_{name}"


def attribute(name):
    """The attribute of an `AdapterStack` that holds the adapter of a name."""
    # The prefix keeps a user's name, such as "path", from replacing an
    # attribute of Keras.
    return f"named_{name}"
