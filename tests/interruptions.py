"""Exceptions at chosen places of this package's code."""

import os
import pathlib
import sys
from unittest import mock

import keras

import keras_randadapt

PACKAGE = str(pathlib.Path(keras_randadapt.__file__).parent) + os.sep


class Interruption:
    """Raises `KeyboardInterrupt` before one bytecode of the package.

    Args:
        place: int. The number of the bytecode, counted from 1 in the order in
            which they run; `None` only counts them.
        after: Optional function without arguments: bytecodes count from the
            moment on at which it returns a true value.
    """

    def __init__(self, place=None, after=None):
        self.place = place
        self.count = 0
        self._after = after

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(self._before)

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return self._at_opcode

    def _at_opcode(self, frame, event, argument):
        if event == "opcode" and (self._after is None or self._after()):
            self.count += 1
            if self.count == self.place:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._at_opcode


class FailingAssignment:
    """Makes one assignment of a variable run out of memory.

    Args:
        number: int. Which assignment fails, counted from 1.
    """

    def __init__(self, number):
        self.number = number
        self.count = 0
        self.failed = False

    def __enter__(self):
        assign = keras.Variable.assign

        def failing(variable, value):
            self.count += 1
            if self.count == self.number:
                self.failed = True
                raise MemoryError
            return assign(variable, value)

        self._patch = mock.patch.object(keras.Variable, "assign", failing)
        self._patch.start()
        return self

    def __exit__(self, *exception):
        self._patch.stop()
