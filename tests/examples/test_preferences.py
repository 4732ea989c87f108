"""DPO in a training step, with the base model as its reference."""

import keras
import language_model
import numpy as np
import preferences
import pytest

import keras_randadapt as kra

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def model():
    keras_hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(LETTERS) + 1,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        tie_word_embeddings=True,
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


@pytest.fixture
def lm(model):
    """The model with letters as tokens, after which it is as it was."""
    yield language_model.LanguageModel(
        model,
        encode=lambda text: [
            LETTERS.index(one) + 1 for one in text if one > " "
        ],
        decode=lambda ids: "".join(LETTERS[i - 1] for i in ids),
        start=[],
        end=0,
    )
    if kra.sites(model):
        kra.eject(model)


PROMPTS = ["ab", "cd", "e", "fg"]
#: The better text ends with an "h".
BETTER = ["ch", "ah", "bch", "h"]
WORSE = ["ca", "ad", "bcd", "eee"]


def likelihoods(lm, texts):
    return lm.log_likelihoods(*lm.examples(PROMPTS, texts, 6))


@pytest.mark.one_backend
def test_output_is_the_likelihood_of_each_text(lm):
    x = preferences.pairs(lm, PROMPTS, BETTER, WORSE, 6)
    assert {value.shape for value in x.values()} == {(4, 2, 6)}
    found = preferences.DPO(lm.model).predict(x, verbose=0)
    for i, texts in enumerate([BETTER, WORSE]):
        np.testing.assert_allclose(
            found[:, i], likelihoods(lm, texts), rtol=1e-4
        )


@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_loss_is_that_of_the_papers(lm, anchor):
    base = likelihoods(lm, BETTER) - likelihoods(lm, WORSE)
    kra.inject(lm.model, kra.LoRA(2, seed=0))
    generator = np.random.default_rng(0)
    for one in lm.model.trainable_variables:
        one.assign(generator.normal(size=one.shape, scale=0.5))
    margin = likelihoods(lm, BETTER) - likelihoods(lm, WORSE) - base
    assert np.abs(margin).max() > 0.1
    dpo = preferences.DPO(lm.model, strength=0.7, anchor=anchor)
    dpo.compile(keras.optimizers.SGD(0.0))
    x = preferences.pairs(lm, PROMPTS, BETTER, WORSE, 6)
    expected = np.mean(np.log1p(np.exp(-0.7 * margin)))
    # The better texts have 3, 3, 4 and 2 tokens, the end among them.
    expected -= anchor * np.mean(likelihoods(lm, BETTER) / [3, 3, 4, 2])
    history = dpo.fit(x, batch_size=4, verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-4)
    assert history["preferred"][0] == pytest.approx(np.mean(margin > 0))


def test_fit_trains_the_adapter_towards_the_better_texts(lm):
    before = likelihoods(lm, BETTER) - likelihoods(lm, WORSE)
    weights = lm.model.get_weights()
    kra.inject(lm.model, kra.RLoRA(16, seed=0))
    dpo = preferences.DPO(lm.model, strength=2.0, anchor=0.0)
    assert len(dpo.trainable_variables) == 4
    dpo.compile(keras.optimizers.AdamW(0.2))
    x = preferences.pairs(lm, PROMPTS, BETTER, WORSE, 6)
    losses = dpo.fit(x, batch_size=2, epochs=10, verbose=0).history["loss"]
    # The policy is its reference at first, also within the first epoch's mean.
    assert losses[0] == pytest.approx(np.log(2), rel=0.2)
    assert losses[-1] < 0.85 * np.log(2)
    after = likelihoods(lm, BETTER) - likelihoods(lm, WORSE)
    assert np.all(after > before)
    with kra.disabled(lm.model):
        np.testing.assert_allclose(
            likelihoods(lm, BETTER) - likelihoods(lm, WORSE), before, rtol=1e-5
        )
    kra.eject(lm.model)
    for one, other in zip(lm.model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
