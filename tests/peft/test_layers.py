"""Adapters against PEFT's layers with the same kernels and trained numbers."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import random
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


def test_hira():
    import peft

    config = peft.HiraConfig(r=3, target_modules=["site"])
    weights = {
        "hira_a": ("hira_A", np.transpose),
        "hira_b": ("hira_B", np.transpose),
    }
    peers.check(kra.HiRA(3), config, (12, 20), weights)
