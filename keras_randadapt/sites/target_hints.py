"""What errors about targets tell of a model's layers."""

import difflib
import re

from keras_randadapt.sites import supported


def what_to_name(candidates):
    """What to give as `targets` where the default finds nothing."""
    classes = sorted(
        {
            supported.supported_class(layer).__name__
            for layer in candidates.values()
            if supported.kind_of(layer) == "convolution"
        }
    )
    if not classes:
        return 'Name the layers to adapt in `targets`, or give "all-linear". '
    names = ", ".join(f"keras.layers.{name}" for name in classes)
    return (
        "Its convolutions can be adapted by `targets=lambda layer: "
        f"isinstance(layer, ({names},))`. Or name layers. "
    )


def shown(target):
    """A name or a pattern as users write it."""
    if isinstance(target, re.Pattern):
        return f"re.compile({target.pattern!r})"
    return repr(target)


def near_misses(target, layers):
    """The names most like a target, or those of all that can be adapted."""
    names = sorted({layer.name for layer in layers.values()})
    paths = sorted({layer.path or layer.name for layer in layers.values()})
    wanted = target.pattern if isinstance(target, re.Pattern) else target
    close = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    close += [
        path
        for path in difflib.get_close_matches(wanted, paths, n=3, cutoff=0.5)
        if path not in close
    ]
    if close:
        return f"Near misses: {close}."
    return available(
        {a: x for a, x in layers.items() if supported.supported_class(x)}
    )


def available(candidates):
    """The names of the layers that can be adapted."""
    names = sorted({layer.name for layer in candidates.values()})
    if not names:
        return "The model has no layer of a supported class."
    some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Layers that can be adapted are called: {some}."
