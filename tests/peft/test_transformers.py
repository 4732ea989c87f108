"""Adapters both ways, against PEFT and transformers themselves.

A model of transformers with random weights is converted by KerasHub. Then both
compute the same, and they must go on doing so with an adapter that one of them
made and the other one read.
"""

import warnings

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_randadapt as kra
from keras_randadapt.model import state as state_lib
from tests.peft import families

pytestmark = families.NEEDS_TORCH

_QUICK = ("bert", "llama")
_ALL = [
    family
    if family in _QUICK
    else pytest.param(
        family, marks=pytest.mark.slow("one of many families of models")
    )
    for family in families.FAMILIES
]

_SOME = [
    "llama",
    *(
        pytest.param(name, marks=pytest.mark.slow("one of many families"))
        for name in ("bert", "gpt2", "swin", "t5gemma")
    ),
]

_METHODS = {
    "lora": lambda: kra.LoRA(3, alpha=6, seed=1),
    "rlora": lambda: kra.RLoRA(4, seed=1),
    "dora": lambda: kra.DoRA(kra.LoRA(2, seed=1)),
}


class Pair:
    """A model of transformers and its conversion, and what both compute."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        torch_model = families.torch_model(family)
        self.backbone = families.keras_model(torch_model, folder / "model")
        self.x = families.inputs(self.backbone)
        self.base = families.torch_outputs(torch_model, self.x)
        ours = families.keras_outputs(self.backbone, self.x)
        self.apart = np.abs(self.base - ours).max()
        assert self.apart < 1e-4

    def torch_model(self, task=True):
        model = families.torch_model(self.family)
        return model if task else model.base_model

    def linear(self):
        """The modules that are linear layers, in the map's order."""
        names = kra.peft.name_map(self.backbone)
        return [
            module
            for module, places in names.by_module().items()
            if places[0][1].kind in ("linear", "conv1d")
        ]

    def inject(self, adapter, kinds=("linear", "conv1d")):
        names = kra.peft.name_map(self.backbone)
        layers = state_lib.layers_of(self.backbone)
        sites = {
            id(layers[address])
            for address, parts in names.parts.items()
            # The gate of shared experts has one output.
            if parts[0].kind in kinds and min(parts[0].dims) > 4
        }
        kra.inject(self.backbone, adapter, lambda layer: id(layer) in sites)
        return len(sites)

    def check(self, theirs):
        """Both compute the same, and not what the base model does."""
        ours = families.keras_outputs(self.backbone, self.x)
        assert np.abs(theirs - self.base).max() > 100 * self.apart
        np.testing.assert_allclose(ours, theirs, atol=1e-4 + self.apart)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = Pair(family, tmp_path_factory.mktemp(family))
        if state_lib.is_adapted(made[family].backbone):
            kra.eject(made[family].backbone)
        return made[family]

    return get


@pytest.mark.parametrize("family", _ALL)
def test_the_map_is_that_of_the_other_route(family, tmp_path):
    """Checkpoints of numbers tell the same as recorded converters.

    A release of KerasHub or transformers that moves or renames anything fails
    here with the family's name.
    """
    import torch

    model = families.torch_model(family)
    keys = list(model.state_dict(keep_vars=True))

    def converted(fill):
        with torch.no_grad():
            for i, (_, weight) in enumerate(model.state_dict().items()):
                fill(i, weight)
        return families.keras_model(model, tmp_path / "model")

    def count(i, weight):
        # KerasHub's converter of Mistral has 11 bits for a number.
        numbers = torch.arange(weight.numel()) % 2039
        weight.copy_(numbers.reshape(weight.shape))

    def name(i, weight):
        weight.fill_(i)

    numbered = converted(count)
    names = kra.peft.name_map(numbered)
    layers = state_lib.layers_of(numbered)
    views = {a: _view(layers[a]) for a in names.parts}
    named_model = converted(name)
    named = state_lib.layers_of(named_model)
    modules = dict(model.named_modules())
    assert names.parts
    for address, parts in names.parts.items():
        origin = _view(named[address])
        for part in parts:
            n_in, n_out = part.dims
            if part.kind == "experts":
                _check_experts(model, part, views[address], origin, keys)
                continue
            rows = part.inputs[:, None], part.outputs[None, :]
            index = (
                rows[0] * n_out + rows[1]
                if part.kind in ("conv1d", "embedding")
                else rows[1] * n_in + rows[0]
            )
            np.testing.assert_array_equal(
                views[address][:, part.columns], index % 2039, err_msg=address
            )
            module = modules[part.module]
            assert tuple(module.weight.shape) == part.weight_shape
            assert type(module).__name__ in {
                "linear": ("Linear",),
                "conv1d": ("Conv1D",),
                "conv": ("Conv2d",),
                "embedding": ("Embedding", "Gemma2TextScaledWordEmbedding"),
            }[part.kind] or isinstance(module, torch.nn.Embedding)
            # Every number comes from the tensor of this module.
            (tensor,) = np.unique(origin[:, part.columns])
            assert keys[int(tensor)] == f"{part.module}.weight"


