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


def specs_of(model, signature=None):
    """dict from the name of an input to its `tf.TensorSpec`.

    Args:
        model: A model that knows its inputs.
        signature: As `input_signature` of `AdapterBank.export`.

    Raises:
        ValueError: If it does not, if an input has no name, or if the signature
            has another structure than the model's inputs.
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
    if signature is not None:
        tensors = _given(signature, struct, names, model)
    if "adapter" in names:
        raise ValueError(
            f"Model '{model.name}' has an input called 'adapter', and so has "
            "the SavedModel of a bank. Rename it."
        )
    return {
        name: tf.TensorSpec(one.shape, one.dtype, name=name)
        for name, one in zip(names, tensors)
    }


def _given(signature, struct, names, model):
    """The specs of a signature, in the order of the names of inputs."""
    # Keras's `export` takes a list of the model's arguments, so a dict of
    # inputs is the only entry of a list there.
    if struct and isinstance(signature, (list, tuple)) and len(signature) == 1:
        signature = signature[0]
    if struct:
        fits = isinstance(signature, dict) and sorted(signature) == sorted(
            names
        )
        specs = [signature[name] for name in names] if fits else []
    else:
        specs = keras.tree.flatten(signature)
        fits = len(specs) == len(names)
    if not fits or not all(
        hasattr(one, "shape") and getattr(one, "dtype", None) for one in specs
    ):
        raise ValueError(
            f"`input_signature` must have a spec with a shape and a dtype for "
            f"each input of model '{model.name}', which are {names}. Received: "
            f"input_signature={signature!r}"
        )
    return specs


def write(filepath, model, layout, names, table, specs):
    """Writes the SavedModel.

    Args:
        filepath: A folder that will be made.
        model: The bank's model.
        layout: The bank's `Layout`.
        names: list of the tenants' names.
        table: float32 array `(1 + tenants, layout.size)`, whose first row is
            that of the base model.
        specs: See `specs_of`.
    """
    import tensorflow as tf

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
