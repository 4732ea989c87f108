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
        """Takes the functions off a model, before it computes otherwise.

        Args:
            model: An adapted model.
            names: tuple of the names of the adapters that it computes with.
        """
        functions = {
            attribute: function
            for attribute, function in _compat.compiled_functions(model).items()
            if attribute != "train_function" and function is not None
        }
        self._kept.pop(names, None)
        if functions:
            self._kept[names] = _variables(model), functions
        while len(self._kept) > _LIMIT:
            del self._kept[next(iter(self._kept))]
        _compat.reset_compiled_functions(model)

    def bring_back(self, model, names):
        """Gives a model the functions of these adapters, if there are any.

        On JAX, functions take the values of variables by their position: they
        are good only for the same variables in the same order.
        """
        variables, functions = self._kept.get(names, ((), {}))
        if list(map(id, variables)) == list(map(id, _variables(model))):
            for attribute, function in functions.items():
                setattr(model, attribute, function)

    def clear(self):
        self._kept.clear()


def _variables(model):
    # Themselves and not their ids, which new ones could get. The split counts:
    # the two kinds are two arguments.
    return [*model.trainable_variables, None, *model.non_trainable_variables]
