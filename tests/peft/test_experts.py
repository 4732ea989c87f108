"""Experts in PEFT's directories, without PEFT: the form, and what is refused.

`test_transformers.py` compares both ways with PEFT and transformers.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from keras_randadapt.peft import description
from keras_randadapt.peft import experts
from keras_randadapt.sites import lanes
from tests import zoo
from tests.peft import families
from tests.peft import hub

pytestmark = [pytest.mark.one_backend, families.needs_new_hub]

_START = "base_model.model.model.layers.0.mlp.experts"
_GATE = "expert_feedforward_gate_dense"
_UP = "expert_feedforward_intermediate_dense"
_DOWN = "expert_feedforward_output_dense"


def _adapted(adapter, targets="expert_bank"):
    model = zoo.set_weights(hub.mixtral())
    kra.inject(model, adapter, targets)
    families.train(model)
    return model


def _read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return config, tensors


def _write(folder, config=None, tensors=None):
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, path)


def _deltas(model, kernel):
    """The updates of the experts of the first layer, `(experts, in, out)`."""
    adapters = model._randadapt.adapters("default")
    address = next(a for a in adapters if a.endswith(kernel))
    found = lanes.each(adapters[address])
    return np.stack([zoo.numpy(lane.delta_kernel()) for lane in found])


@pytest.mark.every_backend
def test_the_form_and_back(tmp_path):
    """NumPy makes the updates of the tensors as PEFT's formula says."""
    model = _adapted(kra.LoRA(2, alpha=6))
    trained = families.keras_outputs(model, families.inputs(model))
    kra.peft.save(model, tmp_path / "a")
    config, tensors = _read(tmp_path / "a")
    assert config["target_modules"] == []
    names = [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    assert config["target_parameters"] == sorted(
        f"{name}.{one}"
        for name in names
        for one in ("down_proj", "gate_up_proj")
    )
    # The kernels of gate and up are one parameter, so their ranks add up.
    assert config["r"] == config["lora_alpha"] == 4
    assert len(tensors) == 8

    def update(start):
        a = tensors[f"{start}.lora_A.weight"].reshape(3, 4, -1)
        b = tensors[f"{start}.lora_B.weight"]
        return np.einsum("ore,eri->eio", b.reshape(len(b), 4, 3), a)

    gate_up, down = update(f"{_START}.base_layer"), update(_START)
    wanted = [_deltas(model, one) for one in (_GATE, _UP)]
    np.testing.assert_allclose(gate_up, np.concatenate(wanted, -1), atol=1e-6)
    np.testing.assert_allclose(down, _deltas(model, _DOWN), atol=1e-6)

    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    assert len(report.sites) == 6
    again = families.keras_outputs(model, families.inputs(model))
    np.testing.assert_allclose(again, trained, atol=1e-5)
    np.testing.assert_allclose(_deltas(model, _GATE), wanted[0], atol=1e-6)
    # The ranks that only fill up the parameter are left out.
    assert report.adapter_parameters == 2 * 3 * 3 * 2 * (24 + 40)


@pytest.mark.parametrize("kernel", [_GATE, _UP, _DOWN])
def test_one_kernel(kernel, tmp_path):
    model = _adapted(kra.RLoRA(4), kernel)
    kra.peft.save(model, tmp_path / "a", rank=3)
    config, tensors = _read(tmp_path / "a")
    # It is the only wrapper of its module.
    key = f"{_START}.lora_B.weight"
    assert key in tensors and len(tensors) == 4
    halves = tensors[key].reshape(2, -1, 9) if kernel != _DOWN else None
    if halves is not None:
        assert [bool(half.any()) for half in halves] == [
            kernel == _GATE,
            kernel == _UP,
        ]
    trained = families.keras_outputs(model, families.inputs(model))
    kra.eject(model)
    report = kra.peft.load(model, tmp_path / "a")
    assert all(site.endswith(kernel) for site in report.sites)
    assert len(report.sites) == 2
    again = families.keras_outputs(model, families.inputs(model))
    assert np.abs(again - trained).max() < 0.5 * np.abs(trained).max()


def test_the_map_tells_of_experts():
    names = kra.peft.name_map(hub.mixtral())
    parts = {
        address.rpartition("/")[2]: part
        for address, (part,) in reversed(list(names.parts.items()))
        if part.kind == "experts"
    }
    assert list(parts)[::-1] == [_GATE, _UP, _DOWN]
    module = "model.layers.0.mlp.experts.gate_up_proj"
    assert parts[_GATE].module == parts[_UP].module == module
    assert parts[_GATE].weight_shape == (3, 80, 24)
    assert parts[_UP].describe() == "outputs 40 to 79"
    assert parts[_DOWN].dims == (40, 24)
    file_module = "model.layers.0.block_sparse_moe.experts.down_proj"
    assert names.find(file_module) == parts[_DOWN].module


def test_dora_is_refused(tmp_path):
    model = _adapted(kra.DoRA(kra.LoRA(2)))
    with pytest.raises(ValueError, match="PEFT has no DoRA of experts"):
        kra.peft.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_whose_parameters_are_not_known(tmp_path):
    model = hub.gpt_oss()
    kra.inject(model, kra.LoRA(2), "experts")
    with pytest.raises(ValueError, match="stopped before it"):
        kra.peft.save(model, tmp_path / "a")


def _without(key):
    return lambda config, tensors: tensors.pop(key)


def _with(**options):
    return lambda config, tensors: config.update(options)


def _cut(config, tensors):
    key = f"{_START}.lora_A.weight"
    tensors[key] = tensors[key][:-1]


_DOWN_ONLY = [f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(target_parameters="down_proj"), "must be of the type list"),
        (_with(target_parameters=[1]), "list of the names of parameters"),
        (_with(target_parameters=[]), "2 wrappers .* mean 0 of"),
        (_with(target_parameters=_DOWN_ONLY), "2 wrappers .* mean 1 of"),
        (_with(target_parameters=["gate.weight"]), "'gate.weight' is not one"),
        (_with(r=3), r"lora_A.* of shape \(12, .*must be \(9, "),
        (_without(f"{_START}.lora_A.weight"), "incomplete"),
        (_cut, r"lora_A.* of shape \(11, 40\)"),
        (_with(use_dora=True), "holds a DoRA of the experts"),
    ],
)
def test_bad_directories(change, message, tmp_path):
    model = _adapted(kra.LoRA(2))
    kra.peft.save(model, tmp_path / "a")
    kra.eject(model)
    before = zoo.snapshot(model)
    config, tensors = _read(tmp_path / "a")
    change(config, tensors)
    _write(tmp_path / "a", config, tensors)
    with pytest.raises(ValueError, match=message):
        kra.peft.load(model, tmp_path / "a")
    assert kra.sites(model) == {}
    for key, (path, value) in zoo.snapshot(model).items():
        np.testing.assert_array_equal(value, before[key][1], err_msg=path)


