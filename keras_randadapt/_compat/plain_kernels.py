"""Kernels that layers hold in a plain attribute and not behind a property."""

import keras

__all__ = ["TABLES", "holds_table", "plain_kernel_name", "table_name"]

_CONVOLUTIONS = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)

#: KerasHub's layers that hold a learned table, whose last axis is that of the
#: features: dict from the name of a class to that of its attribute. Their own
#: `call` reads the attribute.
TABLES = {
    "PositionEmbedding": "position_embeddings",
    "RelativeEmbedding": "rel_embeddings",
}


def plain_kernel_name(layer):
    """The plain attribute in which a layer has its kernel.

    The attribute of a site shows the adapted kernel, while `vars` of the site
    has the variable.

    Args:
        layer: Any layer, with or without adapters.

    Returns:
        The attribute's name, or `None` for layers of other classes.
    """
    if isinstance(layer, _CONVOLUTIONS):
        return "kernel"
    return _table_of(layer)


def holds_table(layer):
    """Whether a layer's kernel is a table, in which rows are looked up."""
    if isinstance(layer, keras.layers.Embedding):
        return True
    return _table_of(layer) is not None


def _table_of(layer):
    names = (table_name(cls) for cls in type(layer).__mro__)
    return next((name for name in names if name is not None), None)


def table_name(cls):
    """The attribute of a class of `TABLES`, or `None` for other classes.

    Classes are known by their names, since the library works without KerasHub.
    """
    if cls.__module__.partition(".")[0] != "keras_hub":
        return None
    return TABLES.get(cls.__name__)
