"""IA3 against the paper's formulas, in float64."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import supported
from tests import methods
from tests import zoo

# In float32; in 16 bits the layer's own product is rounded.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 2e-2}


def _model(policy, feedforward, layer):
    """A model of one layer with IA3, and `l`, away from ones."""
    shape = (7, 6, 4) if isinstance(layer, keras.layers.Conv2D) else (5, 4)
    inputs = keras.Input(shape)
    model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
    kra.inject(model, kra.IA3(feedforward=feedforward), targets="site")
    (adapter,) = model._randadapt.adapters("default").values()
    scale = methods.randomize(adapter)["ia3_l"]
    return model, zoo.normal(3, *shape), scale


def _dense_reference(x, kernel, bias, scale, scales_input):
    # Section 3.3: l * (x W + b) for keys and values; before the last product
    # of the feed-forward network for its hidden features.
    if scales_input:
        return (x * scale) @ kernel + bias
    return scale * (x @ kernel + bias)


@pytest.mark.parametrize("scales_input", [False, True])
def test_dense(scales_input):
    layer = keras.layers.Dense(6, name="site")
    feedforward = ["site"] if scales_input else []
    model, x, scale = _model("float32", feedforward, layer)
    assert scale.shape == ((4,) if scales_input else (6,))
    kernel = methods.numpy(layer._kernel).astype("float64")
    bias = methods.numpy(supported.bias_variable(layer)).astype("float64")
    expected = _dense_reference(x, kernel, bias, scale, scales_input)
    methods.close(model(x), expected)
    kra.merge(model)
    methods.close(model(x), expected)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("scales_input", [False, True])
def test_convolution(policy, scales_input):
    """A value a filter, or one a channel, at every position of the window."""
    layer = keras.layers.Conv2D(6, (3, 2), name="site", dtype=policy)
    model, x, scale = _model(policy, ["site"] if scales_input else [], layer)
    kernel = methods.numpy(layer._kernel).astype("float64")
    bias = methods.numpy(supported.bias_variable(layer)).astype("float64")
    rows, columns = x.shape[1] - 2, x.shape[2] - 1
    windows = np.stack(
        [
            x[:, i : i + rows, j : j + columns]
            for i in range(3)
            for j in range(2)
        ],
        axis=3,
    ).astype("float64")
    if scales_input:
        windows = windows * scale
    expected = np.einsum("brcwi,wio->brco", windows, kernel.reshape(6, 4, 6))
    expected = expected + bias if scales_input else scale * (expected + bias)
    tolerance = TOLERANCE[policy]
    y = methods.numpy(keras.ops.cast(model(x), "float32"))
    methods.close(y, expected, tolerance)
    kra.merge(model)
    y = methods.numpy(keras.ops.cast(model(x), "float32"))
    methods.close(y, expected, tolerance)


@pytest.mark.one_backend
def test_default_targets_are_keys_values_and_feed_forward_outputs(tmp_path):
    model, x, _ = zoo.bert()
    kra.inject(model, kra.IA3())
    found = model._randadapt.adapters("default")
    assert len(found) == 6
    sizes = {a.site.role: tuple(a.ia3_l.shape) for a in found.values()}
    assert sizes == {
        "key_dense": (8,),
        "value_dense": (8,),
        # The hidden features of the feed-forward network.
        "_feedforward_output_dense": (12,),
    }
    zoo.fit(model, x)
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    kra.save_adapter(model, tmp_path / "ia3.safetensors")
    other, _, _ = zoo.bert()
    kra.load_adapter(other, tmp_path / "ia3.safetensors")
    np.testing.assert_array_equal(zoo.outputs(other, x), out)


@pytest.mark.one_backend
def test_file_of_a_backbone_loads_into_its_task(tmp_path):
    backbone, _, _ = zoo.bert()
    kra.inject(backbone, kra.IA3())
    zoo.randomize(backbone)
    kra.save_adapter(backbone, tmp_path / "ia3.safetensors")
    task, x, _ = zoo.bert_classifier()
    kra.load_adapter(task, tmp_path / "ia3.safetensors")
    assert task._randadapt.records["default"].template.feedforward == [
        a for a in kra.sites(task) if a.endswith("_feedforward_output_dense")
    ]
    np.testing.assert_allclose(
        zoo.outputs(task.backbone, x), zoo.outputs(backbone, x), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("feedforward", "error", "match"),
    [
        (3, TypeError, "must be a name, a list of names or `None`"),
        (["site", 3], TypeError, "must be a name, a list of names or `None`"),
        (["no_such_layer"], ValueError, "`feedforward` matches no layer"),
        (["other"], ValueError, "names no layer that `targets` means"),
    ],
)
def test_bad_feedforward(feedforward, error, match):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, name="other"),
            keras.layers.Dense(6, name="site"),
        ]
    )
    with pytest.raises(error, match=match):
        kra.inject(model, kra.IA3(feedforward=feedforward), targets="site")
    assert kra.sites(model) == {}