def _check_experts(model, part, view, origin, keys):
    """A parameter has the experts' kernels where the map says."""
    n_in, n_out = part.dims
    parameter = dict(model.named_parameters())[part.module]
    assert tuple(parameter.shape) == part.weight_shape
    experts = np.arange(len(view))[:, None, None] * n_out
    rows = experts + part.outputs[None, None, :]
    index = rows * n_in + part.inputs[None, :, None]
    np.testing.assert_array_equal(view[..., part.columns], index % 2039)
    (tensor,) = np.unique(origin)
    assert keys[int(tensor)] == part.module


def _view(layer):
    from keras_randadapt.sites import supported

    kernel = supported.kernel_variable(layer)
    view = keras.ops.convert_to_numpy(supported.as_view(layer, kernel))
    return view.astype("int64")


# Half of so small a kernel is little.
@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("family", _ALL)
def test_peft_reads_what_we_write(family, method, pairs, tmp_path):
    import peft

    pair = pairs(family)
    pair.inject(_METHODS[method]())
    families.train(pair.backbone)
    kra.peft.save(pair.backbone, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(
        pair.torch_model(), str(tmp_path / "adapter")
    )
    pair.check(families.torch_outputs(model.base_model.model, pair.x))


_OWN = {
    "miss": lambda: kra.MiSS(5, scaling=2.0),
    "miss_repeated": lambda: kra.MiSS(5, output_rank=4),
    "shira": lambda: kra.SHiRA(2, scaling=2.0),
    "hira": lambda: kra.HiRA(3, scaling=2.0),
    "loha": lambda: kra.LoHa(3, scaling=2.0),
    "lokr": lambda: kra.LoKr(1, scaling=20.0),
    "oft": lambda: kra.OFT(8),
}


@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
@pytest.mark.parametrize("method", _OWN)
@pytest.mark.parametrize("family", _SOME)
def test_peft_reads_its_own_methods(family, method, pairs, tmp_path):
    import peft

    if method == "oft" and family != "llama":
        pytest.skip("its modules hold several sites, or are other layers")
    pair = pairs(family)
    pair.inject(_OWN[method]())
    # HiRA's factors scale the small numbers of the kernel.
    families.train(pair.backbone, scale=0.5 if method == "hira" else 0.1)
    kra.peft.save(pair.backbone, tmp_path / "adapter")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    if family == "llama" or method == "hira":
        # Other families have modules that the other two can't have.
        assert config.peft_type == method.partition("_")[0].upper()
    model = peft.PeftModel.from_pretrained(
        pair.torch_model(), str(tmp_path / "adapter")
    )
    pair.check(families.torch_outputs(model.base_model.model, pair.x))


@pytest.mark.parametrize(
    "method", ["miss", "mini", "shira", "hira", "loha", "lokr", "oft"]
)
@pytest.mark.parametrize("family", _SOME)
def test_we_read_methods_of_ours(family, method, pairs, tmp_path):
    """The methods that PEFT has in the same form."""
    import peft

    pair = pairs(family)
    names = kra.peft.name_map(pair.backbone).by_module()
    linear = [m for m in pair.linear() if names[m][0][1].kind == "linear"]
    config = {
        "miss": lambda: peft.MissConfig(r=5, target_modules=linear),
        "mini": lambda: peft.MissConfig(
            r=5, init_weights="mini", mini_r=4, target_modules=linear
        ),
        "shira": lambda: peft.ShiraConfig(
            r=2, random_seed=-1, target_modules=linear
        ),
        "hira": lambda: peft.HiraConfig(
            r=3,
            rank_pattern={linear[0]: 2},
            target_modules=pair.linear(),
            fan_in_fan_out=family == "gpt2",
        ),
        "loha": lambda: peft.LoHaConfig(
            r=3, alpha=6, target_modules=linear, alpha_pattern={linear[0]: 9}
        ),
        "lokr": lambda: peft.LoKrConfig(
            r=2, alpha=40, decompose_factor=4, target_modules=linear
        ),
        "oft": lambda: peft.OFTConfig(
            oft_block_size=4, use_cayley_neumann=False, target_modules=linear
        ),
    }[method]
    if not linear:
        return
    if (method, family) == ("oft", "swin"):
        # Queries, keys and values are one layer in Keras.
        with pytest.raises(ValueError, match="parts of one layer in diff"):
            _exchange(pair, config(), tmp_path)
        return
    # HiRA's factors scale the small numbers of the kernel.
    scale = 0.5 if method == "hira" else 0.1
    _exchange(pair, config(), tmp_path, scale=scale)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", _ALL)
def test_we_read_what_peft_writes(family, method, pairs, tmp_path):
    import peft

    pair = pairs(family)
    modules = pair.linear()
    common = dict(target_modules=modules, lora_alpha=6, lora_dropout=0.0)
    configs = {
        "lora": dict(
            r=3,
            rank_pattern={modules[0]: 2},
            alpha_pattern={modules[1]: 9, modules[0]: 4},
        ),
        "rslora": dict(r=4, use_rslora=True),
        "dora": dict(r=3, use_dora=True),
    }
    config = peft.LoraConfig(
        **common,
        **configs[method],
        fan_in_fan_out=family == "gpt2",
    )
    _exchange(pair, config, tmp_path)


@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("method", ["vera", "randlora", "adalora", "ia3"])
@pytest.mark.parametrize("family", _SOME)
def test_we_read_other_methods(family, method, task, pairs, tmp_path):
    import peft

    pair = pairs(family)
    modules = pair.linear()
    prefix = kra.peft.name_map(pair.backbone).prefix
    if not task:
        modules = [name.removeprefix(f"{prefix}.") for name in modules]
    common = dict(target_modules=modules, fan_in_fan_out=family == "gpt2")
    # Layers that are one in Keras scale their inputs alike.
    last = [name for name in modules if name.endswith(("mlp.fc2", "down_proj"))]
    config = {
        "vera": lambda: peft.VeraConfig(r=6, **common),
        "randlora": lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=10, **common
        ),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, **common
        ),
        "ia3": lambda: peft.IA3Config(feedforward_modules=last, **common),
    }[method]()
    _exchange(pair, config, tmp_path, task)


