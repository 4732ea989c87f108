"""`AdapterBank.generate`: each prompt with the adapter of its tenant."""

import threading

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.serving import computation
from tests import zoo

hub = pytest.importorskip("keras_hub")

NAMES = ["alice", None, "bob", "alice"]
X = {
    "token_ids": np.array(
        [[3, 5, 0, 0, 0, 0], [3, 5, 0, 0, 0, 0], [3, 5, 7, 0, 0, 0]] * 2
    )[:4].astype("int32"),
    "padding_mask": np.array([[1, 1, 0, 0, 0, 0]] * 4).astype("bool"),
}
X["padding_mask"][2, 2] = True


def _model(sampler="greedy", preprocessor=None, size=20, dtype=None):
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=size,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=8,
        dtype=dtype,
    )
    model = hub.models.GPT2CausalLM(backbone, preprocessor)
    model.compile(sampler=sampler)
    return _lively(model)


def _lively(model):
    """Gives a model weights with which adapters change what it says."""
    zoo.set_weights(model)
    for weight in model.weights:
        if "embedding" in weight.path:
            weight.assign(zoo.normal(*weight.shape))
        elif "beta" in weight.path or "bias" in weight.path:
            weight.assign(np.zeros(weight.shape))
    return model


def _tenants(folder, model, make=lambda: kra.RLoRA(23, scaling=8.0), scale=2.0):
    """Files of two tenants and of the base; the adapted model."""
    kra.inject(model, make(), "all-linear")
    kra.save_adapter(model, folder / "none.base")
    for seed, name in enumerate(("alice", "bob")):
        zoo.randomize(model, seed=seed, scale=scale)
        kra.save_adapter(model, folder / f"{name}.safetensors")
    return model


def _alone(folder, model, x=X, names=NAMES, **arguments):
    """What each row's adapter gives by itself."""
    rows = []
    for i, name in enumerate(names):
        file = "none.base" if name is None else f"{name}.safetensors"
        kra.load_adapter(model, folder / file, "default")
        row = {key: value[i : i + 1].copy() for key, value in x.items()}
        rows.append(model.generate(row, **arguments))
    return {key: np.concatenate([r[key] for r in rows]) for key in rows[0]}


def _copy(x):
    return {key: value.copy() for key, value in x.items()}


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
def test_each_row_is_what_its_adapter_gives(tmp_path, monkeypatch):
    expected = _alone(tmp_path, _tenants(tmp_path, _model()), **EVERY_TOKEN)
    tokens = expected["token_ids"]
    # The tenants' texts differ, and so does the base model's.
    assert len({tuple(row[3:]) for row in tokens[:3]}) == 3
    with kra.serving.AdapterBank(_model(), tmp_path) as bank:
        found = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)
        np.testing.assert_array_equal(found["token_ids"], tokens)
        # Other tenants compile nothing: the step's Python does not run again.
        traces = _calls(monkeypatch, computation, "_weights")
        names = [None, "bob", None, "bob"]
        other = bank.generate(_copy(X), names, **EVERY_TOKEN)
        compiles = keras.config.backend() != "torch"
        assert len(traces) == (0 if compiles else 1)
        np.testing.assert_array_equal(other["token_ids"][0], tokens[1])
        found = bank.predict(X, NAMES)
    model = _tenants(tmp_path, _model())
    for i, name in enumerate(NAMES):
        if name is not None:
            kra.load_adapter(model, tmp_path / f"{name}.safetensors", "default")
            row = {key: value[i : i + 1] for key, value in X.items()}
            logits = keras.ops.convert_to_numpy(model(row))[0]
            scale = np.abs(logits).max()
            np.testing.assert_allclose(found[i], logits, 0, 1e-5 * scale)


def _calls(monkeypatch, module, name):
    """A list that grows with each call of a module's function."""
    calls = []
    function = getattr(module, name)

    def counting(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, counting)
    return calls


EVERY_TOKEN = {"stop_token_ids": None}


