"""Writes the files of `version_1/`, at commit 6fb3c7c, with Keras 3.15.1.

    PYTHONPATH=. KERAS_BACKEND=torch python make_version_1.py FOLDER

Later versions must load them: `tests/model/test_files_of_before.py`.
"""

import pathlib
import sys

import keras
import numpy as np

import keras_randadapt as kra
from tests import zoo
from tests.test_matrix import METHODS

#: What the matrix has no row for.
OTHERS = {
    "lora_olora": lambda seed: kra.LoRA(2, initialization="olora", seed=seed),
}
#: Whole-model files are larger, so there are a few.
WHOLE_MODELS = ("lora", "rlora", "dora_randlora")


def model():
    return zoo.set_weights(
        keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="tanh", name="hidden"),
                keras.layers.Dense(3, name="head"),
            ]
        )
    )


def main(folder):
    folder.mkdir(exist_ok=True)
    x = zoo.normal(5, 6)
    outputs = {}
    for name, make in {**METHODS, **OTHERS}.items():
        one = model()
        kra.inject(one, make(7), "hidden", keep_trainable="head")
        zoo.randomize(one, seed=3)
        one.get_layer("head").bias.assign([0.5, -0.25, 1.0])
        outputs[name] = zoo.outputs(one, x)
        kra.save_adapter(one, folder / f"{name}.safetensors")
        if name in WHOLE_MODELS:
            one.save(folder / f"{name}.keras")
    np.savez(folder / "outputs.npz", x=x, **outputs)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
