"""A bank as one TensorFlow SavedModel."""

import keras
import numpy as np

from keras_randadapt.serving import computation


def check_backend():
    """Raises `ValueError` where no SavedModel can be made."""
    if keras.config.backend() != "tensorflow":
        raise ValueError(
            "A bank is exported as a SavedModel, which takes the TensorFlow "
            f"backend. Received: backend={keras.config.backend()!r}. Adapter "
            "files of any backend load on TensorFlow."
        )


def specs_of(model):
    """dict from the name of an input to its `tf.TensorSpec`.

    Args:
        model: A model that knows its inputs.

    Raises:
        ValueError: If it does not, or if an input has no name.
    """
    import tensorflow as tf

    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"Model '{model.name}' does not tell its inputs. Export a "
            "functional or Sequential model, or one that was built by a call "
            "of a functional one."
        )
    struct = model.input if isinstance(model.input, dict) else None
    names = list(struct) if struct else [one.name for one in inputs]
    tensors = list(struct.values()) if struct else inputs
    if "adapter" in names:
        raise ValueError(
            f"Model '{model.name}' has an input called 'adapter', and so has "
            "the SavedModel of a bank. Rename it."
        )
    return {
        name: tf.TensorSpec(one.shape, one.dtype, name=name)
        for name, one in zip(names, tensors)
    }


def write(filepath, model, layout, names, table):
    """Writes the SavedModel.

    Args:
        filepath: A folder that will be made.
        model: The bank's model.
        layout: The bank's `Layout`.
        names: list of the tenants' names.
        table: float32 array `(1 + tenants, layout.size)`, whose first row is
            that of the base model.
    """
    import tensorflow as tf

    specs = specs_of(model)
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    module.table = tf.Variable(table, trainable=False, name="tenants")
    module.places = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(
            tf.constant(["", *names]),
            tf.constant(np.arange(len(names) + 1, dtype="int64")),
        ),
        default_value=-1,
    )

    @tf.function
    def serve(adapter, **inputs):
        places = module.places.lookup(adapter)
        unknown = tf.boolean_mask(adapter, places < 0)
        # The error is that of an operation, so it is raised wherever the
        # SavedModel runs.
        check = tf.debugging.Assert(
            tf.equal(tf.size(unknown), 0),
            ["There are no tenants called", unknown],
            summarize=5,
        )
        with tf.control_dependencies([check]):
            rows = tf.gather(module.table, tf.maximum(places, 0))
        given = inputs
        if not isinstance(model.input, dict):
            given = keras.tree.pack_sequence_as(
                model.input, [inputs[name] for name in specs]
            )
        found = computation.outputs(model, layout, given, rows)
        if isinstance(found, dict):
            return found
        flat = keras.tree.flatten(found)
        return {f"output_{i}": one for i, one in enumerate(flat)}

    adapter = tf.TensorSpec([None], tf.string, name="adapter")
    module.serve = serve
    tf.saved_model.save(
        module,
        filepath,
        signatures=serve.get_concrete_function(adapter=adapter, **specs),
    )
