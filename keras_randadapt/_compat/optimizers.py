"""Keras's private API for optimizers."""

__all__ = [
    "check_variables_are_known",
    "copy_weight_decay_exclusions",
    "exclude_from_weight_decay",
    "iterations",
    "set_weight_decay_exclusions",
    "ShowsMovingAverage",
    "track_optimizer_variable",
    "trained_variables",
    "variable_index",
    "weight_decay",
    "weight_decay_exclusions",
]


def exclude_from_weight_decay(optimizer, variables):
    """Excludes more variables from an optimizer's weight decay.

    Keras's own method of this name forgets the exclusions of earlier calls.
    """
    excluded = set(getattr(optimizer, "_exclude_from_weight_decay", ()))
    excluded.update(optimizer._var_key(variable) for variable in variables)
    optimizer._exclude_from_weight_decay = excluded
    optimizer._exclude_from_weight_decay_cache = {}


def copy_weight_decay_exclusions(source, target, variables):
    """Copies the exclusions from weight decay, which no config contains.

    Args:
        source: An optimizer.
        target: Another optimizer.
        variables: The model's variables. Only their exclusions are copied:
            Keras keys exclusions by `id`, and the `id` of another variable
            may be reused.
    """
    excluded = getattr(source, "_exclude_from_weight_decay", set())
    target._exclude_from_weight_decay = {
        key for key in map(target._var_key, variables) if key in excluded
    }
    target._exclude_from_weight_decay_pattern = getattr(
        source, "_exclude_from_weight_decay_pattern", None
    )
    target._exclude_from_weight_decay_cache = {}


def weight_decay_exclusions(optimizer):
    """A copy of the keys of variables that are excluded from weight decay."""
    return set(getattr(optimizer, "_exclude_from_weight_decay", ()))


def set_weight_decay_exclusions(optimizer, keys):
    """Restores the result of `weight_decay_exclusions`."""
    optimizer._exclude_from_weight_decay = set(keys)
    optimizer._exclude_from_weight_decay_cache = {}


def weight_decay(optimizer, variable):
    """The weight decay that an optimizer has for a variable, or 0."""
    if optimizer.weight_decay is None:
        return 0.0
    return optimizer.weight_decay * optimizer._use_weight_decay(variable)


def variable_index(optimizer, variable):
    """The index of a variable among those that an optimizer trains."""
    return optimizer._get_variable_index(variable)


def check_variables_are_known(optimizer, variables):
    """Raises `ValueError` if an optimizer was not built with a variable."""
    optimizer._check_variables_are_known(variables)


def trained_variables(optimizer):
    """The variables that a built optimizer trains."""
    return optimizer._trainable_variables


def iterations(optimizer):
    """The variable that counts an optimizer's calls, also accumulating ones."""
    return optimizer._iterations


class ShowsMovingAverage:
    """A mixin for an optimizer that has an `inner_optimizer`.

    It shows the inner moving averages, because Keras's `SwapEMAWeights` looks
    into one level of nested optimizers only.
    """

    @property
    def _model_variables_moving_average(self):
        return self.inner_optimizer._model_variables_moving_average


def track_optimizer_variable(optimizer, variable):
    """Makes a variable part of an optimizer's state."""
    optimizer._track_variable(variable)
