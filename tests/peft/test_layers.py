"""Adapters against PEFT's layers with the same kernels and trained numbers."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
from tests import methods
from tests.peft import peers

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="PEFT computes on PyTorch, and its graphs must hold our tensors",
)


@pytest.mark.parametrize(
    "view, rank, output_rank",
    [((12, 20), 3, None), ((11, 9), 4, None), ((12, 20), 4, 5)],
)
def test_miss(view, rank, output_rank):
    import peft

    mini = {"init_weights": "mini", "mini_r": output_rank}
    config = peft.MissConfig(
        r=rank, target_modules=["site"], **(mini if output_rank else {})
    )
    peers.check(
        kra.MiSS(rank, output_rank=output_rank),
        config,
        view,
        {"shard": ("miss_block", lambda values: values)},
    )


def test_shira():
    import peft
    import torch

    template = kra.SHiRA(2)
    config = peft.ShiraConfig(r=2, target_modules=["site"])
    places = random.permutation(0, "SHiRA/dense/12x20", 240)[:64]
    mask = np.zeros(240, bool)
    mask[places] = True
    mask = mask.reshape(12, 20)
    # PEFT's kernels are transposed, and its values are in their order.
    config.mask_fn = lambda layer, r, **_: torch.tensor(mask.T).float()

    def move(values):
        kernel = np.zeros((12, 20))
        kernel[mask] = values
        return kernel.T[mask.T]

    peers.check(
        template, config, (12, 20), {"shira_values": ("shira_weight", move)}
    )


def test_fourierft():
    """With the places of the seed, which PEFT draws by PyTorch."""
    import peft
    import torch

    config = peft.FourierFTConfig(
        n_frequency=17, scaling=150.0, target_modules=["site"]
    )
    order = random.permutation(0, "FourierFT/12x20", 240)
    places = np.sort(order[:17])

    def prepare(peer):
        # PEFT's kernels are transposed.
        rows, columns = np.divmod(places, 20)
        peer.indices["default"] = torch.tensor(np.stack([columns, rows]))

    peers.check(
        kra.FourierFT(17),
        config,
        (12, 20),
        {"coefficients": ("fourierft_spectrum", lambda values: values)},
        prepare,
    )


@pytest.mark.parametrize("share", [False, True])
def test_oft(share):
    import peft

    config = peft.OFTConfig(
        oft_block_size=4,
        block_share=share,
        use_cayley_neumann=False,
        target_modules=["site"],
    )
    peers.check(
        kra.OFT(4, share_blocks=share),
        config,
        (12, 20),
        {"oft_q": (_weight_of("oft_R"), lambda values: values)},
    )


def _weight_of(attribute):
    return lambda peer: getattr(peer, attribute)["default"].weight


def test_loha():
    import peft

    # PEFT names the outputs' factors first.
    weights = {
        "loha_a1": ("hada_w1_b", np.transpose),
        "loha_b1": ("hada_w1_a", np.transpose),
        "loha_a2": ("hada_w2_b", np.transpose),
        "loha_b2": ("hada_w2_a", np.transpose),
    }
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["site"])
    peers.check(kra.LoHa(3, scaling=2.0), config, (12, 20), weights)


@pytest.mark.parametrize(
    "options",
    [{}, {"factor": 2}, {"rank": 9}, {"factor": 6, "decompose_both": True}],
    ids=str,
)
def test_lokr(options):
    import peft

    template = kra.LoKr(**{"rank": 1, "scaling": 2.0, **options})
    config = peft.LoKrConfig(
        r=template.rank,
        alpha=2 * template.rank,
        decompose_both=template.decompose_both,
        decompose_factor=template.factor or -1,
        target_modules=["site"],
    )
    names = {
        "lokr_c": "lokr_w1",
        "lokr_c_a": "lokr_w1_b",
        "lokr_c_b": "lokr_w1_a",
        "lokr_ab": "lokr_w2",
        "lokr_a": "lokr_w2_b",
        "lokr_b": "lokr_w2_a",
    }
    adapter = kra.LoKr.from_config(template.get_config())
    adapter.build_at(methods.site_of((12, 20)))
    weights = {
        one.name: (names[one.name], np.transpose)
        for one in adapter.trainable_variables
    }
    peers.check(template, config, (12, 20), weights)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_convolutions(method, tucker):
    """The update of a kernel of 3 by 2, with the same trained numbers."""
    import peft
    import torch

    options = dict(alpha=4, use_effective_conv2d=tucker)
    template, config = {
        "loha": (kra.LoHa, peft.LoHaConfig),
        "lokr": (kra.LoKr, peft.LoKrConfig),
    }[method]
    rank = 2 if method == "loha" else 1
    config = config(r=rank, target_modules=["site"], **options)
    module = torch.nn.Sequential()
    module.add_module("site", torch.nn.Conv2d(4, 6, (3, 2)))
    peer = peft.get_peft_model(module, config).base_model.model.site
    ours = template(rank, tucker=tucker, scaling=4 / rank)
    layer = keras.layers.Conv2D(6, (3, 2), name="site")
    model = keras.Sequential([keras.Input((5, 5, 4)), layer])
    kra.inject(model, ours, "site")
    adapter = layer.adapter.get("default")
    values = methods.randomize(adapter)
    channels = 2 if method == "lokr" else 4

    def rows(a):
        if tucker:
            return a.T
        # PEFT's windows are behind the channels.
        return a.T.reshape(-1, 6, channels).swapaxes(1, 2).reshape(len(a.T), -1)

    if method == "loha":
        names = {"loha_a1": "hada_w1_b", "loha_a2": "hada_w2_b"}
        names |= {"loha_b1": "hada_w1_a", "loha_b2": "hada_w2_a"}
        names |= {"loha_c1": "hada_t1", "loha_c2": "hada_t2"}
    else:
        names = {"lokr_a": "lokr_w2_b", "lokr_b": "lokr_w2_a"}
        names |= {"lokr_c": "lokr_w1", "lokr_d": "lokr_t2"}
    for name, value in values.items():
        kind = name[5]
        if kind == "a":
            value = rows(value)
        elif kind == "b":
            value = value if tucker else value.T
        elif names[name] == "lokr_w1":
            value = value.T
        else:
            # The axes of outputs and inputs come first, then the window.
            value = value.reshape(3, 2, rank, rank).transpose(3, 2, 0, 1)
        parameter = getattr(peer, names[name])["default"]
        assert tuple(parameter.shape) == value.shape
        with torch.no_grad():
            parameter.copy_(torch.tensor(value))
    delta = methods.numpy(peer.get_delta_weight("default").detach())
    found = methods.numpy(adapter.delta_kernel()).reshape(3, 2, 4, 6)
    methods.close(found, delta.transpose(2, 3, 1, 0))


def test_hira():
    import peft

    config = peft.HiraConfig(r=3, target_modules=["site"])
    weights = {
        "hira_a": ("hira_A", np.transpose),
        "hira_b": ("hira_B", np.transpose),
    }
    peers.check(kra.HiRA(3), config, (12, 20), weights)
