"""Computes the reference with which `minilm.check_against_reference` compares.

The reference is a BERT encoder in NumPy and float64, with the weights of the
file. It uses no Keras, no KerasHub and no deep-learning framework, and the
tokens come from another tokenizer than KerasHub's. Run it to write the file
again:

    python examples/minilm_reference.py
"""

import json
import math

import minilm
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

SENTENCES = [
    "A gorgeous, witty, seductive movie.",
    "The plot is nothing but boilerplate clichés from start to finish.",
]

erf = np.vectorize(math.erf)


def gelu(x):
    """The exact GELU: `x` times the normal distribution function of `x`."""
    return x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)))


def softmax(x):
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


class Encoder:
    """The encoder of one sentence without padding.

    Args:
        weights: A dict of arrays under Hugging Face's names of BERT's weights.
        config: The model's configuration, a dict.
    """

    def __init__(self, weights, config):
        self.weights = {k: v.astype("float64") for k, v in weights.items()}
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]

    def dense(self, name, x):
        return (
            x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        )

    def layer_norm(self, name, x):
        centered = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centered**2, axis=-1, keepdims=True)
        normalized = centered / np.sqrt(variance + self.epsilon)
        return (
            normalized * self.weights[f"{name}.weight"]
            + self.weights[f"{name}.bias"]
        )

    def attention(self, name, x):
        def heads(projection):
            y = self.dense(f"{name}.self.{projection}", x)
            return y.reshape(len(x), self.num_heads, -1).swapaxes(0, 1)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1])
        mixed = (softmax(scores) @ value).swapaxes(0, 1).reshape(x.shape)
        return self.dense(f"{name}.output.dense", mixed)

    def embedding(self, token_ids):
        tables = [
            self.weights[f"embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position", "token_type")
        ]
        words, positions, segments = tables
        x = words[token_ids] + positions[: len(token_ids)] + segments[0]
        x = self.layer_norm("embeddings.LayerNorm", x)
        for i in range(self.num_layers):
            layer = f"encoder.layer.{i}"
            x = self.layer_norm(
                f"{layer}.attention.output.LayerNorm",
                x + self.attention(f"{layer}.attention", x),
            )
            hidden = gelu(self.dense(f"{layer}.intermediate.dense", x))
            x = self.layer_norm(
                f"{layer}.output.LayerNorm",
                x + self.dense(f"{layer}.output.dense", hidden),
            )
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)


def load(directory):
    """Reads the model's files and returns an `Encoder` and its tokenizer."""
    config = json.loads((directory / "config.json").read_text())
    encoder = Encoder(load_file(directory / "model.safetensors"), config)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    return encoder, tokenizer


def main():
    encoder, tokenizer = load(minilm.locate())
    token_ids = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    embeddings = [encoder.embedding(ids) for ids in token_ids]
    content = {
        "sentences": SENTENCES,
        "token_ids": token_ids,
        "embeddings": [np.round(e, 8).tolist() for e in embeddings],
    }
    minilm.REFERENCE_FILE.parent.mkdir(exist_ok=True)
    minilm.REFERENCE_FILE.write_text(
        json.dumps(content) + "\n", encoding="utf-8"
    )
    print(f"Wrote {minilm.REFERENCE_FILE}")


if __name__ == "__main__":
    main()
