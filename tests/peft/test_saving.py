"""Directories of PEFT that are written, read back without PEFT."""

import json
import os

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from keras_randadapt.model import state as state_lib
from tests.peft import families
from tests.peft import hub

pytestmark = pytest.mark.one_backend

_SMALL = pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)


def _adapted(adapter, targets=("query", "value"), model=None, **kwargs):
    model = hub.llama() if model is None else model
    kra.inject(model, adapter, targets=list(targets), **kwargs)
    families.train(model)
    return model


def _read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return config, tensors


def _outputs(model):
    return families.keras_outputs(model, families.inputs(model))


@pytest.mark.every_backend
def test_there_and_back(tmp_path):
    """The adapter that is read computes what the written one did."""
    model = _adapted(kra.LoRA(3, alpha=6))
    trained = _outputs(model)
    kra.peft.save(model, tmp_path / "a", base_model="org/base")
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a", name="back")
    assert report.name == "back" and report.method == "LoRA"
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


def test_the_canonical_form(tmp_path):
    """No reader can scale it in another way than the next."""
    model = _adapted(kra.LoRA(3, alpha=12, site_ranks={"value": 2}))
    layers = state_lib.layers_of(model)
    adapters = model._randadapt.adapters("default")
    address = next(
        a
        for a in adapters
        if a.endswith("decoder/_self_attention_layer/_value_dense")
    )
    delta = keras.ops.convert_to_numpy(adapters[address].delta_kernel())
    assert layers[address] is not None
    kra.peft.save(model, tmp_path / "a", base_model="org/base")
    config, tensors = _read(tmp_path / "a")
    assert config["r"] == config["lora_alpha"] == 3
    assert config["use_rslora"] is False and config["bias"] == "none"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["modules_to_save"] is None
    assert "rank_pattern" not in config and "alpha_pattern" not in config
    assert len(tensors) == 8 and len(config["target_modules"]) == 4
    key = "base_model.model.model.layers.0.self_attn.v_proj"
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    assert a.shape == (3, 24) and b.shape == (12, 3)
    assert not a[2].any() and not b[:, 2].any()
    np.testing.assert_allclose((b @ a).T, delta, atol=1e-6)


def test_an_untrained_first_factor_is_kept(tmp_path):
    model = hub.llama()
    kra.inject(model, kra.LoRA(2), targets=["query"])
    kra.peft.save(model, tmp_path / "a")
    _, tensors = _read(tmp_path / "a")
    for key, array in tensors.items():
        assert array.any() == key.endswith("lora_A.weight")
    kra.eject(model)
    kra.peft.load(model, tmp_path / "a")
    first = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    adapters = model._randadapt.adapters("default").values()
    for i, adapter in enumerate(adapters):
        a, b = map(keras.ops.convert_to_numpy, (adapter.lora_a, adapter.lora_b))
        np.testing.assert_array_equal(a.T, tensors[first.format(i)])
        assert not b.any()


def test_the_base_class_has_no_prefix(tmp_path):
    model = _adapted(kra.LoRA(2))
    kra.peft.save(model, tmp_path / "a", base=True)
    config, tensors = _read(tmp_path / "a")
    assert "layers.0.self_attn.q_proj" in config["target_modules"]
    assert all(k.startswith("base_model.model.layers.") for k in tensors)
    trained = _outputs(model)
    kra.eject(model)
    kra.peft.load(model, tmp_path / "a")
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


@_SMALL
@pytest.mark.parametrize(
    "adapter",
    [
        lambda: kra.RandLoRA(6),
        lambda: kra.VeRA(8),
        lambda: kra.AdaLoRA(3),
        lambda: kra.LoRA(2, initialization="pissa"),
        lambda: kra.DoRA(kra.VeRA(8)),
        lambda: kra.NOLA(2),
    ],
)
def test_other_methods_go_out_as_lora(adapter, tmp_path):
    model = _adapted(adapter())
    trained = _outputs(model)
    kra.peft.save(model, tmp_path / "a")
    config, _ = _read(tmp_path / "a")
    assert config["peft_type"] == "LORA"
    kra.eject(model)
    kra.peft.load(model, tmp_path / "a")
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-4)


