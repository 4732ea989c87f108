"""The programs that repeat tables of the DyLoRA and GaLore papers."""

import csv
import json

import data
import dylora
import galore
import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend


class TestDyLoRA:
    def test_ways_to_cut(self):
        """They are what `truncate` and `to_lora` make of the adapter."""
        model, (_, test, _) = dylora.problem(0)
        base = keras.ops.convert_to_numpy(model.get_layer("site").kernel)

        def adapted():
            template = dylora.METHODS["DyLoRA"](3)
            kra.inject(model, template, "site")
            zoo.randomize(model)
            model.compile(loss="mse")

        adapted()
        found = dylora.cut_losses(model, "LoRA", test)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(model.get_layer("site").kernel), base
        )
        for rank in (1, 5):
            adapted()
            kra.truncate(model, rank)
            expected = dylora.loss(model, test)
            kra.eject(model)
            np.testing.assert_allclose(
                found["cut"][rank - 1], expected, rtol=1e-4
            )
            adapted()
            kra.to_lora(model, rank=rank)
            expected = dylora.loss(model, test)
            kra.eject(model)
            np.testing.assert_allclose(
                found["cut by SVD"][rank - 1], expected, rtol=1e-4
            )

    def test_the_teacher_has_the_rank(self):
        """The network with the teacher's update has no loss."""
        model, ((x, y), _, _) = dylora.problem(1)
        assert dylora.loss(model, (x, y)) > 1e-3
        generator = np.random.default_rng([11, 1])
        generator.normal(size=(3, 32, 32))
        left, right = (
            np.linalg.qr(generator.normal(size=(32, 8)))[0] for _ in range(2)
        )
        update = (left * 4 * 1.5 ** -np.arange(8)) @ right.T
        model.get_layer("site").kernel.assign_add(update.astype("float32"))
        assert dylora.loss(model, (x, y)) < 1e-9


@pytest.mark.slow(reason="six small language models are compiled")
def test_galore(tmp_path, monkeypatch, capsys):
    text = "to be or not to be, that is the question: " * 200
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    path = tmp_path / "galore.csv"
    monkeypatch.setattr(
        "sys.argv",
        ["galore.py", "--quick", "--seeds", "1", "--results", str(path)],
    )
    galore.main()
    first = capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(galore.METHODS)
    found = {row["method"]: json.loads(row["numbers"]) for row in rows}
    assert all(np.isfinite(one["nats"]) for one in found.values())
    sizes = [
        found[name]["state"]
        for name in ("GaLore, two-sided", "GaLore", "full rank")
    ]
    assert sizes == sorted(sizes)
    assert found["LoRA"]["trained"] == found["ReLoRA"]["trained"]
    assert found["LoRA"]["trained"] < found["full rank"]["trained"]
    # A second time, nothing is trained again.
    monkeypatch.setattr(galore, "train", None)
    galore.main()
    assert capsys.readouterr().out == first
