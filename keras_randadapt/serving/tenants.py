"""Which adapter files may share a bank, and a tenant's row of one."""

import math

import keras
import numpy as np

from keras_randadapt.adapters import configs
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import fingerprint
from keras_randadapt.serving import layout as layout_lib
from keras_randadapt.sites import supported

#: The lowest finite number of each dtype, which absent classes get as logits.
_LOWEST = {
    "float32": float(np.finfo("float32").min),
    "float64": float(np.finfo("float32").min),
    "float16": float(np.finfo("float16").min),
    "bfloat16": -3.3895313892515355e38,
}

# What may differ in the metadata of two tenants of a bank.
_OWN = (
    "name",
    "digest",
    "preset",
    "adapter",
    "precisions",
    "version",
    "weight",
)


class File:
    """An adapter file that was read, with a head of as many classes as asked.

    Attributes:
        path: The file's path.
        tensors: Its tensors, those of a smaller head filled up.
        metadata: Its metadata.
        classes: int, the classes of its own head, or `None` without one.

    Raises:
        ValueError: If a bank can't have it.
    """

    def __init__(self, path, tensors, metadata):
        self.path = path
        self.tensors, self.metadata = tensors, metadata
        if self.metadata.get("moved"):
            raise ValueError(
                f"'{path}' holds state of the base model that training moved "
                f"({self.metadata['moved'][:3]}), and examples of one batch "
                "can't have states of their own."
            )
        if self.metadata.get("weight", 1) != 1:
            raise ValueError(
                f"'{path}' has the weight {self.metadata['weight']:g}. Save it "
                "with the weight 1, or make it a LoRA by `to_lora` first."
            )
        self.classes = None

    def fill_up(self, address, layer):
        """Gives the head at an address the model's number of classes.

        Args:
            address: The address of a Dense layer, the last of the model.
            layer: The layer.
        """
        kernel = self.tensors.get(f"{address}#0")
        bias = self.tensors.get(f"{address}#1")
        if kernel is None or kernel.ndim != 2:
            return
        self.classes = kernel.shape[1]
        missing = layer.units - self.classes
        if missing <= 0:
            return
        check_can_be_smaller(self.path, address, layer, self.classes)
        self.tensors[f"{address}#0"] = np.pad(kernel, ((0, 0), (0, missing)))
        # A file without a bias would have been refused.
        self.tensors[f"{address}#1"] = np.pad(
            bias, (0, missing), constant_values=lowest(layer)
        )


def check_can_be_smaller(path, address, layer, classes):
    """Raises `ValueError` if the head of a file can't have fewer classes.

    Args:
        path: The file.
        address: The address of the head.
        layer: The model's.
        classes: int, the classes of the file's.
    """
    activation = keras.activations.serialize(layer.activation)
    if classes < layer.units and (layer.bias is None or activation != "linear"):
        raise ValueError(
            f"'{path}' has a head of {classes} classes at '{address}', and "
            f"the model's has {layer.units}. Classes can be left out only of "
            "a Dense layer with a bias and without an activation."
        )


def lowest(layer):
    """The logit of absent classes."""
    return _LOWEST[keras.backend.standardize_dtype(layer.compute_dtype)]


def read(path):
    """The `File` of an adapter file."""
    tensors, metadata = file_reading.read(path)
    file_reading.check_finite(path, tensors)
    return File(path, tensors, metadata)


def last_dense(model, addresses, layers):
    """The address of the Dense layer that gives the model's outputs."""
    # The addresses are those of a file, which may be of another model.
    dense = [a for a in addresses if type(layers.get(a)) is keras.layers.Dense]
    outputs = getattr(model, "outputs", None) or []
    for address in dense:
        node = getattr(outputs[0], "_keras_history", None) if outputs else None
        if node is not None and node.operation is layers[address]:
            return address
    return dense[-1] if dense and not outputs else None


# The methods that a site of a kind needs one of.
_NEEDED = {
    "product": ("delta_per_example", "adapt_per_example"),
    "lookup": ("lookup_per_example",),
    "norm": ("bias_per_example",),
}


def check_method(path, template, layers, addresses, kept):
    """Raises `ValueError` if a file's adapter can't be one of a batch."""
    if not any(
        getattr(template, name, None) is not None for name in _NEEDED["product"]
    ):
        raise ValueError(
            f"'{path}' has a `{type(template).__name__}`, which can't have "
            "weights of each example's own. `to_lora` makes it one that can, "
            "if it is additive."
        )
    for address in addresses:
        if not _can_be_site(layers[address], template):
            raise ValueError(
                f"'{path}' adapts '{address}', a "
                f"{type(layers[address]).__name__}, with a "
                f"`{type(template).__name__}`. In a bank that must be a Dense "
                "layer, an EinsumDense layer that is a matrix product, an "
                "embedding, or, for `BitFit`, a normalization."
            )
    for address in kept:
        if not _is_product(layers[address]):
            raise ValueError(
                f"'{path}' keeps '{address}', a "
                f"{type(layers[address]).__name__}. In a bank that must be a "
                "Dense layer, or an EinsumDense layer that is a matrix product."
            )


