"""KerasHub's files for transformers hold merged kernels, or are refused."""

import inspect

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from keras_hub.src.utils.transformers.export import hf_exporter

import keras_randadapt as kra
from keras_randadapt.sites import addresses
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend

_SIZES = dict(
    vocabulary_size=20,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
    intermediate_dim=12,
)
_GEMMA_3_AND_4 = dict(head_dim=4, image_size=16)
#: What a backbone of each family takes that KerasHub exports.
FAMILIES = {
    "Gemma": dict(head_dim=4),
    "Gemma3": _GEMMA_3_AND_4,
    "Gemma4": _GEMMA_3_AND_4,
    "GPT2": dict(num_heads=2, max_sequence_length=6),
    "Llama3": {},
    "Mistral": {},
    "Qwen": {},
    "Qwen3_5": dict(
        head_dim=4,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
    ),
}
OTHERS = [
    pytest.param(family, marks=pytest.mark.slow(reason="one of many families"))
    for family in FAMILIES
    if family != "Gemma"
]
BOTH = keras.layers.Dense, keras.layers.EinsumDense
EVERYWHERE = (*BOTH, keras.layers.Embedding, keras.layers.ReversibleEmbedding)


def _backbone(family):
    cls = getattr(keras_hub.models, f"{family}Backbone")
    taken = inspect.signature(cls.__init__).parameters
    sizes = {**_SIZES, **FAMILIES[family]}
    return cls(**{k: v for k, v in sizes.items() if k in taken})


def _causal_lm(family, backbone=None):
    task = getattr(keras_hub.models, f"{family}CausalLM")
    backbone = backbone or _backbone(family)
    return zoo.set_weights(task(backbone=backbone, preprocessor=None))


def _everywhere(layer):
    return isinstance(layer, EVERYWHERE) and layer.name != "position_embedding"


def _exported(model, folder):
    model.export_to_transformers(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def _change_by_hand(plain, adapted):
    """Adds `2 A B` to the kernels of a plain model, in float64."""
    layers = addresses.layers_by_address(plain)
    for address, adapter in adapted._randadapt.adapters("default").items():
        layer = layers[address]
        a, b = (methods.numpy(w) for w in (adapter.lora_a, adapter.lora_b))
        delta = 2.0 * a.astype("float64") @ b.astype("float64")
        variable = layer.weights[0]
        kernel = methods.numpy(variable).astype("float64")
        if hasattr(layer, "equation"):
            inputs, outputs = layer.equation.split("->")
            labels = inputs.split(",")[1]
            order = sorted(labels, key=lambda label: label in outputs)
            sizes = [kernel.shape[labels.index(label)] for label in order]
            delta = np.einsum(
                f"{''.join(order)}->{labels}", delta.reshape(sizes)
            )
        variable.assign(kernel + delta)


def _check_equal(got, expected, base):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6)
    changed = [k for k in base if not np.allclose(base[k], got[k], atol=1e-3)]
    # All that are left are norms, biases and states of linear attention.
    assert len(changed) >= len(base) // 3


class TestFamilies:
    @pytest.mark.parametrize("family", ["Gemma", *OTHERS])
    def test_merged_kernels(self, family, tmp_path):
        plain, model = _causal_lm(family), _causal_lm(family)
        base = _exported(plain, tmp_path / "base")
        kra.inject(model, kra.LoRA(2, alpha=4), _everywhere)
        zoo.randomize(model)
        _change_by_hand(plain, model)
        expected = _exported(plain, tmp_path / "plain")

        for exporting in (model, model.backbone):
            with pytest.raises(ValueError, match="'default'.* active.*merged"):
                exporting.export_to_transformers(tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        with kra.merged(model):
            found = _exported(model, tmp_path / "block")
            _check_equal(found, expected, base)
        with kra.disabled(model):
            found = _exported(model, tmp_path / "disabled")
        for key, value in base.items():
            np.testing.assert_array_equal(found[key], value)
        kra.merge(model)
        _check_equal(_exported(model, tmp_path / "merged"), expected, base)

    def test_every_family_is_here(self):
        """A family that KerasHub learns to export needs a test."""
        families = {f"{family}Backbone" for family in FAMILIES}
        assert set(hf_exporter.MODEL_EXPORTERS) <= families


class TestOtherWays:
    def test_task_around_an_adapted_backbone(self, tmp_path):
        """The model that exports knows of no adapter."""
        backbone = _backbone("Gemma")
        kra.inject(backbone, kra.RLoRA(3))
        task = _causal_lm("Gemma", backbone)
        zoo.randomize(backbone)
        with kra.disabled(backbone):
            base = _exported(task, tmp_path / "base")
        for model in (task, task.backbone):
            with pytest.raises(ValueError, match="are active"):
                model.export_to_transformers(tmp_path / "refused")
        with kra.merged(task.backbone):
            found = _exported(task, tmp_path / "merged")
        changed = [k for k in base if not np.array_equal(base[k], found[k])]
        assert sorted(key.rpartition("self_attn.")[2] for key in changed) == (
            ["q_proj.weight"] * 2 + ["v_proj.weight"] * 2
        )
        kra.eject(task.backbone)
        found = _exported(task, tmp_path / "ejected")
        for key, value in base.items():
            np.testing.assert_array_equal(found[key], value)

    def test_method_that_no_kernel_can_hold(self, tmp_path):
        model = _causal_lm("Gemma")
        kra.inject(model, kra.Bottleneck(2))
        with pytest.raises(ValueError, match="are active"):
            model.export_to_transformers(tmp_path)
        with pytest.raises(ValueError, match="can't be merged"):
            with kra.merged(model):
                model.export_to_transformers(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_integers_without_scales(self, tmp_path):
        model = _causal_lm("Gemma")
        model.quantize("int8")
        kra.inject(model, kra.LoRA(2))
        for block in (kra.merged, kra.disabled):
            with pytest.raises(ValueError, match="kernels in .*'int8'.*float"):
                with block(model):
                    model.export_to_transformers(tmp_path)
        assert not list(tmp_path.iterdir())
