"""Direct preference optimization (DPO) of a language model with an adapter.

The policy is the adapted model. Its reference is the base model, which is the
same model with its adapters disabled, so no second model is held in memory.
"""

import keras
import numpy as np
from keras import ops

import keras_randadapt as kra


class DPO(keras.Model):
    """Trains a language model to prefer one of two texts.

    The inputs are pairs: arrays of shape `(pairs, 2, length)`, where the first
    of two texts is the better one. The output is the log likelihood of each
    text, of shape `(pairs, 2)`. The loss of a pair is

        -log sigmoid(strength * (margin - reference margin))

    where a margin is the difference of the two log likelihoods, and the
    reference margin is that of the base model. The margin alone also grows
    where both texts get less likely, so `anchor` times the better text's nats a
    token is added.
    `compute_loss` is the whole method, and `fit` works as ever. Compile without
    a loss.

    Args:
        lm: A `keras_hub.models.CausalLM` with an adapter, which is trained.
        strength: The method's beta. A larger one keeps the model closer to
            its base.
        anchor: The weight of the better text's nats a token. The method of
            the first paper has 0, and that of the second one has 1.

    References:
        - Rafailov et al., "Direct Preference Optimization: Your Language
          Model is Secretly a Reward Model", NeurIPS 2023, equation 7.
        - Pang et al., "Iterative Reasoning Preference Optimization", NeurIPS
          2024, equation 1, for the anchor.
    """

    def __init__(self, lm, strength=0.1, anchor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.lm = lm
        self.strength = strength
        self.anchor = anchor
        self.preferred = keras.metrics.Mean(name="preferred")

    def build(self, input_shape):
        # The language model is built, and there is nothing else.
        self.built = True

    def call(self, x, training=None):
        length = ops.shape(x["token_ids"])[2]
        flat = {
            name: ops.reshape(value, (-1, length)) for name, value in x.items()
        }
        logits = self.lm(
            {name: flat[name] for name in ("token_ids", "padding_mask")},
            training=training,
        )
        nats = keras.losses.sparse_categorical_crossentropy(
            flat["targets"], ops.cast(logits, "float32"), from_logits=True
        )
        likelihood = -ops.sum(nats * flat["weights"], axis=-1)
        return ops.reshape(likelihood, (-1, 2))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        # Methods with a penalty have it here. Another call would replace it.
        penalties = list(self.losses)
        with kra.disabled(self.lm):
            reference = ops.stop_gradient(self(x, training=False))
        gain = y_pred - reference
        margin = gain[:, 0] - gain[:, 1]
        self.preferred.update_state(margin > 0)
        nats = -y_pred[:, 0] / ops.sum(x["weights"][:, 0], axis=-1)
        loss = ops.softplus(-self.strength * margin) + self.anchor * nats
        return sum(penalties, ops.mean(loss))


def pairs(lm, prompts, better, worse, length):
    """Makes the inputs of `DPO`.

    Args:
        lm: A `language_model.LanguageModel`.
        prompts: A list of strings.
        better: A list of strings, the text to prefer for each prompt.
        worse: A list of strings.
        length: The number of tokens of the arrays.

    Returns:
        A dict of arrays of shape `(prompts, 2, length)`.

    Raises:
        ValueError: If a text is too long.
    """
    sides = []
    for texts in (better, worse):
        x, targets, weights = lm.examples(prompts, texts, length)
        sides.append({**x, "targets": targets, "weights": weights})
    return {
        name: np.stack([side[name] for side in sides], axis=1)
        for name in sides[0]
    }
