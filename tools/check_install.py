"""Checks an installed package: the compiled transforms are there and run.

    KERAS_BACKEND=torch python tools/check_install.py

Run it outside of the repository, or Python may import the sources instead.
"""

import keras
import numpy as np

import keras_randadapt as kra
from keras_randadapt.ops import native


def main() -> None:
    print(keras.config.backend(), kra.__version__, kra.__file__)
    library = native.library()
    if library is None:
        raise SystemExit("The compiled transforms are not installed.")
    print(library._name)
    # Each backend asks for a translation where it runs the library; in
    # PyTorch it calls it from Python.
    name = "apply" if keras.config.backend() == "torch" else "translate"
    function, calls = getattr(native, name), []

    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    setattr(native, name, counted)
    fwht = kra.ops.fwht
    if keras.config.backend() == "jax":
        import jax

        fwht = jax.jit(fwht)
    x = np.random.default_rng(0).standard_normal((5, 96), "float32")
    y = keras.ops.convert_to_numpy(fwht(keras.ops.array(x)))
    expected = x @ kra.hadamard.hadamard(96).T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    if not calls:
        raise SystemExit("The compiled transforms did not run.")


if __name__ == "__main__":
    main()