def test_a_missing_layer_is_told(tmp_path):
    model = _adapted(kra.LoRA(2))
    kra.peft.save(model, tmp_path / "a")
    kra.eject(model)
    config, tensors = _read(tmp_path / "a")
    config["target_parameters"] = ["gate_up_proj", "down_proj"]
    kept = {k: one for k, one in tensors.items() if ".layers.1." not in k}
    _write(tmp_path / "a", config, kept)
    with pytest.raises(ValueError, match="lacks the tensors of 2 modules"):
        kra.peft.load(model, tmp_path / "a")


def _one_by_one(folder, change=None):
    """An adapter of transformers 4, and the updates of its first layer."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["w1", "w2", "w3"],
    }
    tensors, wanted = {}, {}
    for n in (0, 1):
        start = f"base_model.model.model.layers.{n}.block_sparse_moe.experts"
        for layer, n_in, n_out in (
            ("w1", 24, 40),
            ("w3", 24, 40),
            ("w2", 40, 24),
        ):
            for e in range(3):
                a = zoo.normal(2, n_in, seed=len(tensors))
                b = zoo.normal(n_out, 2, seed=len(tensors))
                tensors[f"{start}.{e}.{layer}.lora_A.weight"] = a
                tensors[f"{start}.{e}.{layer}.lora_B.weight"] = b
                if n == 0:
                    wanted.setdefault(layer, []).append(3 * (b @ a).T)
    if change is not None:
        change(config, tensors)
    folder.mkdir()
    _write(folder, config, tensors)
    return wanted


@pytest.mark.every_backend
def test_experts_one_by_one(tmp_path):
    """As PEFT has them of transformers 4, with a module for each."""
    wanted = _one_by_one(tmp_path / "a")
    model = zoo.set_weights(hub.mixtral())
    report = kra.peft.load(model, tmp_path / "a")
    assert len(report.sites) == 6
    for layer, kernel in (("w1", _GATE), ("w3", _UP), ("w2", _DOWN)):
        np.testing.assert_allclose(
            _deltas(model, kernel), np.stack(wanted[layer]), atol=1e-4
        )
    adapter = next(iter(model._randadapt.adapters("default").values()))
    assert (adapter.rank, adapter.scaling) == (2, 3.0)


def _rename(old, new):
    def change(config, tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _lose(part):
    def change(config, tensors):
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def _norms(config, tensors):
    config["use_dora"] = True
    for key in [key for key in tensors if ".lora_B." in key]:
        name = key.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[name] = np.ones(len(tensors[key]), "float32")


def _scalings(config, tensors):
    config["alpha_pattern"] = {"1.w1": 2}


def test_experts_of_several_scalings(tmp_path):
    wanted = _one_by_one(tmp_path / "a", _scalings)
    model = zoo.set_weights(hub.mixtral())
    kra.peft.load(model, tmp_path / "a")
    wanted["w1"][1] /= 3
    np.testing.assert_allclose(
        _deltas(model, _GATE), np.stack(wanted["w1"]), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename("experts.2.", "experts.3."), "has 3 experts, from 0 on"),
        (_lose("layers.0.block_sparse_moe.experts.1.w3"), "of 1 modules"),
        (_rename(".w1.", ".w4."), "none of that name holds"),
        (_norms, "a method that does more than adding"),
        (_with(r=3), "in this model it must be"),
    ],
)
def test_bad_directories_of_single_experts(change, message, tmp_path):
    _one_by_one(tmp_path / "a", change)
    model = hub.mixtral()
    with pytest.raises(ValueError, match=message):
        kra.peft.load(model, tmp_path / "a")
    assert kra.sites(model) == {}


def test_from_a_shell(tmp_path):
    """Inspected and compared without a model, and not converted."""
    model = _adapted(kra.LoRA(2))
    kra.peft.save(model, tmp_path / "a")
    told = description.described(tmp_path / "a")
    assert told["refused"] is None
    assert told["sites"]["model.layers.0.mlp.experts.gate_up_proj"] == {
        "shape": "3x24x80",
        "rank": 4,
        "scaling": 1.0,
        "values": 3 * 4 * (24 + 80),
    }
    assert (
        sum(s["values"] for s in told["sites"].values()) == (told["parameters"])
    )
    config, tensors = _read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    scaled = {
        key: one / 2 if ".lora_A." in key else 2 * one
        for key, one in tensors.items()
    }
    _write(tmp_path / "b", config, scaled)
    pair = tmp_path / "a", tmp_path / "b"
    assert list(description.differences(*pair)) == []
    scaled[f"{_START}.base_layer.lora_A.weight"] *= 1.5
    _write(tmp_path / "b", tensors=scaled)
    (found,) = description.differences(*pair)
    assert "layers.0.mlp.experts.gate_up_proj" in str(found)
    from keras_randadapt.peft import conversion

    with pytest.raises(ValueError, match="converted with their model alone"):
        conversion.convert_directory(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_names_of_wrappers():
    both = [
        "x.experts.down_proj",
        "x.experts.gate_up_proj",
        "y.experts.down_proj",
    ]
    starts = experts.starts_of(both)
    assert starts == {
        "x.experts.down_proj": "x.experts",
        "x.experts.gate_up_proj": "x.experts.base_layer",
        "y.experts.down_proj": "y.experts",
    }
    held = {start: name for name, start in starts.items()}
    held["x.q_proj"] = "x.q_proj"
    for targets in (both, ["down_proj", "x.experts.gate_up_proj"]):
        named, parameters = experts.named("a", targets, held)
        assert named == {name: name for name in held.values()}
        assert sorted(parameters) == both