def _is_product(layer):
    known = supported.supported_class(layer, ("product",))
    return known is not None and supported.is_matrix_product(layer)


def _can_be_site(layer, template):
    known = supported.supported_class(layer, tuple(_NEEDED))
    if known is None:
        return False
    kind = supported.kind_of(layer)
    if kind == "product" and not supported.is_matrix_product(layer):
        return False
    needed = _NEEDED[kind]
    if getattr(layer, "tie_weights", False):
        needed = ("delta_transpose_per_example",)
    return any(getattr(template, name, None) is not None for name in needed)


def check_alike(first, other):
    """Raises `ValueError` if a file can't share a bank with the first one.

    Args:
        first: The `File` of the bank's first tenant.
        other: Another `File`.
    """
    _check_configs(
        other.path,
        configs.deserialize(other.metadata["adapter"]),
        configs.deserialize(first.metadata["adapter"]),
    )
    for key in sorted(first.metadata.keys() | other.metadata.keys()):
        ours, theirs = first.metadata.get(key), other.metadata.get(key)
        if key in _OWN or ours == theirs:
            continue
        raise ValueError(
            f"'{other.path}' and '{first.path}' can't share a bank: their "
            f"'{key}' differs, {_short(theirs)} and {_short(ours)}."
        )
    ours = sorted(file_format.site_keys(first.tensors))
    if ours != sorted(file_format.site_keys(other.tensors)):
        raise ValueError(
            f"'{other.path}' and '{first.path}' can't share a bank: they adapt "
            "other sites."
        )


def _short(value):
    text = repr(value)
    return text if len(text) < 120 else f"{text[:120]}..."


def check_base(file, first):
    """Raises `ValueError` if two files were trained on other base weights."""
    ours = first.tensors.get(file_format.BASE_KEY)
    theirs = file.tensors.get(file_format.BASE_KEY)
    if ours is None or theirs is None:
        return
    names = (
        [n for n, c in f.metadata["precisions"] for _ in range(c)]
        for f in (first, file)
    )
    wrong = fingerprint.differing(ours, theirs, list(zip(*names)))
    if wrong:
        raise ValueError(
            f"'{file.path}' and '{first.path}' were trained on other base "
            f"weights: {len(wrong)} of their kernels differ."
        )


def values(file, built, layers, kept):
    """The weights of a tenant by key and name; see `Layout.row`.

    Args:
        file: A `File`.
        built: dict from address to the bank's built adapter.
        layers: dict from address to layer.
        kept: Addresses of the heads.
    """
    found = {}
    for address, adapter in built.items():
        arrays = _arrays(file, address, adapter)
        for weight in adapter.stored_weights():
            key = (address, layout_lib.ADAPTER), weight.name
            if arrays[weight.name].shape != tuple(weight.shape):
                raise ValueError(
                    f"'{file.path}' holds weights of another shape at "
                    f"'{address}'."
                )
            found[key] = arrays[weight.name]
    for address in kept:
        key = address, layout_lib.HEADS
        layer = layers[address]
        kernel = file.tensors.get(f"{address}#0")
        if kernel is None or kernel.shape != tuple(layer.kernel.shape):
            raise ValueError(
                f"'{file.path}' holds a head of another shape at '{address}': "
                f"{None if kernel is None else kernel.shape}, and the model's "
                f"is {tuple(layer.kernel.shape)}."
            )
        found[key, "kernel"] = np.asarray(supported.as_view(layer, kernel))
        if layer.bias is not None:
            found[key, "bias"] = file.tensors[f"{address}#1"]
    return found


def _arrays(file, address, adapter):
    """The weights at a site by name, in the shapes that the file has."""
    flat = file.tensors[address]
    weights = adapter.stored_weights()
    shapes = [tuple(weight.shape) for weight in weights]
    if sum(map(math.prod, shapes)) != flat.size:
        raise ValueError(
            f"'{file.path}' holds {flat.size} values for '{address}', where "
            f"the bank's adapters have {sum(map(math.prod, shapes))}."
        )
    arrays = {}
    for weight, shape in zip(weights, shapes):
        n = math.prod(shape)
        arrays[weight.name], flat = flat[:n].reshape(shape), flat[n:]
    return arrays


def _only_trains(key):
    """Whether an argument of adapters matters in training alone."""
    return key.endswith("_initializer") or key in (
        "dropout",
        "dtype",
        "regularizer",
        "precondition",
        "d_initial",
    )


def _check_configs(path, own, template):
    """Raises `ValueError` unless adapters are alike.

    Args:
        path: The file's path.
        own: The file's template.
        template: The bank's.
    """
    ours, theirs = template.get_config(), own.get_config()
    keys = sorted(ours.keys() | theirs.keys())
    differing = [
        key
        for key in keys
        if ours.get(key) != theirs.get(key) and not _only_trains(key)
    ]
    if type(own) is type(template) and not differing:
        return
    raise ValueError(
        f"'{path}' can't share this bank: it has a {type(own).__name__}, and "
        f"the bank a {type(template).__name__}"
        + "".join(
            f", {key}={theirs.get(key)!r} and {ours.get(key)!r}"
            for key in differing
        )
        + "."
    )
