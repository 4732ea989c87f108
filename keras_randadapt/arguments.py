"""Checks of arguments that several methods take, and initial values."""

import math

import keras
import numpy as np

from keras_randadapt import random


def initial_values(kind, seed, role, shape, **arguments):
    """The initial values of a trainable weight, from `random`.

    Args:
        kind: `"zeros"`, `"ones"`, `"normal"` (`stddev`, 1 by default) or
            `"kaiming_uniform"` (`U(-1/sqrt(n), 1/sqrt(n))` for `n` rows, the
            LoRA papers' `kaiming_uniform(a=sqrt(5))`).
        seed: int in `[0, 2**64)`.
        role: string. The purpose of the values.
        shape: tuple of ints.
        **arguments: See `kind`.

    Returns:
        float32 NumPy array.
    """
    role = f"initial/{role}"
    if kind == "zeros":
        return np.zeros(shape, "float32")
    if kind == "ones":
        return np.ones(shape, "float32")
    if kind == "normal":
        stddev = np.float32(arguments.get("stddev", 1.0))
        return random.normals(seed, role, shape) * stddev
    bound = np.float32(1.0 / np.sqrt(shape[0]))
    return (2 * random.uniforms(seed, role, shape) - 1) * bound


_OWN_INITIALIZERS = {
    "zeros": set(),
    "ones": set(),
    "normal": {"stddev"},
    "kaiming_uniform": set(),
}


def check_initializer(initializer, argument):
    """Validates an initializer argument and returns a serializable form."""
    own = own_initializer(initializer)
    if own is not None:
        kind, arguments = own
        if not arguments:
            return kind
        # Values become Python floats, since a config can't hold NumPy's.
        return {
            "name": kind,
            **{
                key: check_scaling(value, f"{argument}[{key!r}]")
                for key, value in arguments.items()
            },
        }
    try:
        _check_origin(initializer, keras.initializers.Initializer)
        found = keras.initializers.get(initializer)
        if found is None:
            raise ValueError("Keras would take its own default.")
        return found
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` must be one of {sorted(_OWN_INITIALIZERS)}, a dict "
            "such as {'name': 'normal', 'stddev': 0.1}, or a Keras "
            f"initializer. Received: {argument}={initializer!r}"
        ) from error


def _check_origin(identifier, base):
    """Raises `ValueError` for what a file must not make Keras call.

    A name or a config, which may come from a file, can mean any function or
    class that is registered, and Keras would call it.

    Args:
        identifier: The argument: a name, a config, or an object of the user's.
        base: `keras.initializers.Initializer` or
            `keras.regularizers.Regularizer`.
    """
    if isinstance(identifier, dict):
        registered = identifier.get("registered_name")
        if not _is_plain(identifier.get("config")):
            raise ValueError("Its config holds more than numbers and names.")
        if str(registered).startswith("keras_randadapt>"):
            return
        if registered not in (None, identifier.get("class_name")):
            raise ValueError("It is none of Keras's own.")
        identifier = identifier.get("class_name")
    elif not isinstance(identifier, str):
        return
    if str(identifier).startswith("keras_randadapt>"):
        return
    known = {
        name
        for module in (keras.initializers, keras.regularizers)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base)
    }
    if identifier not in known:
        raise ValueError(f"It is none of Keras's own: {sorted(known)}")


def _is_plain(value):
    if isinstance(value, dict):
        return all(map(_is_plain, value.values())) and "class_name" not in value
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def serialize_initializer(initializer):
    """The form of an initializer that goes into `get_config`."""
    if isinstance(initializer, keras.initializers.Initializer):
        return keras.initializers.serialize(initializer)
    return initializer


def check_regularizer(regularizer, argument="regularizer"):
    """Validates a regularizer argument."""
    try:
        _check_origin(regularizer, keras.regularizers.Regularizer)
        regularizer = keras.regularizers.get(regularizer)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` must be a Keras regularizer, such as "
            "keras_randadapt.regularizers.Orthogonality(0.1), the name of "
            f"one, or None. Received: {argument}={regularizer!r}"
        ) from error
    if regularizer is not None and not isinstance(
        regularizer, keras.regularizers.Regularizer
    ):
        raise TypeError(
            f"`{argument}` must be a Keras regularizer: a function has no "
            f"config to save. Received: {argument}={regularizer!r}"
        )
    return regularizer


def own_initializer(initializer):
    """`(kind, arguments)` of an initializer that `initial_values` knows.

    For any other initializer it is `None`.
    """
    if isinstance(initializer, str) and initializer in _OWN_INITIALIZERS:
        return initializer, {}
    if isinstance(initializer, dict) and "name" in initializer:
        arguments = dict(initializer)
        kind = arguments.pop("name")
        allowed = _OWN_INITIALIZERS.get(kind, set())
        if kind in _OWN_INITIALIZERS and set(arguments) <= allowed:
            return kind, arguments
    return None


def check_rank(rank, argument="rank", least=1):
    """Validates a rank."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise TypeError(
            f"`{argument}` must be an integer. Received: {argument}={rank!r} "
            f"(of type {type(rank).__name__})"
        )
    if rank < least:
        raise ValueError(
            f"`{argument}` must be at least {least}. "
            f"Received: {argument}={rank}"
        )
    return int(rank)


def check_rank_fits(rank, kernel_view):
    """Raises `ValueError` if a rank exceeds a kernel view's dimensions."""
    if rank > min(kernel_view):
        raise ValueError(
            f"`rank` must be at most {min(kernel_view)}, the smaller "
            f"dimension of the kernel view {tuple(kernel_view)}: a larger "
            "rank trains more weights than the kernel has and gains "
            f"nothing. Received: rank={rank}. Lower the rank, or "
            "leave the site out with `exclude`."
        )


def check_alpha(alpha, scaling, rank, rslora=False):
    """The scaling that `alpha` or `scaling` asks for, 1 by default."""
    if rslora and alpha is None:
        raise ValueError(
            "`rslora` divides `alpha` by the root of the rank, so give "
            f"`alpha`. Received: alpha={alpha}, scaling={scaling}"
        )
    if alpha is not None and scaling is not None:
        raise ValueError(
            "`alpha` and `scaling` say the same thing "
            "(scaling = alpha / rank): give one of them. "
            f"Received: alpha={alpha}, scaling={scaling}"
        )
    if alpha is not None:
        divisor = math.sqrt(rank) if rslora else rank
        scaling = check_scaling(alpha, "alpha") / divisor
    return check_scaling(1.0 if scaling is None else scaling)


def check_scaling(scaling, argument="scaling"):
    """Validates a finite scale."""
    try:
        value = float("nan" if isinstance(scaling, (str, bool)) else scaling)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(
            f"`{argument}` must be a finite number. "
            f"Received: {argument}={scaling!r}"
        )
    return value


def check_choice(value, choices, argument):
    """Validates a choice between names."""
    # Comparing an array with a choice gives an array, which has no truth value.
    if np.ndim(value) or value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {choices}. "
            f"Received: {argument}={value!r}"
        )
    return value


def check_non_negative(value, argument):
    """Validates a finite number that is at least 0."""
    number = check_scaling(value, argument)
    if number < 0:
        raise ValueError(
            f"`{argument}` must be at least 0. Received: {argument}={value!r}"
        )
    return number
