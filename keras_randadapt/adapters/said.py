"""SAID: one small trained vector changes all adapted kernels."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_randadapt import arguments
from keras_randadapt import ops as kra_ops
from keras_randadapt import random
from keras_randadapt._types import Config
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import base
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.sites.site import Site


@keras.saving.register_keras_serializable(package="keras_randadapt")
class SAID(base.Adapter):
    """Structure-aware intrinsic dimension.

    The delta of site `s` is `l_s * P_s(theta)`, reshaped to the kernel view.
    `theta`, `(dim,)`, is one trained vector for all sites, and `l_s` is a
    trained scalar of each site. `P_s` is a frozen random map as in Fastfood,
    which a seed determines: `P_s = c_s crop H G Q H B pad`, with orthonormal
    Hadamard transforms `H`, random signs `B`, a permutation `Q` and normal
    factors `G`, scaled so that `|P_s(v)|` is `|v|` on average. There are `dim`
    weights and one more for each site. `theta` starts at zero, so the deltas
    start at zero.

    Each step transforms two vectors whose size is that of the kernel, rounded
    up to a power of two. The draws stay in memory and take nine bytes for each
    entry of such a vector. The method measures how many dimensions a task
    needs; it makes files small but saves neither memory nor time.

    Train it at a learning rate of 1e-2 to 1e-1 (AdamW).

    Args:
        dim: int. The intrinsic dimension.
        seed: int. See `Adapter`.
        dropout: float. See `Adapter`.
        dtype: See `Adapter`.
        name: Optional string.

    Raises:
        TypeError: If `dim` is no integer.
        ValueError: If an argument is out of range.

    Example:

    ```python
    kra.inject(
        classifier, kra.SAID(100), ["query", "value"], keep_trainable="logits"
    )
    ```

    References:
        - Aghajanyan, Gupta and Zettlemoyer, "Intrinsic dimensionality
          explains the effectiveness of language model fine-tuning", ACL 2021,
          equations 2 and 3. Its code scales gradients wrongly, and
          differently for each kernel; here they are those of the map.
        - Le, Sarlos and Smola, "Fastfood", ICML 2013.
    """

    recommended_learning_rate = 3e-2

    def __init__(self, dim: int = 1000, **kwargs: Any):
        super().__init__(**kwargs)
        self.dim = arguments.check_rank(dim, "dim")

    def build(self, site: Site) -> None:
        self.theta = self.add_shared_trainable("theta", (self.dim,), "zeros")
        self.said_scale = self.add_trainable("said_scale", (), "ones")
        self._size = self.input_dim * self.output_dim
        largest = max(self._size, self.dim)
        # Kernels of similar size get one length, as in the paper.
        self._order = 1 << (largest - 1).bit_length()
        role = f"SAID/{site.number}"
        draws = {
            "signs": random.signs(self.seed, f"{role}/B", self._order),
            "factors": random.normals(self.seed, f"{role}/G", self._order),
            "order": random.permutation(self.seed, f"{role}/Q", self._order),
        }
        square = np.mean(draws["factors"].astype("float64") ** 2)
        # |crop v|^2 is size / order of |v|^2 on average.
        self._scale = math.sqrt(self._order / self._size / square)
        self._digest = "".join(random.digest(d) for d in draws.values())
        self.add_frozen_values("signs", draws["signs"])
        self.add_frozen_values("factors", draws["factors"])
        self.add_frozen_values("order", draws["order"].astype("int32"))

    def project(self, vector: Tensor) -> Tensor:
        """`P(vector)`: float32 tensors, `(dim,)` to `(input * output,)`."""
        v = ops.pad(vector, (0, self._order - self.dim))
        v = v * ops.cast(self.signs_values, "float32")
        v = kra_ops.fwht(v)
        v = ops.take(v, ops.convert_to_tensor(self.order_values), axis=0)
        v = v * ops.convert_to_tensor(self.factors_values)
        return kra_ops.fwht(v)[: self._size] * self._scale

    def delta(self, x: Tensor, training: bool | None = None) -> Tensor:
        return matmul(x, ops.cast(self.delta_kernel(), x.dtype))

    def delta_kernel(self) -> Tensor:
        theta = ops.cast(self.theta.variable, "float32")
        scale = ops.cast(self.said_scale, "float32")
        # The scalar multiplies `theta`, which is smaller than the delta.
        return ops.reshape(
            self.project(theta * scale), (self.input_dim, self.output_dim)
        )

    def basis_digest(self) -> str:
        return self._digest

    def get_config(self) -> Config:
        return {"dim": self.dim, **super().get_config()}
