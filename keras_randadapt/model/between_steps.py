"""Other threads' turns between two training steps of `fit`."""

import collections
import threading

from keras_randadapt import _compat

# Seconds after which a thread looks whether `fit` is still running.
_WAIT = 0.05


class BetweenSteps:
    """Runs functions of other threads between two training steps.

    While `fit` runs on JAX, the model's variables have no values: the step
    function gets them as arguments and gives the memory of the old ones back.
    A thread that took the state out of the trainer would destroy the training,
    so the training thread itself runs what others ask for.
    """

    def __init__(self):
        self._requests = collections.deque()
        #: The identifier of the thread that is in `fit`, or `None`.
        self.thread = None

    def run(self, function):
        """Calls a function at once, or between two steps of a `fit`.

        Args:
            function: Function without arguments.

        Returns:
            What the function returns. What it raises is raised here.
        """
        if self.thread in (None, threading.get_ident()):
            return function()
        request = _Request(function)
        self._requests.append(request)
        while not request.done.wait(_WAIT):
            if self.thread is None:
                # `fit` ended after the question above, or broke off.
                self._serve()
        return request.result()

    def begin(self):
        """Says that this thread is in `fit` from now on."""
        self.thread = threading.get_ident()

    def end(self):
        """Says that `fit` is over, and runs what is still asked for."""
        self.thread = None
        self._serve()

    def _serve(self):
        while True:
            try:
                request = self._requests.popleft()
            except IndexError:
                return
            request.answer()

    def around(self, model, step):
        """A step function of JAX that runs what is asked for before a step.

        Args:
            model: The model.
            step: Function of the trainer's state and an iterator.

        Returns:
            A function like it.
        """

        def function(state, iterator):
            if self._requests:
                with _compat.values_of_jax_state(model, state):
                    self._serve()
            return step(state, iterator)

        return function


class _Request:
    """A function that another thread is to call, and what came of it."""

    def __init__(self, function):
        self._function = function
        self.done = threading.Event()
        self._value = None
        self._error = None

    def answer(self):
        try:
            self._value = self._function()
        except BaseException as error:
            # It belongs to the thread that asked.
            self._error = error
        finally:
            self.done.set()

    def result(self):
        if self._error is not None:
            raise self._error
        return self._value