@_SMALL
def test_rank_and_energy(tmp_path):
    model = _adapted(kra.RandLoRA(6))
    kra.peft.save(model, tmp_path / "rank", rank=2)
    assert _read(tmp_path / "rank")[0]["r"] == 2
    kra.peft.save(model, tmp_path / "energy", energy=0.5)
    config, tensors = _read(tmp_path / "energy")
    assert 1 < config["r"] < 12
    text = (tmp_path / "energy" / "README.md").read_text()
    assert "energy lost at a site" in text
    with pytest.raises(ValueError, match="both choose the ranks"):
        kra.peft.save(model, tmp_path / "x", rank=2, energy=0.5)
    with pytest.raises(ValueError, match="`rank` must be at most 12"):
        kra.peft.save(model, tmp_path / "x", rank=20)
    assert not (tmp_path / "x").exists()


def test_warns_of_large_ranks(tmp_path):
    model = _adapted(kra.RandLoRA(6))
    with pytest.warns(
        kra.AdapterWarning, match=r"rank 24 in all 4 modules and takes .* MB"
    ) as caught:
        kra.peft.save(model, tmp_path / "a")
    # It points to the call.
    assert __file__ in {one.filename for one in caught}


def test_fused_modules_add_up_ranks(tmp_path):
    model = _adapted(kra.LoRA(1), ["query", "value"], hub.gpt2())
    kra.peft.save(model, tmp_path / "a")
    config, tensors = _read(tmp_path / "a")
    assert config["fan_in_fan_out"] is True and config["r"] == 2
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    # Queries have the first rank, values the second one, and keys none.
    assert b.shape == (72, 2)
    assert b[:24, 0].all() and not b[:24, 1].any()
    assert not b[24:48].any()
    assert b[48:, 1].all() and not b[48:, 0].any()
    trained = _outputs(model)
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    # The ranks of others are left out at each site, and so are the keys.
    assert len(report.sites) == 4
    assert report.adapter_parameters == 4 * 48
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


def test_dora_of_a_part_of_a_module(tmp_path):
    """Outputs without an adapter keep the norms of the base kernel."""
    model = _adapted(kra.DoRA(kra.LoRA(1)), ["query"], hub.gpt2())
    kernel = keras.ops.convert_to_numpy(
        model.transformer_layers[0]._self_attention_layer.value_dense.kernel
    ).reshape(24, 24)
    kra.peft.save(model, tmp_path / "a")
    _, tensors = _read(tmp_path / "a")
    key = "base_model.model.transformer.h.0.attn.c_attn"
    magnitude = tensors[f"{key}.lora_magnitude_vector"]
    assert magnitude.shape == (72,)
    np.testing.assert_allclose(
        magnitude[48:], np.linalg.norm(kernel, axis=0), rtol=1e-5
    )


@pytest.mark.filterwarnings(
    "ignore:The head of task:keras_randadapt.AdapterWarning"
)
def test_a_head_has_a_file_of_its_own(tmp_path):
    model = hub.bert_classifier()
    kra.inject(model, kra.LoRA(2), ["query"], keep_trainable="logits")
    families.train(model)
    x = families.inputs(model.backbone)
    trained = model.predict(x, verbose=0)
    kra.peft.save(model, tmp_path / "a")
    heads = safetensors.numpy.load_file(tmp_path / "a" / "heads.safetensors")
    assert sorted(array.shape for array in heads.values()) == [(3,), (24, 3)]
    _, tensors = _read(tmp_path / "a")
    assert all("lora" in key for key in tensors)
    assert "`heads.safetensors`" in (tmp_path / "a" / "README.md").read_text()
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    assert report.head_parameters == 24 * 3 + 3
    np.testing.assert_allclose(model.predict(x, verbose=0), trained, atol=1e-5)
    # An earlier head does not stay behind.
    kra.eject(model)
    kra.inject(model, kra.LoRA(2), ["query"])
    kra.peft.save(model, tmp_path / "b")
    (tmp_path / "b" / "heads.safetensors").write_bytes(b"earlier")
    kra.peft.save(model, tmp_path / "b")
    assert not (tmp_path / "b" / "heads.safetensors").exists()
    # Beside another adapter its head waits until it is active.
    kra.peft.load(model, tmp_path / "a", name="second")
    kra.set_active(model, "second")
    np.testing.assert_allclose(model.predict(x, verbose=0), trained, atol=1e-5)


