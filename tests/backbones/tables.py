"""All tables in one, and the classes that they have to cover."""

import inspect

from tests.backbones import images
from tests.backbones import several
from tests.backbones import texts

ROWS = dict(sorted({**texts.ROWS, **images.ROWS, **several.ROWS}.items()))

#: The backbones that the oldest KerasHub of `pyproject.toml` lacks, and the
#: version that brought them.
SINCE = {"BLIP2Backbone": "0.30", "Qwen3_5MoeBackbone": "0.30"}

#: What `keras_hub.models` exports as a base class alone.
_ABSTRACT = {"Backbone", "FeaturePyramidBackbone"}


def exported():
    """The names of the backbones that the installed KerasHub exports.

    A class that it exports under two names counts once, under its own.
    """
    import keras_hub

    return sorted(
        {
            found.__name__
            for found in vars(keras_hub.models).values()
            if inspect.isclass(found)
            and issubclass(found, keras_hub.models.Backbone)
            and found.__name__ not in _ABSTRACT
        }
    )