def _exchange(pair, config, tmp_path, task=True, scale=0.1):
    """Trains an adapter in PEFT, as it were, and loads it into Keras."""
    import peft
    import torch

    model = peft.get_peft_model(pair.torch_model(task), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(scale * noise)
    model.eval()
    theirs = families.torch_outputs(model.base_model.model, pair.x)
    model.save_pretrained(str(tmp_path / "adapter"))
    kra.peft.load(pair.backbone, tmp_path / "adapter")
    pair.check(theirs)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "embedding"),
        pytest.param(
            "vit", "conv", marks=pytest.mark.slow("one of many families")
        ),
        pytest.param(
            "dinov2", "conv", marks=pytest.mark.slow("one of many families")
        ),
    ],
)
def test_embeddings_and_convolutions(family, kind, method, pairs, tmp_path):
    """Both directions, for modules that are no linear layers."""
    import peft

    pair = pairs(family)
    places = kra.peft.name_map(pair.backbone).by_module()
    modules = [m for m, here in places.items() if here[0][1].kind == kind]
    assert modules
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[*modules, *pair.linear()[:2]],
        use_dora=method == "dora",
    )
    if (kind, method) == ("embedding", "dora"):
        # It depends on the base kernel, which no lookup needs.
        with pytest.raises(ValueError, match="does not adapt"):
            _exchange(pair, config, tmp_path)
        assert not state_lib.is_adapted(pair.backbone)
        return
    _exchange(pair, config, tmp_path)
    kra.eject(pair.backbone)
    pair.inject(_METHODS[method](), (kind,))
    families.train(pair.backbone, scale=0.3)
    kra.peft.save(pair.backbone, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(
        pair.torch_model(), str(tmp_path / "ours")
    )
    pair.check(families.torch_outputs(model.base_model.model, pair.x))


_KERNELS = ("_dense", "_proj")


def _inject_experts(pair, adapter, ends):
    """Adapts kernels of experts whose addresses end so, and attention."""
    names = kra.peft.name_map(pair.backbone)
    sites = [
        address
        for address, parts in names.parts.items()
        if (parts[0].kind == "experts" and address.endswith(ends))
        or parts[0].module.endswith(("q_proj", "v_proj"))
    ]
    stacked = [a for a in sites if names.parts[a][0].kind == "experts"]
    report = kra.inject(pair.backbone, adapter, sites)
    assert set(report.sites) == set(sites)
    return stacked


# Half of so small a kernel is little.
@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
@pytest.mark.slow("it builds mixtures of transformers and KerasHub")
@pytest.mark.parametrize(
    ("method", "ends"),
    [
        ("lora", _KERNELS),
        ("rlora", _KERNELS),
        # One kernel of a module, or the gate without what it gates.
        ("lora", ("output_dense", "down_proj")),
        ("lora", ("gate_dense", "gate_proj")),
    ],
)
@pytest.mark.parametrize("family", families.MIXTURES)
def test_peft_reads_experts(family, method, ends, pairs, tmp_path):
    import peft

    pair = pairs(family)
    stacked = _inject_experts(pair, _METHODS[method](), ends)
    # Two layers of two or three kernels.
    assert len(stacked) >= (4 if ends == _KERNELS else 2)
    families.train(pair.backbone)
    kra.peft.save(pair.backbone, tmp_path / "adapter")
    with warnings.catch_warnings():
        # PEFT warns of keys that are missing or that it does not expect.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(
            pair.torch_model(), str(tmp_path / "adapter")
        )
    pair.check(families.torch_outputs(model.base_model.model, pair.x))

    # The file is complete for ourselves too.
    trained = families.keras_outputs(pair.backbone, pair.x)
    kra.eject(pair.backbone)
    report = kra.peft.load(pair.backbone, tmp_path / "adapter")
    assert set(stacked) <= set(report.sites)
    np.testing.assert_allclose(
        families.keras_outputs(pair.backbone, pair.x), trained, atol=1e-5
    )


