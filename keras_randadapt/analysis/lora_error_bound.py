"""`lora_error_bound`: theorem 3.1 of the RM-LoRA paper in numbers."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keras_randadapt import arguments
from keras_randadapt.analysis.table import Table

NORMS = ("trace", "frobenius")


class LoRAErrorBound(Table):
    """A row for each layer of the target. See `lora_error_bound`.

    The columns are `layer`, `rank`, the sum of the ranks of its part,
    `discrepancy`, `||E_i||_F`, and `error`, `e_i`.

    Attributes:
        magnitude: float. `beta`.
        bound: float. The right-hand side of equation 8.
        exact: bool. Whether the ranks suffice to reach the target exactly.
    """

    def __init__(
        self, columns: Mapping[str, Any], magnitude: float, bound: float
    ):
        super().__init__(columns)
        self.magnitude = magnitude
        self.bound = bound

    @property
    def exact(self) -> bool:
        return not np.any(self["error"])

    def __repr__(self):
        return (
            f"{super().__repr__()}\n"
            f"magnitude {self.magnitude:.4g}, bound {self.bound:.4g}"
        )


def lora_error_bound(
    target: Sequence[tuple[ArrayLike, ArrayLike]],
    frozen: Sequence[ArrayLike],
    ranks: int | Sequence[int],
    second_moment: ArrayLike,
    *,
    partition: Sequence[Sequence[int]] | None = None,
    norm: str = "trace",
) -> LoRAErrorBound:
    """A bound of what LoRA of given ranks must miss in a ReLU network.

    A frozen network of layers `W_l`, `(D, D)`, is adapted to be like a target
    network of fewer layers `T_i` with biases `b_i`. Both have a ReLU behind
    each layer. The frozen layers are partitioned into consecutive parts `P_i`,
    one for each layer of the target. With `E_i = T_i - prod_{l in P_i} W_l`,
    the error of layer `i` is

        e_i = sigma_k(E_i),  k = 1 + sum_{l in P_i} rank_l

    the first singular value that the ranks do not reach; 0 where there is
    none. Then some LoRA adapters and biases reach, with `L` layers of the
    target and inputs of second moment `S = E[x x']`,

        E ||f(x) - target(x)|| <= beta sum_i max_k (|T_k| + e_k)^(L - i) e_i
        beta = max(m, max_i (m prod_{j <= i} |T_j|
                             + sum_{j <= i} prod_{j < k <= i} |T_k| |b_j|))

    with Frobenius norms `|T_k|` and `m = sqrt(trace(S))`. The bound tells how
    the error falls with the ranks. It is loose for real networks, whose layers
    are neither square nor all of ReLU.

    The paper prints `m = sqrt(|S|)`, and products that end at `i - 1`. The
    proof needs `E ||x|| <= m`, which holds for the root of the trace and not
    for that of the smaller Frobenius norm, and a bias goes through layer `i`
    too. `norm="frobenius"` computes `m` as printed; the proof's adapters can
    then miss by more than the bound.

    Args:
        target: list of `(weight, bias)` of the target's layers. A weight is
            `(D, D)`, a Keras kernel: `y = relu(x W + b)`.
        frozen: list of the frozen layers' kernels, `(D, D)`, from input to
            output.
        ranks: int, or one for each frozen layer.
        second_moment: Array `(D, D)`, symmetric: `S`.
        partition: Optional list of lists of numbers of frozen layers. By
            default they are divided as evenly as possible.
        norm: `"trace"` or `"frobenius"`.

    Returns:
        A `LoRAErrorBound` table with the columns `layer`, `rank`,
        `discrepancy` and `error`, and the bound as an attribute.

    Raises:
        TypeError: If a rank is no integer.
        ValueError: If shapes differ, if there are fewer frozen layers than
            target layers, or if the partition does not cover the frozen layers
            in order.

    Example:

    ```python
    generator = np.random.default_rng(0)
    frozen = generator.normal(size=(4, 8, 8)) / 3
    target = [(w, np.zeros(8)) for w in generator.normal(size=(2, 8, 8)) / 3]
    for rank in (1, 2, 4):
        print(kra.analysis.lora_error_bound(target, frozen, rank, np.eye(8)))
    ```

    References:
        - RM-LoRA ([arXiv 2407.12074](https://arxiv.org/abs/2407.12074)),
          theorem 3.1 and equations 8 and 9.
        - Zeng and Lee, "The Expressive Power of Low-Rank Adaptation", ICLR
          2024, theorem 6.
    """
    arguments.check_choice(norm, NORMS, "norm")
    moment = np.asarray(second_moment, "float64")
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(
            "`second_moment` must be a square matrix. "
            f"Received: shape {moment.shape}"
        )
    width = len(moment)
    weights = _matrices([w for w, _ in target], width, "target")
    biases = [np.asarray(b, "float64") for _, b in target]
    for i, bias in enumerate(biases):
        if bias.shape != (width,):
            raise ValueError(
                f"The bias of `target[{i}]` must have shape ({width},). "
                f"Received: shape {bias.shape}"
            )
    layers = _matrices(frozen, width, "frozen")
    parts = _partition(partition, len(weights), len(layers))
    if isinstance(ranks, (int, np.integer)):
        ranks = [ranks] * len(layers)
    ranks = [arguments.check_rank(rank, "ranks") for rank in ranks]
    if len(ranks) != len(layers):
        raise ValueError(
            f"`ranks` must be one number or {len(layers)}, one for each frozen "
            f"layer. Received: {len(ranks)}"
        )

    rows = []
    for i, part in enumerate(parts):
        product = np.eye(width)
        for number in part:
            product = product @ layers[number]
        values = np.linalg.svd(weights[i] - product, compute_uv=False)
        # What is below rounding does not count as a rank.
        values[values < width * np.finfo("float64").eps * values[0]] = 0.0
        rank = sum(ranks[number] for number in part)
        error = float(values[rank]) if rank < width else 0.0
        rows.append((i, rank, float(np.linalg.norm(values)), error))
    columns = dict(zip(("layer", "rank", "discrepancy", "error"), zip(*rows)))

    norms = [float(np.linalg.norm(w)) for w in weights]
    total = np.trace(moment) if norm == "trace" else np.linalg.norm(moment)
    start = math.sqrt(float(total))
    magnitude = length = start
    for size, bias in zip(norms, biases):
        # It is the largest norm that the target's layer may give.
        length = size * length + float(np.linalg.norm(bias))
        magnitude = max(magnitude, length)
    errors = columns["error"]
    growth = max(size + error for size, error in zip(norms, errors))
    bound = magnitude * sum(
        growth ** (len(errors) - 1 - i) * error
        for i, error in enumerate(errors)
    )
    return LoRAErrorBound(columns, magnitude, bound)


def _matrices(given, width, argument):
    matrices = [np.asarray(matrix, "float64") for matrix in given]
    if not matrices:
        raise ValueError(f"`{argument}` must have at least one layer.")
    for i, matrix in enumerate(matrices):
        if matrix.shape != (width, width):
            raise ValueError(
                f"The weight of `{argument}[{i}]` must have the shape of "
                f"`second_moment`, {(width, width)}. "
                f"Received: shape {matrix.shape}"
            )
        if not np.all(np.isfinite(matrix)):
            raise ValueError(f"`{argument}[{i}]` holds NaN or infinity.")
    return matrices


def _partition(partition, targets, layers):
    if targets > layers:
        raise ValueError(
            f"`frozen` must have at least as many layers as `target`, "
            f"{targets}. Received: {layers}"
        )
    if partition is None:
        return [list(p) for p in np.array_split(np.arange(layers), targets)]
    parts = [list(part) for part in partition]
    flat = [number for part in parts for number in part]
    if len(parts) != targets or not all(parts) or flat != list(range(layers)):
        raise ValueError(
            f"`partition` must split the numbers 0 to {layers - 1} in order "
            f"into {targets} parts that are not empty. Received: {partition}"
        )
    return parts
