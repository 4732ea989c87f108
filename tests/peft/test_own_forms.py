"""Methods that PEFT has a form of its own for, there and back."""

import json
import re

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from tests.peft import families
from tests.peft import hub

pytestmark = pytest.mark.one_backend

_METHODS = {
    "miss": (lambda: kra.MiSS(5, scaling=2.0), "MISS"),
    "miss_repeated": (lambda: kra.MiSS(5, output_rank=4), "MISS"),
    "shira": (lambda: kra.SHiRA(2, scaling=2.0, seed=3), "SHIRA"),
    "shira_magnitude": (lambda: kra.SHiRA(2, mask="magnitude"), "SHIRA"),
    "shira_structured": (lambda: kra.SHiRA(2, mask="structured"), "SHIRA"),
    "hira": (lambda: kra.HiRA(3, scaling=2.0), "HIRA"),
    "loha": (lambda: kra.LoHa(3, scaling=2.0), "LOHA"),
    "lokr": (lambda: kra.LoKr(1, scaling=2.0), "LOKR"),
    "lokr_both": (
        lambda: kra.LoKr(1, factor=4, decompose_both=True),
        "LOKR",
    ),
    "lokr_full": (lambda: kra.LoKr(9), "LOKR"),
    "oft": (lambda: kra.OFT(8), "OFT"),
    "oft_shared": (lambda: kra.OFT(6, share_blocks=True), "OFT"),
}


def _adapted(adapter, model, targets=("query", "value")):
    kra.inject(model, adapter, targets=list(targets))
    families.train(model)
    return model, _outputs(model)


def _read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return config, tensors


def _outputs(model):
    return families.keras_outputs(model, families.inputs(model))


@pytest.mark.every_backend
@pytest.mark.parametrize("method", _METHODS)
def test_there_and_back(method, tmp_path):
    """The adapter that comes back is of the same method and computes alike."""
    make, peft_type = _METHODS[method]
    model, trained = _adapted(make(), hub.llama())
    before = kra.sites(model)
    kra.peft.save(model, tmp_path / "a", base_model="org/base")
    config, _ = _read(tmp_path / "a")
    assert config["peft_type"] == peft_type
    assert config["base_model_name_or_path"] == "org/base"
    kra.eject(model)
    assert np.abs(_outputs(model) - trained).max() > 1e-3
    kra.peft.load(model, tmp_path / "a")
    template = model._randadapt.records["default"].template
    assert type(template) is type(make())
    assert getattr(template, "mask", None) == getattr(make(), "mask", None)
    assert kra.sites(model) == before
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


@pytest.mark.parametrize("method", ["miss", "shira", "loha", "lokr"])
def test_a_size_makes_a_lora(method, tmp_path):
    model, _ = _adapted(_METHODS[method][0](), hub.llama())
    kra.peft.save(model, tmp_path / "a", rank=2)
    assert _read(tmp_path / "a")[0]["peft_type"] == "LORA"


@pytest.mark.parametrize("method", ["hira", "oft"])
def test_a_size_of_what_is_not_added_is_refused(method, tmp_path):
    model, _ = _adapted(_METHODS[method][0](), hub.llama())
    with pytest.raises(ValueError, match="leave out `rank` and `energy`"):
        kra.peft.save(model, tmp_path / "a", rank=2)
    assert not (tmp_path / "a").exists()


# A LoRA of few outputs is large.
@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
@pytest.mark.parametrize("method", ["miss", "shira", "hira", "loha", "lokr"])
def test_fused_and_transposed_modules(method, tmp_path):
    """GPT-2 has one transposed weight of queries, keys and values."""
    make, peft_type = _METHODS[method]
    model, trained = _adapted(make(), hub.gpt2())
    kra.peft.save(model, tmp_path / "a")
    config, tensors = _read(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    if method == "hira":
        assert config["peft_type"] == "HIRA" and config["r"] == 6
        key = "base_model.model.transformer.h.0.attn.c_attn.hira_B"
        assert tensors[key].shape == (72, 6) and not tensors[key][24:48].any()
        assert "| form in PEFT | HIRA |" in card
    else:
        assert config["peft_type"] == "LORA"
        assert f"LoRA, since PEFT's {peft_type} takes the kinds" in card
    kra.eject(model)
    kra.peft.load(model, tmp_path / "a")
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: kra.OFT(8), "OFT takes the kinds .* is of the kind 'conv1d'"),
        (lambda: kra.OFT(9), "blocks of .* have 8 rows, and `block_size` is 9"),
    ],
)
def test_rotations_that_peft_has_no_form_for(make, message, tmp_path):
    model = hub.gpt2() if make().block_size == 8 else hub.llama()
    kra.inject(model, make(), ["query"])
    with pytest.raises(ValueError, match=message):
        kra.peft.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings(
    "ignore:The head of task:keras_randadapt.AdapterWarning"
)
def test_convolutions(tmp_path):
    """The windows of Keras's kernels come first, and those of PEFT last."""
    model = hub.vit_classifier()
    names = kra.peft.name_map(model)
    (address,) = [a for a, p in names.parts.items() if p[0].kind == "conv"]
    kra.inject(model, kra.LoHa(2), re.compile(address.rpartition("/")[2]))
    families.train(model)
    trained = _outputs(model)
    kra.peft.save(model, tmp_path / "a")
    assert _read(tmp_path / "a")[0]["peft_type"] == "LOHA"
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    assert report.method == "LoHa"
    np.testing.assert_allclose(_outputs(model), trained, atol=1e-5)


