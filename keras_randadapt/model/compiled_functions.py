"""Compiled step functions, kept for when a model computes the same again."""

from keras_randadapt import _compat

# Programs take memory; these are the combinations of adapters used last.
_LIMIT = 16


class CompiledFunctions:
    """What Keras compiled for each combination of active adapters.

    Keras compiles `predict`, `evaluate` and `generate` for the adapters that
    are active at the time. Whoever switches to others and back finds them
    here, instead of waiting for the compiler again. The train function is not
    among them: it belongs to an optimizer, of which a switch makes a new one.
    """

    def __init__(self):
        self._kept = {}

    def put_away(self, model, names):
        """Remembers a model's functions, before it computes otherwise.

        Args:
            model: An adapted model.
            names: tuple of the names of the adapters that it computes with.
        """
        functions = {
            attribute: function
            for attribute, function in _compat.compiled_functions(model).items()
            if attribute != "train_function" and function is not None
        }
        variables = _variables(model)
        key = names, _identity(variables)
        self._kept.pop(key, None)
        if functions:
            self._kept[key] = variables, functions
        while len(self._kept) > _LIMIT:
            del self._kept[next(iter(self._kept))]

    def bring_back(self, model, names):
        """Gives a model the functions of these adapters, if there are any.

        Args:
            model: An adapted model.
            names: As for `put_away`.
        """
        key = names, _identity(_variables(model))
        _, functions = self._kept.get(key, ((), {}))
        for attribute, function in functions.items():
            setattr(model, attribute, function)

    def clear(self):
        self._kept.clear()

    def copy(self):
        """One that holds the same functions and changes by itself."""
        other = CompiledFunctions()
        other._kept = dict(self._kept)
        return other


def _variables(model):
    # On JAX, functions take the values of variables by their position, in two
    # arguments: they are good only for the same ones in the same order.
    return [*model.trainable_variables, None, *model.non_trainable_variables]


def _identity(variables):
    # The variables are kept as well, so that no new one gets the same.
    return tuple(map(id, variables))
