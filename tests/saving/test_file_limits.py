"""What a file claims is compared with what it holds, and damage is told."""

import numpy as np
import pytest

import keras_randadapt as kra
from tests import adapter_files
from tests import zoo

pytestmark = pytest.mark.one_backend

#: Methods with a number in their configs that says how much there is.
CLAIMS = [
    (lambda: kra.LoRA(2), "rank"),
    (lambda: kra.RLoRA(5), "rank"),
    (lambda: kra.VeRA(5), "rank"),
    (lambda: kra.VeRA(5, basis="hadamard"), "rank"),
    (lambda: kra.VeRA(5, basis="very_sparse"), "rank"),
    (lambda: kra.RandLoRA(3), "rank"),
    (lambda: kra.RandLoRA(3, basis="hadamard"), "rank"),
    (lambda: kra.NOLA(2, num_bases=4), "num_bases"),
    (lambda: kra.NOLA(2, num_bases=4), "rank"),
    (lambda: kra.SAID(5), "dim"),
    (lambda: kra.LoRAFA(2), "rank"),
    (lambda: kra.MiSS(2), "rank"),
    (lambda: kra.MiSS(2, output_rank=2), "output_rank"),
    (lambda: kra.SHiRA(1), "rank"),
    (lambda: kra.HiRA(2), "rank"),
    (lambda: kra.FourierFT(3), "count"),
    (lambda: kra.LoHa(2), "rank"),
    (lambda: kra.LoKr(1), "rank"),
    (lambda: kra.OFT(2), "block_size"),
    (lambda: kra.AdaLoRA(2), "rank"),
    (lambda: kra.DyLoRA(2), "rank"),
    (lambda: kra.SoRA(2), "rank"),
    (lambda: kra.RMLoRA(2), "rank"),
    (lambda: kra.Hydra(2), "rank"),
    (lambda: kra.Bottleneck(2), "rank"),
]


def _replaced(config, key, value):
    """A config with a key of it replaced, wherever it is."""
    if isinstance(config, dict):
        return {
            k: value if k == key else _replaced(v, key, value)
            for k, v in config.items()
        }
    return config


def _saved(adapter, path):
    model, _, targets = zoo.dense()
    kra.inject(model, adapter, targets)
    kra.save_adapter(model, path)
    return adapter_files.read(path)[1]["adapter"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [10**6, 10**7, 10**12])
@pytest.mark.parametrize(
    ("make", "key"), CLAIMS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_small_file_that_claims_much(tmp_path, make, key, value, version):
    path = tmp_path / "a.safetensors"
    adapter = _saved(make(), path)
    assert key in adapter["config"]
    if version == 1:
        adapter_files.as_version_1(path)
    adapter_files.edit(path, {"adapter": _replaced(adapter, key, value)})
    model, x, _ = zoo.dense()
    before = zoo.snapshot(model)
    with pytest.raises(ValueError, match=str(path)):
        kra.load_adapter(model, path)
    assert zoo.snapshot(model).keys() == before.keys()
    assert kra.sites(model) == {}


def test_a_wrapped_method_that_claims_much(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = _saved(kra.DoRA(kra.VeRA(5)), path)
    adapter_files.edit(path, {"adapter": _replaced(adapter, "rank", 10**8)})
    with pytest.raises(ValueError, match="the file holds"):
        kra.load_adapter(zoo.dense()[0], path)


def test_every_bit_of_the_weights_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    _saved(kra.LoRA(2), path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    model, _, _ = zoo.dense()
    for place in range(start, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="digest|NaN"):
            kra.load_adapter(model, path)
    assert kra.sites(model) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"preset": "bert"},
        {"bases": {"x": "y"}},
        {"precisions": [["int4", 1]]},
    ],
    ids=str,
)
def test_every_word_of_the_metadata_counts(tmp_path, change):
    path = tmp_path / "a.safetensors"
    _saved(kra.LoRA(2), path)
    adapter_files.edit(path, change, digest=False)
    with pytest.raises(ValueError, match="does not have the digest"):
        kra.load_adapter(zoo.dense()[0], path)


def test_only_the_first_version_has_no_digest(tmp_path):
    path = tmp_path / "a.safetensors"
    _saved(kra.LoRA(2), path)
    adapter_files.edit(path, {"digest": None})
    with pytest.raises(ValueError, match="lacks the metadata .'digest'"):
        kra.load_adapter(zoo.dense()[0], path)
    _saved(kra.LoRA(2), path)
    adapter_files.edit(path, {"version": 1})
    with pytest.raises(ValueError, match="does not know: .*digest"):
        kra.load_adapter(zoo.dense()[0], path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(tmp_path, value, version):
    path = tmp_path / "a.safetensors"
    model, _, targets = zoo.dense()
    kra.inject(model, kra.LoRA(2), targets)
    adapter = next(iter(kra.sites(model).values())).adapter.get("default")
    b = np.zeros(adapter.lora_b.shape, "float32")
    b[0, 1] = value
    adapter.lora_b.assign(b)
    with pytest.warns(kra.AdapterWarning, match="NaN or infinity in 1 of its"):
        kra.save_adapter(model, path)
    if version == 1:
        adapter_files.as_version_1(path)
    fresh, _, _ = zoo.dense()
    with pytest.raises(ValueError, match="holds NaN or infinity in 1 of its"):
        kra.load_adapter(fresh, path, check_base="ignore")
    assert kra.sites(fresh) == {}
    kra.load_adapter(fresh, path, check_base="ignore", allow_non_finite=True)


def test_fingerprints_of_another_number_of_sites(tmp_path):
    path = tmp_path / "a.safetensors"
    _saved(kra.LoRA(2), path)
    adapter_files.edit(path, tensors=adapter_files.fingerprints(path, 2))
    with pytest.raises(ValueError, match="lacks the fingerprints of its 1"):
        kra.load_adapter(zoo.dense()[0], path)
    _saved(kra.LoRA(2), path)
    adapter_files.edit(path, {"precisions": [["float32", 7]]})
    with pytest.raises(ValueError, match="precisions are not of its 1 sites"):
        kra.load_adapter(zoo.dense()[0], path)