def test_places_of_another_program_become_a_lora(tmp_path):
    """PEFT draws places with PyTorch, and only the file has them."""
    model, _ = _adapted(kra.SHiRA(2), hub.llama())
    kra.peft.save(model, tmp_path / "a")
    config, tensors = _read(tmp_path / "a")
    generator = np.random.default_rng(0)
    expected = {}
    for key in list(tensors):
        if not key.endswith("indices"):
            continue
        n_out = 24 if "q_proj" in key else 12
        count = tensors[key].shape[1]
        places = generator.permutation(n_out * 24)[:count]
        tensors[key] = np.stack(np.unravel_index(places, (n_out, 24)))
        tensors[key] = tensors[key].astype("int32")
        values = tensors[key.replace("indices", "weight")]
        kernel = np.zeros(n_out * 24)
        kernel[places] = values
        expected[key] = kernel.reshape(n_out, 24).T
    safetensors.numpy.save_file(
        tensors, tmp_path / "a" / "adapter_model.safetensors"
    )
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    assert report.method == "LoRA"
    found = model._randadapt.adapters("default").values()
    for adapter, kernel in zip(found, expected.values(), strict=True):
        delta = keras.ops.convert_to_numpy(adapter.delta_kernel())
        np.testing.assert_allclose(delta, kernel, atol=1e-6)


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("miss", {"init_weights": "bat"}, "init_weights = 'bat'.*\"mini\""),
        ("miss", {"r": 4}, r"\(miss_block\) of shape \(5, 24\)"),
        ("miss_repeated", {"mini_r": 5}, r"\(miss_block\) of shape \(5, 4\)"),
        ("shira", {"r": 3}, r"\(shira_weight\) of shape \(96,\)"),
        ("hira", {"r": 2}, r"\(hira_A\) of shape \(3, 24\)"),
        ("hira", {"unknown": 3}, "'unknown' = 3, which"),
        ("loha", {"r": 2}, r"\(hada_w1_b\) of shape \(3, 24\)"),
        ("loha", {"use_effective_conv2d": True}, "'use_effective_conv2d'"),
        ("lokr", {"decompose_factor": 3}, r"\(lokr_w1\) of shape \(4, 4\)"),
        ("lokr", {"decompose_factor": 0}, "must be -1 or at least 1"),
        ("lokr", {"rank_pattern": {"q_proj": 0}}, "the rank 0 for the module"),
        ("oft", {"use_cayley_neumann": True}, "a series that is cut off"),
        ("oft", {"oft_block_size": 6}, r"\(oft_R\) of shape \(3, 28\)"),
        ("oft", {"oft_block_size": 7}, "blocks of 7 rows"),
    ],
)
def test_what_does_not_fit_is_refused(method, change, message, tmp_path):
    model, trained = _adapted(_METHODS[method][0](), hub.llama())
    kra.peft.save(model, tmp_path / "a")
    config, _ = _read(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        kra.peft.load(model, tmp_path / "a", name="other")
    np.testing.assert_array_equal(_outputs(model), trained)


def test_places_outside_of_a_weight_are_refused(tmp_path):
    model, _ = _adapted(kra.SHiRA(2), hub.llama(), ["query"])
    kra.peft.save(model, tmp_path / "a")
    _, tensors = _read(tmp_path / "a")
    for wrong in (24, -1):
        for key in tensors:
            if key.endswith("indices"):
                tensors[key][0, 0] = wrong
        safetensors.numpy.save_file(
            tensors, tmp_path / "a" / "adapter_model.safetensors"
        )
        with pytest.raises(ValueError, match="outside of the weight"):
            kra.peft.load(model, tmp_path / "a", name="other")
