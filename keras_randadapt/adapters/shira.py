"""SHiRA: few entries of the kernel are trained, and all others stay."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Config
from keras_randadapt.adapters.formed import FormedAdapter
from keras_randadapt.bases.places import Places
from keras_randadapt.bases.places import RegularPlaces
from keras_randadapt.sites.site import Site

MASKS = ("random", "magnitude", "structured")


@keras.saving.register_keras_serializable(package="keras_randadapt")
class SHiRA(FormedAdapter):
    """Sparse high-rank adaptation.

    The delta is `scaling * S`, where `S` is a sparse matrix of the kernel
    view's shape. Its values at `rank * (input_dim + output_dim)` places are
    trained, as many as a LoRA of this rank has, and all others are zero. The
    values start at zero, so the delta starts at zero. `rank` sizes the adapter
    only: the delta's rank is nearly always full.

    No file has the places, so that it holds the values alone. They are

    - with `mask="random"`, drawn from the seed. Layers of one name and shape
      share them;
    - with `mask="magnitude"`, those of the kernel's largest entries. The file
      then has a hash of the places and is refused on another base model. Load
      a base model's weights before the adapter is attached;
    - with `mask="structured"`, the diagonal, and `rank - 1` rows and as many
      columns at regular distances, which are fewer weights.

    A step forms the delta, adds it to the kernel and multiplies each input
    once. In use it costs nothing once it is merged. Beyond the base product,
    the backward pass computes the gradient of a whole kernel, of which it takes
    the entries that are trained. With dropout in training, in 16 bits, where
    the kernel would absorb a small delta, and beside other active adapters the
    delta is multiplied apart.

    Train it at a learning rate of 1e-4 to 1e-3 (AdamW).

    Args:
        rank: int. The number of trained entries is that of a LoRA of this
            rank.
        mask: `"random"`, `"magnitude"` or `"structured"`.
        scaling: float. A constant factor of the delta.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If an argument is out of range. At injection, if a site
            would have more trained entries than its kernel view has.

    Example:

    ```python
    kra.inject(
        classifier, kra.SHiRA(8), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024
          ([arXiv 2406.13175](https://arxiv.org/abs/2406.13175)), section 3:
          SHiRA-Rand, SHiRA-WM and SHiRA-Struct. Their code masks gradients of
          whole kernels; here only the values are variables.
    """

    recommended_learning_rate = 5e-4

    def __init__(
        self,
        rank: int = 8,
        *,
        mask: str = "random",
        scaling: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = arguments.check_rank(rank)
        self.mask = arguments.check_choice(mask, MASKS, "mask")
        self.scaling = arguments.check_scaling(scaling)
        self.depends_on_base = mask == "magnitude"

    def check(self, site: Site) -> None:
        dims = site.input_dim, site.output_dim
        if self.rank * sum(dims) > dims[0] * dims[1]:
            most = dims[0] * dims[1] // sum(dims)
            raise ValueError(
                f"`rank` must be at most {most} for a kernel view {dims}: a "
                "larger rank trains more entries than the kernel has. "
                f"Received: rank={self.rank}. Lower the rank, or leave the "
                "site out with `exclude`."
            )

    def build(self, site: Site) -> None:
        self.check(site)
        dims = site.input_dim, site.output_dim
        count = self.rank * sum(dims)
        self._places = Places(*dims, count, self.seed, f"SHiRA/{site.role}")
        if self.mask == "structured":
            self._places = RegularPlaces(*dims, self.rank - 1)
        shape = self._places.shape
        self.shira_values = self.add_trainable("shira_values", shape, "zeros")
        if self.mask == "magnitude":
            self.places = self.add_derived("places", shape, "int32")
        else:
            self.add_frozen("places", self._places)

    def start_from(self, kernel: np.ndarray) -> None:
        if self.mask == "magnitude":
            # The sort is stable, so equal entries are taken in their order.
            order = np.argsort(-np.abs(kernel).ravel(), kind="stable")
            count = self._places.shape[0]
            self.places.assign(np.sort(order[:count]).astype("int32"))

    def derived_digest(self) -> str:
        if self.mask != "magnitude":
            return ""
        return random.digest(ops.convert_to_numpy(self.places))

    def basis_digest(self) -> str:
        return "" if self.mask == "magnitude" else self._places.digest()

    def trained_places(self) -> np.ndarray:
        """The places of the trained entries in the flattened kernel view.

        Returns:
            int32 array, in ascending order, one place for each value.
        """
        return ops.convert_to_numpy(self._where())

    def _where(self):
        if self.mask == "magnitude":
            return ops.convert_to_tensor(self.places)
        return self._places.tensor()

    def _terms(self):
        values = ops.cast(self.shira_values, "float32")
        if self.scaling != 1:
            values = values * self.scaling
        return (self._where(),), (values,)

    def _formed(self, places, values):
        size = self.input_dim * self.output_dim
        flat = ops.segment_sum(values, places, num_segments=size)
        return ops.reshape(flat, (self.input_dim, self.output_dim))

    def _kernels(self, weights, dtype):
        values = ops.transpose(weights["shira_values"] * self.scaling)
        size = self.input_dim * self.output_dim
        flat = ops.segment_sum(values, self._where(), num_segments=size)
        shape = (-1, self.input_dim, self.output_dim)
        return ops.cast(ops.reshape(ops.transpose(flat), shape), dtype)

    def _gradients(self, terms, of_delta):
        return None, ops.take(ops.reshape(of_delta, (-1,)), terms[0], axis=0)

    def get_config(self) -> Config:
        return {
            "rank": self.rank,
            "mask": self.mask,
            "scaling": self.scaling,
            **super().get_config(),
        }
