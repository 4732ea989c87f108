"""Marks the models inside an adapted model as its parts.

A part of an adapted model can be neither adapted nor quantized by itself,
because the adapted model would not know of it.
"""

import types
import weakref

# The attribute of a part that holds its `_Claim`.
_CLAIM = "_randadapt_claim"


class _Claim:
    """The adapted models that a model is a part of.

    Attributes:
        owners: `WeakSet` of adapted models.
        quantize: The `quantize` method that the instance had, or `None` if it
            had only its class's.
    """

    def __init__(self, quantize):
        self.owners = weakref.WeakSet()
        self.quantize = quantize


def claim(part, model):
    """Marks a model as a part of an adapted one, which may be itself."""
    attributes = vars(part)
    if _CLAIM not in attributes:
        # Keras sets a `quantize` method on every instance.
        attributes[_CLAIM] = _Claim(attributes.get("quantize"))
    attributes["quantize"] = types.MethodType(_quantize, part)
    attributes[_CLAIM].owners.add(model)


def release(part, model):
    """Undoes `claim`; the last call for a part restores its `quantize`.

    Both functions may be repeated after an interruption.
    """
    attributes = vars(part)
    if _CLAIM not in attributes:
        return
    attributes[_CLAIM].owners.discard(model)
    if attributes[_CLAIM].owners:
        return
    quantize = attributes[_CLAIM].quantize
    if quantize is None:
        attributes.pop("quantize", None)
    else:
        attributes["quantize"] = quantize
    # The claim is deleted last. Without it, `claim` would take the method of
    # this module for the model's own.
    del attributes[_CLAIM]


def owner_of(part):
    """An adapted model that a model is a part of, or `None`."""
    if _CLAIM not in vars(part):
        return None
    return next(iter(vars(part)[_CLAIM].owners), None)


def _quantize(part, *args, **kwargs):
    if owner_of(part) is None:
        # The adapted models that it was a part of no longer exist.
        release(part, part)
        return part.quantize(*args, **kwargs)
    raise ValueError(
        f"Model '{part.name}' has adapters attached, and `quantize` would "
        "skip every adapted layer. Quantize first and inject afterwards, or "
        "call `keras_randadapt.merge(model)` before quantizing."
    )
