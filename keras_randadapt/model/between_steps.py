"""Other threads' turns between two training steps of `fit`."""

import collections
import threading

from keras_randadapt import _compat


class BetweenSteps:
    """Runs functions of other threads between two training steps.

    While `fit` runs on JAX, the model's variables have no values: the step
    function gets them as arguments and gives the memory of the old ones back.
    A thread that took the state out of the trainer would destroy the training,
    so the training thread itself runs what others ask for.
    """

    def __init__(self):
        self._lock = threading.Lock()
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
        with self._lock:
            is_own = self.thread in (None, threading.get_ident())
            if not is_own:
                request = _Request(function)
                self._requests.append(request)
        if is_own:
            return function()
        return request.result()

    def begin(self):
        """Says that this thread is in `fit` from now on."""
        with self._lock:
            self.thread = threading.get_ident()

    def end(self):
        """Says that `fit` is over, and runs what is still asked for."""
        with self._lock:
            self.thread = None
        self._serve()

    def _serve(self):
        while self._requests:
            self._requests.popleft().answer()

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
    def __init__(self, function):
        self._function = function
        self._done = threading.Event()
        self._value = None
        self._error = None

    def answer(self):
        try:
            self._value = self._function()
        except BaseException as error:
            # It belongs to the thread that asked.
            self._error = error
        finally:
            self._done.set()

    def result(self):
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value
