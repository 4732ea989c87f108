"""A bar that shows how far long work is."""

import time

import keras

from keras_randadapt import arguments

# Seconds after which work is long.
_LONG = 2.0


def check_verbose(verbose):
    """Validates a `verbose` argument."""
    return arguments.check_choice(verbose, ("auto", 0, 1), "verbose")


def shown(items, verbose):
    """Yields items, and shows how many of them are done.

    Args:
        items: Collection.
        verbose: 1 shows a bar, and 0 none. `"auto"` shows one once the work
            has taken two seconds and is not done.
    """
    items = list(items)
    bar = None
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        is_long = time.monotonic() - start > _LONG and done < len(items)
        if verbose == 1 or (verbose == "auto" and is_long):
            bar = bar or keras.utils.Progbar(len(items), unit_name="site")
        if bar is not None:
            bar.update(done)
