"""Text of a language model of KerasHub for prompts with rows of weights."""

import contextlib
import sys
import threading
from typing import Any

import keras

from keras_randadapt.serving import computation
from keras_randadapt.serving import requests


class Generator:
    """Runs `generate` of a model. Threads may use it at once.

    Args:
        model: The bank's model.
        layout: The bank's `Layout`.
    """

    def __init__(self, model, layout):
        self._model = model
        self._layout = layout
        self._compiled = (), None
        self._sampling = threading.Lock()

    def generate(self, table, prompts, adapters, arguments):
        """See `AdapterBank.generate`.

        Args:
            table: A `Table`.
            prompts: What the model's `generate` takes.
            adapters: list of names.
            arguments: dict of other arguments of `generate`.
        """
        model = self._model
        _check_generates(model)
        names = requests.strings(adapters)
        several = hasattr(prompts, "as_numpy_iterator")
        with table.kept() as kept:
            kept.check(names)
            left = list(names)

            def function(inputs, stop_token_ids=None):
                count = requests.examples(inputs)
                part = left[:count] if several else names
                requests.check_count(part, count)
                del left[: len(part)]
                return self._step(inputs, kept.rows(part), stop_token_ids)

            request = _Request(model, function)
            found = type(model).generate(request, prompts, **arguments)
            if left:
                raise ValueError(
                    "`adapters` must have a name for each prompt. Received: "
                    f"{len(names)} names for {len(names) - len(left)} prompts."
                )
        return found

    def _step(self, inputs, rows, stop_token_ids):
        model = self._model
        key = model.sampler, model.run_eagerly, model.jit_compile
        made, step = self._compiled
        if step is None or made != key:
            step = computation.compiled_generation(model, self._layout)
            self._compiled = key, step
        # Two requests must not draw with the same state of the sampler.
        with (
            self._sampling
            if model.sampler.variables
            else contextlib.nullcontext()
        ):
            return step(inputs, rows, stop_token_ids)


class _Request:
    """The model as its own `generate` sees it in one request.

    Everything is the model's but the function that computes tokens, so nothing
    of the model changes and other threads may generate meanwhile.
    """

    def __init__(self, model, function):
        self._bank_model = model
        self._bank_function = function

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `super` in a method of a model asks for it.
        return type(self._bank_model)

    def __getattr__(self, name):
        return getattr(self._bank_model, name)

    def make_generate_function(self):
        return self._bank_function


def _check_generates(model):
    # Whoever has such a model has imported KerasHub.
    hub = sys.modules.get("keras_hub")
    if hub is None or not isinstance(model, hub.models.CausalLM):
        own = getattr(model, "_own_class", type(model)).__name__
        raise ValueError(
            "`generate` takes a language model of KerasHub, such as "
            f"`keras_hub.models.GPT2CausalLM`. The bank's is a {own}."
        )
    if getattr(model, "sampler", None) is None:
        raise ValueError(
            f"Model '{model.name}' has no sampler yet: call `model.compile`, "
            'for example with `sampler="greedy"`.'
        )
    if keras.config.backend() not in ("jax", "tensorflow", "torch"):
        raise ValueError(
            "`generate` runs on JAX, TensorFlow and PyTorch. Received: "
            f"backend={keras.config.backend()!r}"
        )