def test_the_card(tmp_path):
    model = _adapted(kra.RLoRA(4, seed=7))
    kra.peft.save(model, tmp_path / "a", base_model='org/"base"\n---')
    text = (tmp_path / "a" / "README.md").read_text()
    header = text.split("---\n")[1]
    assert 'base_model: "org/\\"base\\"\\n---"' in header
    assert "| method | RLoRA |" in text and "| seed | 7 |" in text
    assert "model.layers.1.self_attn.v_proj" in text


def test_what_is_refused(tmp_path):
    model = hub.llama()
    target = tmp_path / "a"
    with pytest.raises(ValueError, match="has no adapter attached"):
        kra.peft.save(model, target)
    kra.inject(model, kra.IA3(), targets=["key"])
    with pytest.raises(ValueError, match="more than adding an update"):
        kra.peft.save(model, target)
    kra.eject(model)
    _adapted(kra.LoRA(2), ["query"], model)
    kra.inject(model, kra.LoRA(2), ["value"], name="other")
    with pytest.raises(ValueError, match="several adapters: say which"):
        kra.peft.save(model, target)
    with pytest.raises(ValueError, match="no adapter called 'x'"):
        kra.peft.save(model, target, name="x")
    with pytest.raises(TypeError, match="`base_model` must be a string"):
        kra.peft.save(model, target, name="other", base_model=3)
    with pytest.raises(TypeError, match="`base` must be a bool"):
        kra.peft.save(model, target, name="other", base="yes")
    with pytest.raises(TypeError, match="`directory` must be a string"):
        kra.peft.save(model, 3, name="other")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        kra.peft.save(model, tmp_path / "x" / "y", name="other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no directory"):
        kra.peft.save(model, tmp_path / "file", name="other")
    with kra.merged(model), pytest.raises(ValueError, match="`merged` block"):
        kra.peft.save(model, target, name="other")
    assert os.listdir(tmp_path) == ["file"]


def test_sites_without_a_module_are_named(tmp_path):
    model = hub.gpt2()
    kra.inject(model, kra.LoRA(2), ["token_embedding", "query"])
    with pytest.raises(ValueError, match="1 of 3 sites .* share its weights"):
        kra.peft.save(model, tmp_path / "a")
    task = hub.bert_classifier()
    kra.inject(task, kra.LoRA(2), ["logits", "query"])
    with pytest.raises(ValueError, match="1 of 3 sites .* does not fill it"):
        kra.peft.save(task, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_nothing_that_diverged_is_written(tmp_path):
    model = _adapted(kra.LoRA(2))
    model.trainable_variables[0].assign(
        np.full(model.trainable_variables[0].shape, np.nan)
    )
    with pytest.raises(ValueError, match="NaN or infinity"):
        kra.peft.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.cpu_seconds(8, reason="JAX compiles a step of training")
@pytest.mark.every_backend
def test_a_callback_saves_during_fit(tmp_path):
    """On JAX the variables have no values between two batches."""
    model = hub.bert_classifier(hub.bert(num_layers=1))
    kra.inject(model, kra.LoRA(2), ["query"], keep_trainable="logits")
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x = families.inputs(model.backbone)
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kra.peft.save(
            model, tmp_path / str(epoch)
        )
    )
    y = np.array([0, 2])
    model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    first, last = (_read(tmp_path / name)[1] for name in ("0", "1"))
    key = next(key for key in first if key.endswith("lora_B.weight"))
    assert first[key].any() and not np.array_equal(first[key], last[key])
    kra.peft.save(model, tmp_path / "after")
    np.testing.assert_array_equal(_read(tmp_path / "after")[1][key], last[key])


def test_a_directory_is_replaced_file_by_file(tmp_path):
    model = _adapted(kra.LoRA(2))
    kra.peft.save(model, tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    first = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    families.train(model, seed=1)
    kra.peft.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    second = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert first != second and len(first) == len(second)
    assert sorted(os.listdir(tmp_path / "a")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
