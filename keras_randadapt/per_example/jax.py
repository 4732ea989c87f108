"""Per-example gradients in JAX: a compiled `vmap` of `grad`."""

import jax
import numpy as np


def strategies(loss):
    """`(name, function of a chunk and a scale)` pairs, the fastest first."""
    gradient = jax.grad(loss)
    vectorized = jax.jit(jax.vmap(gradient, in_axes=(None, None, 0, None)))

    def all_at_once(chunk, scale):
        values, others = _state(loss)
        gradients = vectorized(values, others, chunk, scale)
        return [np.asarray(g) for g in gradients]

    def one_by_one(function):
        def loop(chunk, scale):
            values, others = _state(loss)
            rows = [
                function(values, others, [array[i] for array in chunk], scale)
                for i in range(len(chunk[0]))
            ]
            return [
                np.stack([np.asarray(g) for g in column])
                for column in zip(*rows)
            ]

        return loop

    return [
        ("all at once", all_at_once),
        ("one by one", one_by_one(jax.jit(gradient))),
        ("one by one without compilation", one_by_one(gradient)),
    ]


def intermediate_bytes(loss, batch):
    """The bytes of all results in the forward pass of a batch."""
    values, others = _state(loss)
    try:
        closed = jax.make_jaxpr(loss.of_batch)(values, others, batch)
    except Exception:
        # The model runs only eagerly, or it does not run. Keras replaces JAX's
        # errors, so their classes do not distinguish these cases.
        loss.of_batch(values, others, batch)
        return 0
    return _bytes(closed.jaxpr)


def _state(loss):
    # The values are arguments, because a compiled function would keep values
    # that it reads itself as constants.
    return (
        [variable.value for variable in loss.variables],
        [variable.value for variable in loss.others],
    )


def _bytes(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            getattr(parameter, "jaxpr", parameter)
            for parameter in equation.params.values()
        ]
        inner = [parameter for parameter in inner if hasattr(parameter, "eqns")]
        if inner:
            total += sum(map(_bytes, inner))
            continue
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            dtype = getattr(variable.aval, "dtype", None)
            # Random keys have a special dtype without an item size.
            total += int(np.prod(shape)) * getattr(dtype, "itemsize", 0)
    return total
