"""FourierFT: few coefficients of the update's Fourier transform."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Initializer
from keras_randadapt.adapters.formed import FormedAdapter
from keras_randadapt.bases.places import Places
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class FourierFT(FormedAdapter):
    """Fine-tuning by few coefficients of a Fourier transform.

    The delta is `scaling * Re(IDFT(F))`, where `F` is a matrix of the kernel
    view's shape with `count` entries, its *coefficients*, at places that the
    seed gives, and zeros elsewhere. `IDFT` is the inverse discrete Fourier
    transform of both axes, which divides by `input_dim * output_dim`:

    `delta[p, q] = scaling / (input_dim * output_dim) * sum_k c[k] *
    cos(2 pi (i[k] p / input_dim + j[k] q / output_dim))`.

    Only the `count` coefficients are trained at a site, whatever its size. All
    sites of one shape have the same places, as in the paper, and no file holds
    them. The delta's rank is up to twice `count`, so it is nearly always full.

    A step forms the delta by a fast transform, adds it to the kernel and
    multiplies each input once. In use it costs nothing once it is merged.
    Beyond the base product, the backward pass computes the gradient of a whole
    kernel and its transform. With dropout in training, in 16 bits, where the
    kernel would absorb a small delta, and beside other active adapters the
    delta is multiplied apart.

    Train it at a learning rate of 1e-2 to 1e-1 (AdamW) with the default
    `scaling`. The smaller kernels are, the smaller `scaling` should be.

    Args:
        count: int. The number of coefficients.
        scaling: float. A constant factor of the delta.
        initializer: The first values of the coefficients: `"zeros"`, so that
            the delta starts at zero, `"normal"` as in the paper's code, where
            the adapted model differs from the base model from the start, or
            what `a_initializer` of `LoRA` takes.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `count` is no integer.
        ValueError: If an argument is out of range. At injection, if `count`
            exceeds the number of entries of a kernel view.

    Example:

    ```python
    kra.inject(
        classifier,
        kra.FourierFT(200),
        ["query", "value"],
        keep_trainable="logits",
    )
    ```

    References:
        - Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier
          Transform", ICML 2024
          ([arXiv 2405.03003](https://arxiv.org/abs/2405.03003)), equations 2
          to 4.
        - Hugging Face PEFT, `FourierFTConfig`, whose `n_frequency` is `count`.
          It draws places with PyTorch, so no file of its has the places of a
          seed here.
    """

    recommended_learning_rate = 3e-2

    def __init__(
        self,
        count: int = 1000,
        *,
        scaling: float = 150.0,
        initializer: Initializer = "zeros",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.count = arguments.check_rank(count, "count")
        self.scaling = arguments.check_scaling(scaling)
        self.initializer = arguments.check_initializer(
            initializer, "initializer"
        )

    def check(self, site: Site) -> None:
        dims = site.input_dim, site.output_dim
        if self.count > dims[0] * dims[1]:
            raise ValueError(
                f"`count` must be at most {dims[0] * dims[1]}, the number of "
                f"entries of a kernel view {dims}. Received: count="
                f"{self.count}. Lower it, or leave the site out with `exclude`."
            )

    def build(self, site: Site) -> None:
        self.check(site)
        dims = site.input_dim, site.output_dim
        self._places = Places(*dims, self.count, self.seed, "FourierFT")
        self.coefficients = self.add_trainable(
            "coefficients", (self.count,), self.initializer
        )
        self.add_frozen("places", self._places)

    def basis_digest(self) -> str:
        return self._places.digest()

    def trained_places(self) -> np.ndarray:
        """The places of the coefficients in the flattened kernel view.

        Returns:
            int32 array, in ascending order, one place for each coefficient.
        """
        return ops.convert_to_numpy(self._places.tensor())

    def _terms(self):
        values = ops.cast(self.coefficients, "float32")
        return (self._places.tensor(),), (values,)

    def _transformed(self, matrix):
        """The scaled real part of a transform of the last two axes.

        The matrix is real, so both directions have the same real part, and
        the map is its own transpose.
        """
        size = self.input_dim * self.output_dim
        real, _ = ops.fft2((matrix, ops.zeros_like(matrix)))
        return real * (self.scaling / size)

    def _formed(self, places, values):
        size = self.input_dim * self.output_dim
        flat = ops.segment_sum(values, places, num_segments=size)
        return self._transformed(
            ops.reshape(flat, (self.input_dim, self.output_dim))
        )

    def _kernels(self, weights, dtype):
        values = ops.cast(ops.transpose(weights["coefficients"]), "float32")
        size = self.input_dim * self.output_dim
        flat = ops.segment_sum(values, self._places.tensor(), num_segments=size)
        shape = (-1, self.input_dim, self.output_dim)
        return ops.cast(
            self._transformed(ops.reshape(ops.transpose(flat), shape)), dtype
        )

    def _gradients(self, terms, of_delta):
        flat = ops.reshape(self._transformed(of_delta), (-1,))
        return None, ops.take(flat, terms[0], axis=0)

    def get_config(self) -> Config:
        return {
            "count": self.count,
            "scaling": self.scaling,
            "initializer": arguments.serialize_initializer(self.initializer),
            **super().get_config(),
        }
