"""Keeps compiled step functions until a model computes the same again."""

from keras_randadapt import _compat

# The number of combinations of adapters whose functions are kept. Compiled
# programs take memory, so only the latest are.
_LIMIT = 16


class CompiledFunctions:
    """The functions that Keras compiled for combinations of active adapters.

    Keras compiles `predict`, `evaluate` and `generate` for the adapters that
    are active at the time. After a switch to other adapters and back, the
    functions are taken from here and not compiled again. The train function is
    not kept, because it belongs to an optimizer and a switch makes a new one.
    """

    def __init__(self):
        self._kept = {}

    def put_away(self, model, names):
        """Stores a model's functions, before the active adapters change.

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
            names: See `put_away`.
        """
        key = names, _identity(_variables(model))
        _, functions = self._kept.get(key, ((), {}))
        for attribute, function in functions.items():
            setattr(model, attribute, function)

    def clear(self):
        self._kept.clear()

    def copy(self):
        """A copy with the same functions that changes independently."""
        other = CompiledFunctions()
        other._kept = dict(self._kept)
        return other


def _variables(model):
    # On JAX, functions take the values of trainable and non-trainable variables
    # by position. They can be used only with the same variables in the same
    # order.
    return [*model.trainable_variables, None, *model.non_trainable_variables]


def _identity(variables):
    # The variables are kept as well, so that no new one gets the same `id`.
    return tuple(map(id, variables))
