"""A text classifier on a KerasHub backbone: loading, tokenizing, predicting."""

import os

import keras
import keras_hub
import minilm
import numpy as np

DEFAULT_PRESET = "minilm"
HEAD = "logits"


def load(preset, num_classes, sequence_length, seed=0):
    """Loads a pretrained backbone and puts a new classification head on it.

    The head is a dense layer on the mean of the tokens, for every backbone.
    (KerasHub's `BertTextClassifier` puts the first token through a dense layer
    that MiniLM's embeddings do not use. It learns little from 200 examples.)

    Args:
        preset: "minilm" for the weights in a Python package, or anything that
            KerasHub's `from_preset` takes: a preset's name, a handle of a
            model hub, or a directory.
        num_classes: The number of labels.
        sequence_length: The number of tokens to which texts are cut or padded.
        seed: The seed of the head's initial weights and of dropout.

    Returns:
        A `keras.Model` from tokens to logits, its `keras_hub` backbone, and
        the `keras_hub` preprocessor that tokenizes texts.
    """
    is_minilm = preset == DEFAULT_PRESET
    source = os.fspath(minilm.locate()) if is_minilm else preset
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.Backbone.from_preset(source)
    preprocessor = _preprocessor(source, sequence_length)
    if is_minilm:
        minilm.match_original(backbone, preprocessor)
        error = minilm.check_against_reference(backbone, preprocessor)
        print(f"MiniLM agrees with the stored embeddings to {error:.0e}")

    inputs = backbone.input
    states = backbone(inputs)
    if isinstance(states, dict):
        states = states["sequence_output"]
    mean = keras.layers.GlobalAveragePooling1D(name="mean_of_tokens")(
        states, mask=inputs["padding_mask"]
    )
    mean = keras.layers.Dropout(0.1, name="head_dropout")(mean)
    logits = keras.layers.Dense(num_classes, name=HEAD)(mean)
    return keras.Model(inputs, logits), backbone, preprocessor


def _preprocessor(source, sequence_length):
    classes = (
        keras_hub.models.TextClassifierPreprocessor,
        # Decoders such as GPT-2 and Gemma have only this one.
        keras_hub.models.CausalLMPreprocessor,
    )
    for cls in classes:
        try:
            return cls.from_preset(source, sequence_length=sequence_length)
        except ValueError as error:
            # Only this error tells that a preset's family has no such class.
            if "Unable to find a subclass" not in str(error):
                raise
    raise ValueError(f"KerasHub has no preprocessor of texts for {source!r}.")


def tokenize(preprocessor, texts):
    """Turns a list of texts into the dict of arrays that the model takes."""
    if isinstance(preprocessor, keras_hub.models.CausalLMPreprocessor):
        # Calling it would shift the tokens and add targets.
        tokens = preprocessor.generate_preprocess(list(texts))
    else:
        tokens = preprocessor(list(texts))
    return {name: np.asarray(value) for name, value in tokens.items()}


def probabilities(model, tokens):
    """The model's predictions as probabilities in float64."""
    logits = np.asarray(model.predict(tokens, verbose=0), "float64")
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
