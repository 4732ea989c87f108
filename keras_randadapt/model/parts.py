"""Marks the layers and models inside an adapted model as its parts.

A model that is a part of an adapted model can't be adapted by itself, and no
part can be quantized or takes Keras's own LoRA, because the adapted model would
not know of it: it would freeze new weights and thaw frozen ones.
"""

import types
import weakref

import keras

# The attribute of a part that holds its `_Claim`.
_CLAIM = "_randadapt_claim"


class _Claim:
    """The adapted models that a layer is a part of.

    Attributes:
        owners: `WeakSet` of adapted models.
        methods: dict from the name of a replaced method to the one that the
            instance had, or `None` if it had only its class's.
    """

    def __init__(self, methods):
        self.owners = weakref.WeakSet()
        self.methods = methods


def claim(part, model):
    """Marks a layer as a part of an adapted model, which may be itself."""
    attributes = vars(part)
    replaced = _replaced(part)
    if not replaced:
        return
    if _CLAIM not in attributes:
        # Keras sets a `quantize` method on every instance.
        attributes[_CLAIM] = _Claim({n: attributes.get(n) for n in replaced})
    for name, method in replaced.items():
        attributes[name] = types.MethodType(method, part)
    attributes[_CLAIM].owners.add(model)


def _replaced(part):
    found = {}
    if type(part).quantize is not keras.layers.Layer.quantize:
        found["quantize"] = _quantize
    if hasattr(type(part), "enable_lora"):
        found["enable_lora"] = _enable_lora
    return found


def release(part, model):
    """Undoes `claim`; the last call for a part restores its methods.

    Both functions may be repeated after an interruption.
    """
    attributes = vars(part)
    if _CLAIM not in attributes:
        return
    attributes[_CLAIM].owners.discard(model)
    if attributes[_CLAIM].owners:
        return
    for name, method in attributes[_CLAIM].methods.items():
        if method is None:
            attributes.pop(name, None)
        else:
            attributes[name] = method
    # The claim is deleted last. Without it, `claim` would take the methods of
    # this module for the part's own.
    del attributes[_CLAIM]


def owner_of(part):
    """An adapted model that a layer is a part of, or `None`."""
    if _CLAIM not in vars(part):
        return None
    return next(iter(vars(part)[_CLAIM].owners), None)


def _quantize(part, *args, **kwargs):
    owner = owner_of(part)
    if owner is None:
        # The adapted models that it was a part of no longer exist.
        release(part, part)
        return part.quantize(*args, **kwargs)
    if isinstance(part, keras.Model):
        missed = f"Model '{part.name}' has adapters attached, and `quantize` "
        missed += "would skip every adapted layer."
    else:
        missed = f"Layer '{part.name}' is a part of model '{owner.name}', "
        missed += "which has adapters attached, and `quantize` would replace "
        missed += "the kernel under them."
    raise ValueError(
        f"{missed} Quantize first and inject afterwards, in one call with "
        "`keras_randadapt.inject(..., quantize=...)`, or call "
        "`keras_randadapt.merge(model)` before quantizing."
    )


def _enable_lora(part, *args, **kwargs):
    owner = owner_of(part)
    if owner is None:
        release(part, part)
        return part.enable_lora(*args, **kwargs)
    raise ValueError(
        f"'{part.name}' is a part of model '{owner.name}', which carries "
        "adapters of keras_randadapt, and Keras's own LoRA and they would "
        "freeze each other's weights. Call `keras_randadapt.eject(model)` or "
        "`merge(model)` first, or add a second adapter with "
        "`keras_randadapt.inject(model, LoRA(...), name=...)`."
    )
