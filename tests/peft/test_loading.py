"""Directories of PEFT that are read, and what is refused in them."""

import json
import os
import resource

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from keras_randadapt.model import state as state_lib
from keras_randadapt.peft import methods
from keras_randadapt.peft import options
from tests import interruptions
from tests.peft import directories
from tests.peft import hub
from tests.peft.directories import START as _START
from tests.peft.directories import modules as _modules
from tests.peft.directories import write as _write

pytestmark = pytest.mark.one_backend


def _snapshot(model):
    return type(model), [
        (weight, keras.ops.convert_to_numpy(weight).copy())
        for weight in model.weights
    ]


def _check_same(model, before):
    cls, weights = before
    assert type(model) is cls and not state_lib.is_adapted(model)
    assert len(model.weights) == len(weights)
    for ours, (weight, value) in zip(model.weights, weights, strict=True):
        assert ours is weight
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours), value)


@pytest.fixture(scope="module")
def shared():
    return hub.llama()


@pytest.fixture
def model(shared):
    yield shared
    if state_lib.is_adapted(shared):
        kra.eject(shared)


def _delta(model, ending, name="default"):
    adapters = model._randadapt.adapters(name)
    (address,) = [a for a in adapters if a.endswith(ending)]
    kernel = adapters[address].delta_kernel()
    return keras.ops.convert_to_numpy(kernel)


_QUERY_1 = "decoder_1/_self_attention_layer/_query_dense"
_VALUE_1 = "decoder_1/_self_attention_layer/_value_dense"


@pytest.mark.every_backend
def test_scaling_and_orientation(tmp_path):
    model = hub.llama()
    content = _write(tmp_path / "a")
    report = kra.peft.load(model, tmp_path / "a")
    assert report.adapter_parameters == 2 * (2 * 48 + 2 * 36)
    key = _START.format(1, "q")
    expected = 2 * (
        content[f"{key}.lora_B.weight"] @ content[f"{key}.lora_A.weight"]
    )
    np.testing.assert_allclose(_delta(model, _QUERY_1).T, expected, atol=1e-5)


