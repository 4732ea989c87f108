"""Helpers of plots. They import matplotlib only when a plot is drawn."""

import os


def axis_or_new(axis, projection=None):
    """`axis`, or a new matplotlib axis if it is `None`.

    Args:
        axis: Optional axis.
        projection: Optional string, the projection of a new axis.

    Raises:
        ImportError: If matplotlib is needed and not installed.
    """
    if axis is not None:
        return axis
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: `pip install matplotlib`."
        ) from error
    return pyplot.figure().add_subplot(projection=projection)


def label_sites(axis, sites, most=40):
    """Writes sites' addresses at the ticks of a matplotlib `Axis`.

    The leading parts that all addresses share are left out. If there are more
    than `most` sites, only some are labelled.
    """
    step = max(1, -(-len(sites) // most))
    labels = short_names(sites)
    axis.set_ticks(range(0, len(sites), step), labels[::step])


def short_names(names):
    """Names without the leading parts that all of them share."""
    names = [str(name) for name in names]
    if len(names) < 2:
        return [name.rpartition("/")[2] for name in names]
    shared = os.path.commonprefix(names).rpartition("/")[0]
    return [name[len(shared) :].lstrip("/") for name in names]
