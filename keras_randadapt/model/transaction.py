"""Changes of a model that are made as a whole or not at all.

Whatever is raised half-way, an interruption or a lack of memory included, is
followed by taking back what was done. Each step of a change is recorded before
it is made, as a function that puts an absolute value back. Taking back is
therefore idempotent: when it is interrupted itself, it begins again. A change
that is still open when the model is used next, because the code that should
have taken it back was cut short, is taken back then; see `recover`.

There is no lock, because an exception on the way out of a `with` block could
leave it locked. A thread that finds another thread's open change waits for its
end.
"""

import contextlib
import functools
import threading
import time

import keras
import numpy as np

from keras_randadapt import _compat

# The attribute that is a model's open `Change`.
_OPEN = "_randadapt_change"

# Seconds between two looks at the change of another thread.
_WAIT = 0.001

_MISSING = object()


class Change:
    """One change of a model: what was done so far, and how to take it back.

    Attributes:
        model: The model.
        outer: The change that this one is made inside of, which is a block
            whose body is running, or `None`.
        thread: The identifier of the thread that makes the change.
        settled: Whether the change is a block whose body is running.
        leave: Once a block has been entered, the function that ends it.
        before: What the change has to know of the model as it was, if it asks
            for that; see `attach.changing`.
    """

    def __init__(self, model):
        self.model = model
        self.outer = None
        self.thread = threading.get_ident()
        self.settled = False
        self.leave = None
        self.before = None
        self._undo = []

    def on_undo(self, undo):
        """Records how the next step is taken back.

        Args:
            undo: Function without arguments. It may be called when the step
                was not made, and more than once.
        """
        self._undo.append(undo)

    def set(self, owner, attribute, value):
        """Sets an attribute of a layer, a model or another object."""
        if attribute == "__class__":
            before = type(owner)
        else:
            before = vars(owner).get(attribute, _MISSING)
        self.on_undo(functools.partial(_put, owner, attribute, before))
        setattr(owner, attribute, value)

    def unset(self, owner, attribute):
        """Deletes an attribute of the instance."""
        before = vars(owner).get(attribute, _MISSING)
        self.on_undo(functools.partial(_put, owner, attribute, before))
        vars(owner).pop(attribute, None)

    def assign(self, variable, value):
        """Assigns a value to a variable; a copy of the old one is kept."""
        before = np.array(keras.ops.convert_to_numpy(variable))
        self.on_undo(functools.partial(variable.assign, before))
        variable.assign(value)

    def attach_sublayer(self, layer, name, sublayer):
        """Makes `sublayer` an attribute of a built layer."""
        self._record_sublayer(layer, name)
        _compat.attach_sublayer(layer, name, sublayer)

    def detach_sublayer(self, layer, name):
        """Removes a sublayer that is an attribute of a built layer."""
        self._record_sublayer(layer, name)
        _compat.detach_sublayer(layer, name)

    def _record_sublayer(self, layer, name):
        self.on_undo(
            functools.partial(
                _compat.restore_sublayer,
                layer,
                name,
                getattr(layer, name, None),
                _compat.sublayers(layer),
            )
        )

    def record_flags(self):
        """Records all `trainable` flags at and below the model."""
        layers, variables = [], []
        for layer in _compat.flatten_layers(self.model):
            layers.append((layer, _compat.layer_trainable_flag(layer)))
            for variable in _compat.owned_variables(layer):
                variables.append((variable, variable.trainable))
        self.on_undo(functools.partial(restore_flags, layers, variables))

    def is_open(self):
        """Whether the change was neither completed nor taken back."""
        one = vars(self.model).get(_OPEN)
        while one is not None and one is not self:
            one = one.outer
        return one is self

    def begin(self):
        """Opens the change, once no other thread has one open."""
        while True:
            recover(self.model)
            self.outer = vars(self.model).get(_OPEN)
            if self.outer is not None:
                # A block of this model, whose body is running.
                vars(self.model)[_OPEN] = self
                return
            # If two threads come here at once, one finds the other's change.
            if vars(self.model).setdefault(_OPEN, self) is self:
                return

    def settle(self, leave):
        """Begins the body of a block.

        Args:
            leave: Function without arguments that ends the block. It may be
                called again when it was interrupted.
        """
        self.leave = leave
        self.settled = True
        # These would hold copies of kernels for the length of the block.
        self._undo = []

    def end(self):
        """Completes the change: from here on nothing is taken back."""
        if self.outer is None:
            vars(self.model).pop(_OPEN, None)
        else:
            vars(self.model)[_OPEN] = self.outer

    def take_back(self):
        """Undoes the change, or leaves the block; nothing if it is closed."""
        if not self.is_open():
            return
        self.settled = False
        if self.leave is not None:
            self.leave()
        else:
            for undo in reversed(self._undo):
                undo()
        self.end()


@contextlib.contextmanager
def change(model):
    """Makes one change of a model in a block: all of it, or none.

    Args:
        model: A Keras model.

    Yields:
        A `Change`, by which the block makes its steps.
    """
    this = Change(model)
    try:
        try:
            this.begin()
            yield this
            this.end()
        except BaseException:
            this.take_back()
            raise
    except BaseException:
        # Taking back may have been interrupted.
        this.take_back()
        raise


@contextlib.contextmanager
def block(model, enter):
    """Changes a model for a block, whose end takes the change back.

    Args:
        model: A Keras model.
        enter: Function of a `Change` that makes the change and returns the
            function that ends the block; see `Change.settle`.
    """
    this = Change(model)
    try:
        try:
            this.begin()
            this.settle(enter(this))
            yield
        finally:
            this.take_back()
    finally:
        # Taking back may have been interrupted.
        this.take_back()


def recover(model):
    """Takes back a change that was cut short, if there is one.

    Every public function and every call of an adapted model begins with it. It
    waits for a change that another thread is making.

    Args:
        model: A Keras model.
    """
    while True:
        this = vars(model).get(_OPEN)
        if this is None or this.settled:
            return
        if this.thread != threading.get_ident() and _is_alive(this.thread):
            time.sleep(_WAIT)
        elif getattr(type(model), "_own_class", None) is None:
            # The class is the first thing that injection changes and the last
            # that removal does, so nothing or all was done.
            vars(model).pop(_OPEN, None)
        else:
            this.take_back()


def _is_alive(identifier):
    return any(thread.ident == identifier for thread in threading.enumerate())


def restore_flags(layers, variables):
    """Gives layers and variables their `trainable` flags back.

    Args:
        layers: `(layer, flag)` pairs.
        variables: `(variable, flag)` pairs.
    """
    for layer, flag in layers:
        _compat.set_layer_trainable_flag(layer, flag)
    for variable, flag in variables:
        if variable.trainable != flag:
            variable.trainable = flag


def _put(owner, attribute, value):
    if value is _MISSING:
        vars(owner).pop(attribute, None)
    else:
        setattr(owner, attribute, value)