@pytest.mark.slow("it builds mixtures of transformers and KerasHub")
@pytest.mark.parametrize(
    "parameters",
    [
        ["gate_up_proj", "down_proj"],
        ["experts.down_proj"],
        ["experts.gate_up_proj"],
    ],
)
@pytest.mark.parametrize("family", families.MIXTURES)
def test_we_read_experts_of_peft(family, parameters, pairs, tmp_path):
    import peft

    pair = pairs(family)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        target_parameters=parameters,
        rank_pattern={r"layers\.1\..*experts.down_proj": 2},
        use_rslora=True,
    )
    _exchange(pair, config, tmp_path)


@pytest.mark.slow("it builds mixtures of transformers and KerasHub")
@pytest.mark.parametrize(
    ("family", "block", "layers"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_we_read_experts_of_transformers_4(
    family, block, layers, pairs, tmp_path
):
    """PEFT itself makes such a directory one of parameters."""
    import peft

    pair = pairs(family)
    parameters = dict(pair.torch_model().named_parameters())
    generator = np.random.default_rng(0)
    tensors = {}
    for n in (0, 1):
        down = parameters[f"model.layers.{n}.mlp.experts.down_proj"]
        experts, width, inner = down.shape
        for e in range(experts):
            for layer in layers:
                n_in, n_out = width, inner
                if layer == layers[2]:
                    n_in, n_out = inner, width
                key = (
                    f"base_model.model.model.layers.{n}.{block}.experts.{e}."
                    f"{layer}"
                )
                for name, shape in (("A", (3, n_in)), ("B", (n_out, 3))):
                    values = 0.2 * generator.normal(size=shape)
                    tensors[f"{key}.lora_{name}.weight"] = values.astype(
                        "float32"
                    )
    peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(layers)
    ).save_pretrained(str(tmp_path))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(pair.torch_model(), str(tmp_path))
    theirs = families.torch_outputs(model.base_model.model, pair.x)
    report = kra.peft.load(pair.backbone, tmp_path)
    assert len(report.sites) in (4, 6)
    pair.check(theirs)


@pytest.mark.slow("it builds mixtures of transformers and KerasHub")
def test_dora_of_experts_is_refused(pairs, tmp_path):
    """PEFT refuses it too."""
    import peft

    pair = pairs("mixtral")
    _inject_experts(pair, _METHODS["dora"](), _KERNELS)
    with pytest.raises(ValueError, match="PEFT has no DoRA of experts"):
        kra.peft.save(pair.backbone, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    config = peft.LoraConfig(
        target_parameters=["gate_up_proj"], target_modules=[], use_dora=True
    )
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(pair.torch_model(), config)


def test_pruned_ranks_of_adalora(pairs, tmp_path):
    """PEFT leaves pruned ranks out of the file, and tells them in a mask."""
    import peft
    import torch

    pair = pairs("llama")
    modules = pair.linear()[:4]
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=modules
    )
    model = peft.get_peft_model(pair.torch_model(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape))
        for number, module in enumerate(modules):
            mask = [i != number for i in range(4)]
            name = f"{module}.lora_E.default"
            dict(model.base_model.model.named_parameters())[name][
                ~torch.tensor(mask)
            ] = 0
            config.rank_pattern = {
                **(config.rank_pattern or {}),
                name: mask,
            }
    model.eval()
    theirs = families.torch_outputs(model.base_model.model, pair.x)
    model.peft_config["default"].rank_pattern = config.rank_pattern
    model.save_pretrained(str(tmp_path / "adapter"))
    kra.peft.load(pair.backbone, tmp_path / "adapter")
    pair.check(theirs)


def test_an_adapter_for_the_base_class(pairs, tmp_path):
    import peft

    pair = pairs("llama")
    pair.inject(kra.LoRA(2))
    families.train(pair.backbone)
    kra.peft.save(pair.backbone, tmp_path / "adapter", base=True)
    model = peft.PeftModel.from_pretrained(
        pair.torch_model(task=False), str(tmp_path / "adapter")
    )
    pair.check(families.torch_outputs(model.base_model.model, pair.x))


def test_prefixes_are_those_of_transformers():
    """The names of base models in task classes, for every type."""
    import transformers

    from keras_randadapt import _compat
    from keras_randadapt.peft import family

    mapping = transformers.models.auto.modeling_auto.MODEL_MAPPING
    configs = transformers.CONFIG_MAPPING
    checked = 0
    for model_type in _compat.transformers_converters():
        if not family.prefix_of(model_type):
            continue
        try:
            model_class = mapping[configs[model_type]]
        except KeyError:
            # It has no base class of its own.
            continue
        prefix = model_class.base_model_prefix
        assert prefix == family.prefix_of(model_type), model_type
        checked += 1
    assert checked > 20