def test_patterns_and_rank_stabilization(model, tmp_path):
    module = _START.format(1, "q")
    content = _write(
        tmp_path / "a",
        {
            f"{module}.lora_A.weight": np.ones((3, 24)),
            f"{module}.lora_B.weight": np.ones((24, 3)),
        },
        {
            "rank_pattern": {r"layers\.1\.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 6},
            "use_rslora": True,
        },
    )
    kra.peft.load(model, tmp_path / "a")
    np.testing.assert_allclose(
        _delta(model, _QUERY_1), np.full((24, 24), 3 * 6 / 3**0.5), rtol=1e-5
    )
    key = _START.format(1, "v")
    b, a = content[f"{key}.lora_B.weight"], content[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(
        _delta(model, _VALUE_1).T, 4 / 2**0.5 * (b @ a), rtol=1e-4, atol=1e-5
    )


def test_training_goes_on_with_its_scaling_and_dropout(model, tmp_path):
    _write(tmp_path / "a", config={"lora_dropout": 0.25})
    kra.peft.load(model, tmp_path / "a")
    template = model._randadapt.records["default"].template
    assert template.scaling == 2.0 and template.dropout == 0.25


def test_padded_ranks_are_left_out(model, tmp_path):
    module = _START.format(0, "q")
    a, b = np.ones((5, 24)), np.ones((24, 5))
    a[3:], b[:, 3:] = 0, 0
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    for other in _modules()[1:]:
        n_out = 24 if "q_proj" in other else 12
        one_a, one_b = np.ones((5, 24)), np.ones((n_out, 5))
        one_a[1:] = 0
        tensors[f"{other}.lora_A.weight"] = one_a
        tensors[f"{other}.lora_B.weight"] = one_b
    _write(tmp_path / "a", tensors, {"r": 5, "lora_alpha": 5})
    kra.peft.load(model, tmp_path / "a")
    adapters = model._randadapt.adapters("default")
    assert sorted(one.rank for one in adapters.values()) == [1, 1, 1, 3]


def test_an_update_of_zeros(tmp_path):
    """Nothing is left out where nothing is on."""
    model = hub.gpt2()
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    (tmp_path / "a").mkdir()
    safetensors.numpy.save_file(
        {
            key.format("A"): np.zeros((2, 24), "float32"),
            key.format("B"): np.zeros((72, 2), "float32"),
        },
        tmp_path / "a" / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["h.0.attn.c_attn"],
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    report = kra.peft.load(model, tmp_path / "a")
    assert len(report.sites) == 3
    assert not _delta(model, "decoder/_self_attention_layer/query_dense").any()


def test_a_rank_above_the_dimensions_is_folded(model, tmp_path):
    """PEFT takes any rank, and the same product has a smaller one."""
    generator = np.random.default_rng(1)
    tensors = {}
    for module in _modules():
        n_out = 24 if "q_proj" in module else 12
        tensors[f"{module}.lora_A.weight"] = generator.normal(size=(40, 24))
        tensors[f"{module}.lora_B.weight"] = generator.normal(size=(n_out, 40))
    content = _write(tmp_path / "a", tensors, {"r": 40, "lora_alpha": 40})
    kra.peft.load(model, tmp_path / "a")
    key = _START.format(1, "v")
    b, a = content[f"{key}.lora_B.weight"], content[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(_delta(model, _VALUE_1).T, b @ a, atol=1e-3)


def test_bfloat16_files(model, tmp_path):
    content = _write(tmp_path / "a")
    halves = {
        key: (array.view("<u4") >> 16).astype("<u2")
        for key, array in content.items()
    }
    path = tmp_path / "a" / "adapter_model.safetensors"
    safetensors.numpy.save_file(halves, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    path.write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + length :]
    )
    kra.peft.load(model, tmp_path / "a")
    key = _START.format(1, "q")
    expected = 2 * (
        content[f"{key}.lora_B.weight"] @ content[f"{key}.lora_A.weight"]
    )
    np.testing.assert_allclose(
        _delta(model, _QUERY_1).T, expected, rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("bits", ["float16", "float64"])
def test_other_dtypes(model, tmp_path, bits):
    content = _write(tmp_path / "a")
    safetensors.numpy.save_file(
        {key: array.astype(bits) for key, array in content.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    kra.peft.load(model, tmp_path / "a")
    assert np.all(np.isfinite(_delta(model, _QUERY_1)))


def test_names_without_the_prefix(model, tmp_path):
    content = _write(tmp_path / "a")
    safetensors.numpy.save_file(
        {
            key.replace("base_model.model.model.", "base_model.model."): array
            for key, array in content.items()
        },
        tmp_path / "a" / "adapter_model.safetensors",
    )
    kra.peft.load(model, tmp_path / "a")
    assert len(kra.sites(model)) == 4


def test_a_head_that_the_converter_knows(tmp_path):
    """`modules_to_save` of an image classifier."""
    model = hub.vit_classifier()
    module = "base_model.model.vit.layers.0.attention.q_proj"
    folder = tmp_path / "a"
    folder.mkdir()
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(3, 24)).astype("float32")
    bias = generator.normal(size=3).astype("float32")
    tensors = {
        f"{module}.lora_A.weight": np.ones((1, 24), "float32"),
        f"{module}.lora_B.weight": np.ones((24, 1), "float32"),
        "base_model.model.classifier.weight": kernel,
        "base_model.model.classifier.bias": bias,
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 1,
        "target_modules": ["layers.0.attention.q_proj"],
        "modules_to_save": ["classifier"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = kra.peft.load(model, folder)
    assert report.head_parameters == 75
    head = model.output_dense
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(head.kernel), kernel.T
    )
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(head.bias), bias)
    kra.eject(model)
    assert not np.array_equal(keras.ops.convert_to_numpy(head.bias), bias)
    del tensors["base_model.model.classifier.bias"]
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="a part of the layer .* lacks"):
        kra.peft.load(model, folder)
    assert not state_lib.is_adapted(model)


def test_heads_of_another_task_are_left_out(model, tmp_path):
    """An adapter of a classifier in transformers, for a head in Keras."""
    directories.write(
        tmp_path / "a",
        {
            "base_model.model.score.weight": np.ones((3, 24)),
            "base_model.model.other.dense.weight": np.ones((24, 24)),
        },
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    )
    safetensors.numpy.save_file(
        {"x#0": np.ones(2, "float32")}, tmp_path / "a" / "heads.safetensors"
    )
    before = _snapshot(model)
    with pytest.raises(ValueError, match="`heads=False`"):
        kra.peft.load(model, tmp_path / "a")
    _check_same(model, before)
    with pytest.raises(ValueError, match="'other.dense"):
        # It is in no module to save, so it may be anything.
        kra.peft.load(model, tmp_path / "a", heads=False)
    _check_same(model, before)
    path = tmp_path / "a" / _CONFIG
    config = json.loads(path.read_text())
    saved = ["score", "other"]
    path.write_text(json.dumps({**config, "modules_to_save": saved}))
    with pytest.raises(TypeError, match="`heads` must be a bool"):
        kra.peft.load(model, tmp_path / "a", heads="no")
    _check_same(model, before)
    report = kra.peft.load(model, tmp_path / "a", heads=False)
    assert report.head_parameters == 0 and len(report.sites) == 4


@pytest.mark.every_backend
def test_a_new_head_is_trained_along(tmp_path):
    """In one adapter, which is saved and loaded with it."""
    model = hub.bert_classifier()
    kra.inject(model, kra.LoRA(2), ["query"], keep_trainable="logits")
    kra.peft.save(model, tmp_path / "a")
    kra.eject(model)
    head = next(layer for layer in model.layers if layer.name == "logits")
    head.kernel.assign(np.full(head.kernel.shape, 2.0))
    with pytest.raises(ValueError, match="keep_trainable"):
        kra.peft.load(model, tmp_path / "a", keep_trainable="nothing")
    assert not state_lib.is_adapted(model)
    arguments = dict(heads=False, keep_trainable="logits")
    report = kra.peft.load(model, tmp_path / "a", **arguments)
    assert report.head_parameters == 75
    # The head of the directory is left out, and this one's values stay.
    kernel = keras.ops.convert_to_numpy(head.kernel)
    np.testing.assert_array_equal(kernel, 2.0)
    assert any(w is head.kernel for w in model.trainable_variables)
    kra.peft.save(model, tmp_path / "b")
    kra.eject(model)
    head.kernel.assign(np.zeros(head.kernel.shape))
    kra.peft.load(model, tmp_path / "b")
    kernel = keras.ops.convert_to_numpy(head.kernel)
    np.testing.assert_array_equal(kernel, 2.0)


def _without(key):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        del tensors[key]
        safetensors.numpy.save_file(tensors, path)

    return edit


def _config(**values):
    def edit(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, **values}))

    return edit


def _tensor(key, array):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors[key] = np.asarray(array)
        safetensors.numpy.save_file(tensors, path)

    return edit


def _file(name, data):
    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return edit


def _replaced(name, make):
    def edit(folder):
        (folder / name).unlink()
        make(folder / name)

    return edit


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A = _START.format(1, "q") + ".lora_A.weight"
_HEADER = (
    b'{"a":{"dtype":"F32","shape":[1000000,1000000],'
    b'"data_offsets":[0,4000000000000]}}'
)
_F32 = np.zeros((2, 24), "float32")

_REFUSED = {
    # Another architecture, or another size of this one.
    "another architecture": (
        _tensor("base_model.model.bert.encoder.x.lora_A.weight", _F32),
        "lacks .*bert.encoder.x.lora_B",
    ),
    "a module of another model": (
        lambda folder: [
            _tensor(f"base_model.model.bert.x.{end}", _F32)(folder)
            for end in ("lora_A.weight", "lora_B.weight")
        ],
        "the module 'bert.x', and none of that name .* a 'llama'",
    ),
    "a module with a near name": (
        lambda folder: [
            _tensor(
                f"base_model.model.model.layers.1.self_attn.q_projx.{end}", _F32
            )(folder)
            for end in ("lora_A.weight", "lora_B.weight")
        ],
        "Near are .*layers.1.self_attn.q_proj",
    ),
    "a wrong shape of A": (
        _tensor(_A, np.zeros((2, 25), "float32")),
        r"lora_A\) of shape \(2, 25\) .* must be \(2, 24\)",
    ),
    "a rank that the config does not have": (
        _config(r=3),
        r"of shape \(2, 24\) .* must be \(3, 24\)",
    ),
    "a missing tensor": (_without(_A), "lacks .*q_proj.lora_A.weight"),
    "a missing module": (
        lambda folder: [
            _without(_START.format(1, "v") + f".lora_{side}.weight")(folder)
            for side in "AB"
        ],
        "lacks the tensors of 1 modules .*layers.1.self_attn.v_proj",
    ),
    "a module twice": (
        lambda folder: [
            _tensor(f"base_model.model.layers.1.self_attn.q_proj.{end}", array)(
                folder
            )
            for end, array in (
                ("lora_A.weight", _F32),
                ("lora_B.weight", _F32.T.copy()),
            )
        ],
        "twice, with and without",
    ),
    "a foreign tensor": (_tensor("x.lora_A.weight", _F32), "start with"),
    "a trained embedding": (
        _tensor("base_model.model.model.norm.other", _F32),
        "'model.norm.other', which is no adapter's",
    ),
    "not a number": (_tensor(_A, np.full((2, 24), np.nan, "f4")), "NaN"),
    # Methods and options.
    "an unknown method": (_config(peft_type="BOFT"), "type 'BOFT'. .*IA3"),
    "no method": (_config(peft_type=None), "type None"),
    "a method that is no name": (_config(peft_type=["LORA"]), "the type"),
    "biases": (_config(bias="all"), "biases of the base model"),
    "biases of its own": (_config(lora_bias=True), "lora_bias"),
    "an unknown option": (_config(use_magic=True), "'use_magic' = True"),
    "trained tokens": (
        _config(trainable_token_indices=[1, 2]),
        "trainable_token_indices",
    ),
    "parameters": (_config(target_parameters=["w"]), "target_parameters"),
    "repeated layers": (_config(layer_replication=[[0, 1]]), "replication"),
    "a residual base": (_config(init_lora_weights="pissa"), "changes the base"),
    "a rank of text": (_config(r="2"), "r = '2', which must be .* int"),
    "a rank of truth": (_config(r=True), "r = True"),
    "a rank of nothing": (_config(r=0), "r = 0, below 1"),
    "an endless alpha": (_config(lora_alpha=float("inf")), "no finite"),
    "a dropout of all": (_config(lora_dropout=1.0), "lora_dropout = 1.0"),
    "a pattern of text": (_config(rank_pattern={"q": "3"}), "rank_pattern"),
    "patterns in a list": (_config(rank_pattern=[1]), "type dict"),
    "no regular expression": (_config(rank_pattern={"(": 3}), "no regular"),
    "a pattern that runs away": (
        _config(alpha_pattern={"(a+)+$": 3}),
        "might take forever",
    ),
    "a long pattern": (_config(alpha_pattern={"a" * 301: 3}), "300 characters"),
    "DoRA without magnitudes": (_config(use_dora=True), "use_dora = True"),
    "magnitudes without DoRA": (
        _tensor(
            _START.format(1, "q") + ".lora_magnitude_vector",
            np.ones(24, "float32"),
        ),
        "use_dora = False",
    ),
    # Hostile directories.
    "a rank of a billion": (_config(r=10**9), "must be"),
    "a config of an array": (_file(_CONFIG, b"[1]"), "must hold an object"),
    "no JSON": (_file(_CONFIG, b"{"), "is no JSON"),
    "no text": (_file(_CONFIG, b"\xff\xfe\x00"), "is no JSON"),
    "a nested config": (
        _file(_CONFIG, b'{"r":' + b"[" * 100_000),
        "is no JSON",
    ),
    "a config of megabytes": (_file(_CONFIG, b" " * 4_000_001), "4,000,000"),
    "claimed sizes": (
        _file(
            _WEIGHTS,
            len(_HEADER).to_bytes(8, "little") + _HEADER + b"\0" * 16,
        ),
        "is no safetensors file",
    ),
    "a claimed header": (
        _file(_WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
        "is no safetensors file",
    ),
    "an empty file": (_file(_WEIGHTS, b""), "is no safetensors file"),
    "integers": (_tensor(_A, np.zeros((2, 24), "int32")), "as I32"),
    "a folder for a file": (
        _replaced(_WEIGHTS, lambda path: path.mkdir()),
        "is a folder",
    ),
    "a pipe": (_replaced(_WEIGHTS, os.mkfifo), "no regular file"),
    "a device": (
        _replaced(_WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        "no regular file",
    ),
    "a config that is a device": (
        _replaced(_CONFIG, lambda path: path.symlink_to("/dev/zero")),
        "no regular file",
    ),
    "a pickle": (
        lambda folder: (folder / _WEIGHTS).rename(folder / "adapter_model.bin"),
        "a pickle, which could run code",
    ),
    "a head of another model": (
        lambda folder: safetensors.numpy.save_file(
            {"../../x#0": _F32}, folder / "heads.safetensors"
        ),
        "has no such weight",
    ),
    "a head of no number": (
        lambda folder: safetensors.numpy.save_file(
            {"layers/rms_norm": _F32}, folder / "heads.safetensors"
        ),
        "has no such weight",
    ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_is_refused(case, model, tmp_path):
    """It is named, and nothing in the model has changed."""
    edit, message = _REFUSED[case]
    _write(tmp_path / "a")
    edit(tmp_path / "a")
    before = _snapshot(model)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        kra.peft.load(model, tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    _check_same(model, before)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    assert more < 200_000


def test_files_that_are_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        kra.peft.load(model, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no directory"):
        kra.peft.load(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        kra.peft.load(model, tmp_path / "empty")
    _write(tmp_path / "a")
    (tmp_path / "a" / _WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        kra.peft.load(model, tmp_path / "a")
    with pytest.raises(TypeError, match="`directory` must be"):
        kra.peft.load(model, None)
    with pytest.raises(ValueError, match="`name` must consist"):
        kra.peft.load(model, tmp_path / "a", name="a b")


def test_links_to_files_are_read(model, tmp_path):
    """Caches of Hugging Face consist of them."""
    _write(tmp_path / "blobs")
    (tmp_path / "a").mkdir()
    for name in (_CONFIG, _WEIGHTS):
        (tmp_path / "a" / name).symlink_to(tmp_path / "blobs" / name)
    kra.peft.load(model, tmp_path / "a")
    assert len(kra.sites(model)) == 4


def test_a_taken_name(model, tmp_path):
    _write(tmp_path / "a")
    kra.peft.load(model, tmp_path / "a")
    with pytest.raises(ValueError, match="called 'default' already"):
        kra.peft.load(model, tmp_path / "a")


def test_no_bases_no_adapter(model, tmp_path):
    """Frozen matrices that only PEFT can draw again."""
    _write(tmp_path / "a", config={"peft_type": "VERA", "lora_alpha": None})
    module = _START.format(0, "q")
    safetensors.numpy.save_file(
        {
            f"{module}.vera_lambda_b": np.zeros(24, "float32"),
            f"{module}.vera_lambda_d": np.zeros(2, "float32"),
        },
        tmp_path / "a" / _WEIGHTS,
    )
    with pytest.raises(ValueError, match="save_projection=True"):
        kra.peft.load(model, tmp_path / "a")
    assert not state_lib.is_adapted(model)


def test_frozen_matrices_of_another_shape():
    reader = methods.Reader(
        "dir", "RANDLORA", {"r": 2, "randlora_alpha": 1}, [None, None]
    )
    roles = {
        "lambda": np.zeros((2, 2)),
        "gamma": np.zeros((2, 4)),
        "frozen_a": np.zeros((2, 1, 3)),
        "frozen_b": np.zeros((6, 2, 2)),
    }
    with pytest.raises(ValueError, match=r"needs one of at least \(2, 1, 4\)"):
        reader.update("m", roles, (4, 6), (6, 4))


def test_a_failure_half_way_leaves_the_model(model, tmp_path):
    """Whatever raises, the model is as before or done."""
    _write(tmp_path / "a")
    before = _snapshot(model)
    for number in range(1, 50):
        with interruptions.FailingAssignment(number) as failing:
            try:
                kra.peft.load(model, tmp_path / "a")
            except MemoryError:
                _check_same(model, before)
        if not failing.failed:
            break
    assert number > 4 and len(kra.sites(model)) == 4


def test_regular_expressions_that_are_safe():
    for pattern in (r".*\.q_proj", "layers.(0|1).q", "^model.x", r"l\.\d+\.q"):
        assert options.compiled("dir", "rank_pattern", pattern)
    assert options.by_pattern("d", "k", {"q": 1, ".*": 2}, "a.q", 0) == 1
    assert options.by_pattern("d", "k", {"q": 1}, "a.xq", 0) == 0
