"""Descriptions of adapter templates, as files hold them."""

import json
from typing import Any

import keras

from keras_randadapt.adapters.base import Adapter


def serialize(template: Adapter) -> dict[str, Any]:
    """A JSON-ready description of an adapter template."""
    return {
        "class": keras.saving.get_registered_name(type(template)),
        "config": template.get_config(),
    }


def deserialize(config: dict[str, Any]) -> Adapter:
    """The template that `serialize` described.

    Raises:
        ValueError: If the class is not a registered adapter. A file must not
            be able to create any other class.
    """
    cls = keras.saving.get_registered_object(config["class"])
    if not isinstance(cls, type) or not issubclass(cls, Adapter):
        raise ValueError(
            f"'{config['class']}' is no registered adapter. If it is your "
            "own, import its module first. This version of keras_randadapt "
            "may also be older than the file."
        )
    return cls.from_config(config["config"])


def canonical(description: dict[str, Any]) -> str:
    """The text of a description: equal ones give one text on every backend."""
    return json.dumps(
        description, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
