"""KerasHub's private converters of transformers' checkpoints."""

import functools


@functools.lru_cache(maxsize=1)
def transformers_converters():
    """dict from transformers' model types to KerasHub's converter modules.

    KerasHub has the model types in a chain of comparisons. Its strings are the
    candidates, and the loader tells which of them are model types.

    Returns:
        dict from string to module. It is empty without KerasHub.
    """
    try:
        from keras_hub.src.utils.transformers import preset_loader
    except ImportError:
        return {}
    loader = preset_loader.TransformersPresetLoader
    found = {}
    for text in _strings(loader.__init__.__code__.co_consts):
        try:
            found[text] = loader(None, {"model_type": text}).converter
        except ValueError:
            # It is another string of the code, such as an error's.
            continue
    return found


def exported_config(backbone):
    """The config of transformers that KerasHub's exporter gives a backbone.

    Args:
        backbone: A backbone of KerasHub.

    Returns:
        A dict, or `None` where the exporter does not know the family.
    """
    try:
        from keras_hub.src.utils.transformers.export import hf_exporter
    except ImportError:
        return None
    make = hf_exporter.MODEL_CONFIGS.get(type(backbone).__name__)
    if make is None:
        return None
    config = make(backbone)
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _strings(constants):
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)
        elif isinstance(constant, str):
            yield constant
