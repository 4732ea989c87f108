"""`Update`: the change that an adapter of PEFT makes to one module."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """The change that an adapter makes to one module.

    The weight, as `(outputs, inputs)`, becomes `W + scaling * B A`. With a
    magnitude its rows get these norms. `scale_outputs` and `scale_inputs` are
    IA3's factors. `a` and `b` of experts have an axis of experts in front.

    Attributes:
        a: float64 array `(rank, inputs)`, or `None`.
        b: float64 array `(outputs, rank)`, or `None`.
        scaling: float.
        magnitude: float64 array `(outputs,)`, or `None`.
        scale_outputs: float64 array `(outputs,)`, or `None`.
        scale_inputs: float64 array `(inputs,)`, or `None`.
        own: dict from name to float64 array of what the adapter of the method
            itself is built of, beside `a` and `b`.
    """

    a: np.ndarray | None = None
    b: np.ndarray | None = None
    scaling: float = 1.0
    magnitude: np.ndarray | None = None
    scale_outputs: np.ndarray | None = None
    scale_inputs: np.ndarray | None = None
    own: dict = dataclasses.field(default_factory=dict)