@pytest.mark.slow("loops are compiled for two precisions")
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions(precision, tmp_path):
    def model():
        if precision == "int8":
            made = _model()
            made.quantize("int8")
        else:
            made = _model(dtype=precision)
        return made

    expected = _alone(tmp_path, _tenants(tmp_path, model()), **EVERY_TOKEN)
    tokens = expected["token_ids"]
    assert len({tuple(row[3:]) for row in tokens[:3]}) == 3
    with kra.serving.AdapterBank(model(), tmp_path) as bank:
        found = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)
    np.testing.assert_array_equal(found["token_ids"], tokens)


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
@pytest.mark.one_backend
class TestGenerate:
    @pytest.fixture
    def bank(self, tmp_path):
        self.alone = _tenants(tmp_path, _model())
        with kra.serving.AdapterBank(_model(), tmp_path) as bank:
            yield bank

    def test_stop_tokens(self, bank, tmp_path):
        """A row ends at its own stop token."""
        tokens = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)["token_ids"]
        stop = (int(tokens[0, 3]),)
        arguments = {"stop_token_ids": stop}
        found = bank.generate(_copy(X), NAMES, **arguments)
        expected = _alone(tmp_path, self.alone, **arguments)
        mask = expected["padding_mask"]
        assert not mask.all()
        np.testing.assert_array_equal(found["padding_mask"], mask)
        np.testing.assert_array_equal(
            found["token_ids"][mask], expected["token_ids"][mask]
        )

    def test_beams(self, bank, tmp_path):
        """A sampler has several rows for each prompt."""
        beams = hub.samplers.BeamSampler(num_beams=3)
        bank.model.compile(sampler=beams)
        self.alone.compile(sampler=hub.samplers.BeamSampler(num_beams=3))
        found = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)
        expected = _alone(tmp_path, self.alone, **EVERY_TOKEN)
        np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])

    def test_sampler_of_a_seed(self, bank):
        """Its state moves on, as in `generate` of the model."""
        found = []
        for _ in range(2):
            sampler = hub.samplers.TopKSampler(k=5, seed=3)
            bank.model.compile(sampler=sampler)
            found += [
                bank.generate(_copy(X), NAMES, **EVERY_TOKEN)["token_ids"]
                for _ in range(2)
            ]
        np.testing.assert_array_equal(found[0], found[2])
        np.testing.assert_array_equal(found[1], found[3])
        assert np.any(found[0] != found[1])

    def test_datasets(self, bank):
        tf = pytest.importorskip("tensorflow")
        whole = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)["token_ids"]
        batches = tf.data.Dataset.from_tensor_slices(X).batch(3)
        found = bank.generate(batches, NAMES, **EVERY_TOKEN)["token_ids"]
        # Prompts are cut where the shortest of a batch ends.
        np.testing.assert_array_equal(found, whole)
        with pytest.raises(ValueError, match="5 names for 4 prompts"):
            bank.generate(batches, [*NAMES, None], **EVERY_TOKEN)
        with pytest.raises(ValueError, match="0 names for 1 examples"):
            bank.generate(batches, NAMES[:3], **EVERY_TOKEN)

    def test_threads(self, bank):
        """Requests of several threads do not meet."""
        expected = bank.generate(_copy(X), NAMES, **EVERY_TOKEN)["token_ids"]
        wrong = []

        def ask(i):
            order = np.roll(np.arange(4), i)
            for _ in range(3):
                x = {key: value[order] for key, value in X.items()}
                names = [NAMES[j] for j in order]
                found = bank.generate(x, names, **EVERY_TOKEN)["token_ids"]
                if np.any(found != expected[order]):
                    wrong.append(i)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_bad_names(self, bank):
        with pytest.raises(ValueError, match="no tenant called 'nobody'"):
            bank.generate(_copy(X), ["nobody"] * 4, **EVERY_TOKEN)
        with pytest.raises(ValueError, match="3 names for 4 examples"):
            bank.generate(_copy(X), NAMES[:3], **EVERY_TOKEN)
        with pytest.raises(TypeError, match="must be a list with a name"):
            bank.generate(_copy(X), "alice", **EVERY_TOKEN)

    def test_arguments_of_the_model(self, bank):
        with pytest.raises(TypeError, match="nonsense"):
            bank.generate(_copy(X), NAMES, nonsense=3)

    def test_models_that_do_not_generate(self, tmp_path):
        model, _, _ = zoo.dense()
        kra.inject(model, kra.LoRA(2), "site")
        kra.save_adapter(model, tmp_path / "a.safetensors")
        kra.eject(model)
        with kra.serving.AdapterBank(model, tmp_path) as bank:
            with pytest.raises(
                ValueError, match="a language model of KerasHub"
            ):
                bank.generate(["hello"], ["a"])


def _preprocessor():
    letters = "\u0120abcdefgh"
    vocabulary = {letter: i + 1 for i, letter in enumerate(letters)}
    vocabulary |= {"<|endoftext|>": 0, "\u0120a": len(vocabulary) + 1}
    tokenizer = hub.models.GPT2Tokenizer(vocabulary, merges=["\u0120 a"])
    return hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
@pytest.mark.one_backend
def test_strings(tmp_path):
    def model():
        return _model(preprocessor=_preprocessor(), size=11)

    alone = _tenants(tmp_path, model())
    prompts = ["abc", "fg", "abc", "abc"]
    arguments = {"max_length": 7, **EVERY_TOKEN}
    expected = []
    for prompt, name in zip(prompts, NAMES):
        file = "none.base" if name is None else f"{name}.safetensors"
        kra.load_adapter(alone, tmp_path / file, "default")
        expected.append(alone.generate(prompt, **arguments))
    assert len({expected[0], expected[2]}) == 2
    with kra.serving.AdapterBank(model(), tmp_path) as bank:
        assert bank.generate(prompts, NAMES, **arguments) == expected
        assert bank.generate("abc", ["bob"], **arguments) == expected[2]


@pytest.mark.cpu_seconds(12, reason="two loops are compiled")
@pytest.mark.one_backend
def test_encoders_and_decoders(tmp_path):
    """A sequence-to-sequence model: both halves have the prompt's adapter."""

    def model():
        backbone = hub.models.BartBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=12,
            max_sequence_length=8,
        )
        one = hub.models.BartSeq2SeqLM(backbone, None)
        one.compile(sampler="greedy")
        return _lively(one)

    alone = _tenants(tmp_path, model())
    x = {
        "encoder_token_ids": np.array([[2, 5, 7, 3]] * 4, "int32"),
        "encoder_padding_mask": np.ones((4, 4), "bool"),
        "decoder_token_ids": np.array([[2, 0, 0, 0, 0, 0]] * 4, "int32"),
        "decoder_padding_mask": np.array([[1, 0, 0, 0, 0, 0]] * 4, "bool"),
    }
    expected = _alone(tmp_path, alone, x, **EVERY_TOKEN)["decoder_token_ids"]
    assert len({tuple(row) for row in expected[:3]}) > 1
    with kra.serving.AdapterBank(model(), tmp_path) as bank:
        found = bank.generate(_copy(x), NAMES, **EVERY_TOKEN)
    np.testing.assert_array_equal(found["decoder_token_ids"], expected)
