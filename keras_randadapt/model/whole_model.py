"""Adapted models in Keras's whole-model files."""

import keras

from keras_randadapt.adapters import configs
from keras_randadapt.model import adapted_model
from keras_randadapt.model import attach as attach_lib
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model.state import layers_of

_PACKAGE, _, _NAME = adapted_model.REGISTERED_NAME.partition(">")


@keras.saving.register_keras_serializable(package=_PACKAGE, name=_NAME)
class SavedAdaptedModel(adapted_model.AdaptedModel):
    """Rebuilds adapted models of every class from their configs."""

    @classmethod
    def from_config(cls, config, custom_objects=None):
        name = config["base"]["class_name"]
        known = keras.saving.get_registered_object(name)
        if isinstance(known, type) and issubclass(
            known, adapted_model.AdaptedModel
        ):
            # `keras.models.clone_model` hands over the class of the model
            # that it clones. The clone has no adapters.
            custom_objects = {**(custom_objects or {}), name: known._own_class}
            return keras.saving.deserialize_keras_object(
                config["base"], custom_objects=custom_objects
            )
        model = keras.saving.deserialize_keras_object(
            config["base"], custom_objects=custom_objects
        )
        for entry in config["adapters"]:
            _attach(model, entry)
        active = tuple(config["active"])
        frozen = config.get("frozen", ())
        weights = config.get("weights", {})
        trained = [name for name in active if name not in frozen]
        attach_lib.use(model, active, weights, trained, always=True)
        # The base weights are still to be loaded.
        model._randadapt.base_moving = None
        for record in model._randadapt.records.values():
            record.moving = None
        return model


def _attach(model, config):
    """Attaches an adapter that a whole-model config describes."""
    checks.check_model(model)
    layers = layers_of(model)
    template = configs.deserialize(config["adapter"])
    name, addresses, kept = config["name"], config["sites"], config["kept"]
    checks.check_new_name(model, name)
    checks.check_attachable(model, layers, addresses, kept)
    sources = config.get("sources", {})
    built = build.build_adapters(template, name, layers, addresses, sources)
    attachment = attach_lib.Attachment(
        template=template,
        name=name,
        layers=layers,
        kept=kept,
        sources=sources,
        built=built,
    )
    with attach_lib.changing(model) as change:
        attach_lib.attach(change, attachment)
