"""A language model of KerasHub with its tokens: loading, training, texts.

The model works on tokens and has no preprocessor, so `fit`, `predict` and
`generate` take arrays that this module makes. The end of a text is a token
too, which the model learns to write.
"""

import dataclasses
import typing

import keras
import keras_hub
import numpy as np
import smollm2
import token_rows

DEFAULT_PRESET = "smollm2"
EVALUATION_BATCH = 8


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model and its tokenizer.

    Attributes:
        model: The `keras_hub.models.CausalLM`.
        encode: Function from a string to a list of token ids.
        decode: Function from a list of token ids to a string.
        start: The list of token ids that a text begins with.
        end: The token id that ends a text.
    """

    model: typing.Any
    encode: typing.Callable
    decode: typing.Callable
    start: list
    end: int

    def examples(self, prompts, texts, length):
        """Makes inputs, targets and weights of prompts and what follows.

        Args:
            prompts: A list of strings.
            texts: A list of strings, one for each prompt.
            length: The number of tokens of the arrays.

        Returns:
            A tuple as `token_rows.completions` gives it.

        Raises:
            ValueError: If a text is too long.
        """
        rows, starts = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            row = self.start + self.encode(f"{prompt} {text}") + [self.end]
            rows.append(row)
            starts.append(_common(row, self.prompt_ids(prompt)))
        return token_rows.completions(rows, starts, length)

    def prompt_ids(self, prompt):
        """The tokens of a prompt, a list."""
        return self.start + self.encode(prompt)

    def fits(self, prompt, text, length):
        """Whether a prompt and its text have at most `length` tokens."""
        whole = self.encode(f"{prompt} {text}")
        # The end token is predicted, and never an input.
        return len(self.start) + len(whole) <= length

    def nats(self, x, y, weight):
        """The mean negative log likelihood of the weighted tokens, in nats.

        Args:
            x: Inputs.
            y: The next tokens.
            weight: Their weights.

        Returns:
            A float.
        """
        return self.log_likelihoods(x, y, weight).sum() / -weight.sum()

    def log_likelihoods(self, x, y, weight):
        """The log likelihood of each text, in nats.

        Args:
            x: Inputs.
            y: The next tokens.
            weight: Their weights.

        Returns:
            A float64 array of shape `(texts,)`.
        """
        result = []
        for start in range(0, len(y), EVALUATION_BATCH):
            part = [
                _filled(one, start, EVALUATION_BATCH)
                for one in (x["token_ids"], x["padding_mask"], y, weight)
            ]
            logits = self.model.predict_on_batch(
                {"token_ids": part[0], "padding_mask": part[1]}
            )
            logits = np.asarray(logits, "float32")
            largest = logits.max(axis=-1, keepdims=True)
            shifted = logits - largest
            total = np.log(np.exp(shifted).sum(axis=-1))
            chosen = np.take_along_axis(shifted, part[2][..., None], axis=-1)
            result.append((chosen[..., 0] - total).astype("float64") * part[3])
        return np.concatenate(result).sum(axis=1)[: len(y)]

    def generate(self, prompts, length, batch_size=16):
        """Writes on after prompts, always with the likeliest token.

        Args:
            prompts: A list of strings.
            length: The number of tokens of prompt and text together.
            batch_size: The number of prompts at a time.

        Returns:
            A list of strings: the texts without the prompts.

        Raises:
            ValueError: If a prompt is too long.
        """
        rows = self.generated_ids(prompts, length, batch_size)
        return [self.decode(row).strip() for row in rows]

    def generated_ids(self, prompts, length, batch_size=16):
        """The tokens that `generate` writes, without the end token.

        Args:
            prompts: A list of strings.
            length: The number of tokens of prompt and text together.
            batch_size: The number of prompts at a time.

        Returns:
            A list of lists of integers.

        Raises:
            ValueError: If a prompt is too long.
        """
        result = []
        size = min(batch_size, len(prompts))
        for start in range(0, len(prompts), size):
            rows = [self.prompt_ids(one) for one in prompts[start:][:size]]
            # All batches have one shape, so `generate` is compiled once.
            filled = rows + rows[-1:] * (size - len(rows))
            # KerasHub stops at an end token, also at one that fills up.
            ids, mask = token_rows.pad(filled, length, int(self.end == 0))
            written = self.model.generate(
                {"token_ids": ids, "padding_mask": mask},
                stop_token_ids=(self.end,),
            )
            written = keras.ops.convert_to_numpy(written["token_ids"]).tolist()
            for row, prompt in zip(written, rows):
                text = row[len(prompt) :] + [self.end]
                result.append(text[: text.index(self.end)])
        return result


def load(preset=DEFAULT_PRESET, dtype=None, quantize=None):
    """Loads a language model.

    Args:
        preset: "smollm2" for the weights in a Python package, or what
            KerasHub's `from_preset` takes: the name of a preset such as
            "gemma3_1b", a handle of a model hub, or a directory.
        dtype: Optional dtype of the weights, such as "bfloat16".
        quantize: Optional "int8" or "int4".

    Returns:
        A `LanguageModel`, which generates greedily.

    Raises:
        FileNotFoundError: If the package of SmolLM2 is not installed.
    """
    options = {"dtype": dtype} if dtype else {}
    if preset == DEFAULT_PRESET:
        model = smollm2.load(**options)
        tokenizer = smollm2.tokenizer()
        parts = {
            "encode": lambda text: tokenizer.encode(text).ids,
            "decode": tokenizer.decode,
            "start": [],
            "end": tokenizer.token_to_id(smollm2.END),
        }
    else:
        model = keras_hub.models.CausalLM.from_preset(
            preset, preprocessor=None, **options
        )
        tokenizer = keras_hub.models.Tokenizer.from_preset(preset)
        first = getattr(tokenizer, "start_token_id", None)
        parts = {
            "encode": lambda text: np.asarray(tokenizer(text)).tolist(),
            "decode": tokenizer.detokenize,
            "start": [] if first is None else [first],
            "end": tokenizer.end_token_id,
        }
    if quantize:
        model.quantize(quantize)
    model.compile(sampler="greedy")
    return LanguageModel(model=model, **parts)


def loss():
    """The mean over weighted tokens, whatever the lengths of texts."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def _common(first, second):
    """The length of the common start of two lists."""
    for i, pair in enumerate(zip(first, second)):
        if pair[0] != pair[1]:
            return i
    return min(len(first), len(second))


def _filled(array, start, size):
    """Rows of an array, up to `size` of them by repeating the last one."""
    part = array[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
