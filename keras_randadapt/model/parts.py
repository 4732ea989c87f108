"""What models inside of an adapted one are told of it.

A part of an adapted model is neither adapted nor quantized apart: the whole
would not know.
"""

import types
import weakref

# The attribute that is a model's `_Claim`.
_CLAIM = "_randadapt_claim"


class _Claim:
    """What a model is told of the adapted models that it is a part of.

    Attributes:
        owners: `WeakSet` of models.
        quantize: The method that the model itself had, or `None` for that of
            its class.
    """

    def __init__(self, quantize):
        self.owners = weakref.WeakSet()
        self.quantize = quantize


def claim(part, model):
    """Makes a model, or `model` itself, a part of an adapted one."""
    attributes = vars(part)
    if _CLAIM not in attributes:
        # Keras has a method of its own on every instance.
        attributes[_CLAIM] = _Claim(attributes.get("quantize"))
    attributes["quantize"] = types.MethodType(_quantize, part)
    attributes[_CLAIM].owners.add(model)


def release(part, model):
    """The reverse of `claim`; the last one gives `quantize` back.

    Either may be repeated after it was interrupted.
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
    # Last: `claim` would take our method for the model's own without it.
    del attributes[_CLAIM]


def owner_of(part):
    """An adapted model that a model is a part of, or `None`."""
    if _CLAIM not in vars(part):
        return None
    return next(iter(vars(part)[_CLAIM].owners), None)


def _quantize(part, *args, **kwargs):
    if owner_of(part) is None:
        # Those that it was a part of are gone, adapters and all.
        release(part, part)
        return part.quantize(*args, **kwargs)
    raise ValueError(
        f"Model '{part.name}' has adapters attached, and `quantize` would "
        "skip every adapted layer. Quantize first and inject afterwards, or "
        "call `keras_randadapt.merge(model)` before quantizing."
    )
