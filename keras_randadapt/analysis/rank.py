"""Rank, spectrum and orthogonality of deltas."""

import keras
import numpy as np

from keras_randadapt._types import Axis
from keras_randadapt.analysis import deltas
from keras_randadapt.analysis import plotting
from keras_randadapt.analysis.table import SiteTable

_EPSILON = float(np.finfo("float32").eps)


class SingularValues(SiteTable):
    """A row for each site, whose `singular_values` is an array."""

    # Curves need all values, so there is no column to choose.
    def plot(  # type: ignore[override]
        self, axis: Axis | None = None, relative: bool = False
    ) -> Axis:
        """Draws a curve of singular values for each site, on a log axis.

        Args:
            axis: Optional matplotlib axis. A new one by default.
            relative: Whether to divide by each site's largest value.

        Returns:
            The axis.
        """
        axis = plotting.axis_or_new(axis)
        names = plotting.short_names(self["site"])
        for name, values in zip(names, self["singular_values"]):
            largest = values[0] if relative and values[0] else 1.0
            # A logarithmic axis cannot show zeros.
            positive = values[values > 0] / largest
            axis.plot(np.arange(1, len(positive) + 1), positive, label=name)
        axis.set_yscale("log")
        axis.set_xlabel("index")
        axis.set_ylabel("singular value" + (" (relative)" if relative else ""))
        if len(names) <= 12:
            axis.legend(fontsize="small")
        return axis


def singular_values(
    model: keras.Model, name: str | None = None
) -> SingularValues:
    """The singular values of every site's delta.

    Each site has `min(input_dim, output_dim)` values in float64, the largest
    first. Like the float32 delta, they are accurate to about 1e-7 of the
    largest. One delta is formed at a time; for methods with two thin factors,
    such as LoRA, none is formed. For an adapter that is not additive, the
    delta is the merged kernel less the base kernel.

    Args:
        model: An adapted model.
        name: Optional string. The name of one adapter, active or not. By
            default the deltas of all active adapters are added.

    Returns:
        A `SingularValues` table with the columns `site`, `layer` and
        `singular_values`. `plot` draws the spectra.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model has no adapter, none of this name or none
            active, if it is inside a `merged` block, or if a delta holds NaN
            or infinity.

    Example:

    ```python
    spectra = kra.analysis.singular_values(model)
    largest = spectra["singular_values"][0][0]
    spectra.plot()
    ```
    """
    return SingularValues(
        _measured(
            model,
            name,
            lambda site: {"singular_values": site.singular_values()},
        ),
        "singular_values",
    )


def intrinsic_rank(
    model: keras.Model,
    name: str | None = None,
    *,
    tolerance: float | None = None,
) -> SiteTable:
    """The numerical rank of every site's delta.

    It is the number of singular values above `tolerance` times the largest.
    The default, `max(input_dim, output_dim) * 2**-23`, is NumPy's rule in
    `matrix_rank` at float32's precision. It counts every direction that is
    not rounding noise; a tolerance such as 0.01 counts only large ones. The
    delta of an adapter that is not additive is a difference of kernels.
    Singular values below the rounding error of this difference,
    `4 * 2**-23 * ||merged kernel||_F`, do not count.

    Args:
        model: An adapted model.
        name: See `singular_values`.
        tolerance: Optional float in `[0, 1)`.

    Returns:
        A `SiteTable` with the columns `site`, `layer`, `input_dim`,
        `output_dim` and `rank`. `plot` draws a bar for each site.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If `tolerance` is out of range. See also
            `singular_values`.

    Example:

    ```python
    table = kra.analysis.intrinsic_rank(model, tolerance=0.01)
    print(table)
    print(table["rank"].mean())
    ```
    """
    table = delta_statistics(model, name, tolerance=tolerance)
    columns = ("site", "layer", "input_dim", "output_dim", "rank")
    return SiteTable({c: table[c] for c in columns}, "rank")


def effective_rank(model: keras.Model, name: str | None = None) -> SiteTable:
    """The effective rank and the stable rank of every site's delta.

    The effective rank is `exp(H(p))`, where `H` is the entropy and `p` are the
    singular values divided by their sum. `k` equal singular values give `k`,
    and small ones count little. The stable rank, `||delta||_F^2 /
    ||delta||_2^2`, is at most the rank and changes less under noise. Both are
    0 for a delta of zeros.

    Args:
        model: An adapted model.
        name: See `singular_values`.

    Returns:
        A `SiteTable` with the columns `site`, `layer`, `effective_rank` and
        `stable_rank`. `plot` draws a bar for each site.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: See `singular_values`.

    Example:

    ```python
    table = kra.analysis.effective_rank(model)
    table.plot(column="stable_rank")
    ```

    References:
        - Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    table = delta_statistics(model, name)
    columns = ("site", "layer", "effective_rank", "stable_rank")
    return SiteTable({c: table[c] for c in columns}, "effective_rank")


def orthogonality_loss(
    model: keras.Model, name: str | None = None
) -> SiteTable:
    """The distance of every site's delta from one with orthonormal columns.

    It is `||D D' - I||_F^2` for the transpose `D`, `(output_dim, input_dim)`,
    of the delta; in singular values, `sum((s_i^2 - 1)^2)` over the output
    dimension. For a delta of rank `R` it is at least `output_dim - R`. The
    column `floor` has this value for the numerical rank. LoRA with orthonormal
    factors reaches the floor, and so does RLoRA with `alpha` and `beta` 1.

    Args:
        model: An adapted model.
        name: See `singular_values`.

    Returns:
        A `SiteTable` with the columns `site`, `layer`, `orthogonality_loss`
        and `floor`. `plot` draws a bar for each site.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: See `singular_values`.

    Example:

    ```python
    table = kra.analysis.orthogonality_loss(model)
    print(table["orthogonality_loss"] - table["floor"])
    ```

    References:
        - [RM-LoRA](https://arxiv.org/abs/2407.12074), table 5.
    """
    table = delta_statistics(model, name)
    return SiteTable(
        {
            "site": table["site"],
            "layer": table["layer"],
            "orthogonality_loss": table["orthogonality_loss"],
            "floor": table["output_dim"] - table["rank"],
        },
        "orthogonality_loss",
    )


def delta_statistics(
    model: keras.Model,
    name: str | None = None,
    *,
    tolerance: float | None = None,
) -> SiteTable:
    """All measures of every site's delta, from one pass over the deltas.

    Args:
        model: An adapted model.
        name: See `singular_values`.
        tolerance: See `intrinsic_rank`.

    Returns:
        A `SiteTable` with the columns `site`, `layer`, `input_dim`,
        `output_dim`, `rank`, `effective_rank`, `stable_rank`,
        `orthogonality_loss`, `frobenius_norm` and `spectral_norm`.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: See `intrinsic_rank`.

    Example:

    ```python
    table = kra.analysis.delta_statistics(model)
    table.to_csv("deltas.csv")
    ```
    """
    tolerance = check_tolerance(tolerance)

    def measure(site):
        values = site.singular_values()
        return {
            "input_dim": site.shape[0],
            "output_dim": site.shape[1],
            "rank": _rank(values, site, tolerance),
            "effective_rank": _effective_rank(values, site),
            "stable_rank": _stable_rank(values, site),
            "orthogonality_loss": site.orthogonality_loss(),
            "frobenius_norm": float(np.sqrt(np.sum(values**2))),
            "spectral_norm": float(values[0]),
        }

    return SiteTable(_measured(model, name, measure), "rank")


def check_tolerance(tolerance):
    """Validates a relative tolerance; `None` means the default."""
    if tolerance is None:
        return None
    try:
        value = float("nan" if isinstance(tolerance, str) else tolerance)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value < 1:
        raise ValueError(
            "`tolerance` must be at least 0 and below 1: it is relative to "
            f"the largest singular value. Received: tolerance={tolerance!r}"
        )
    return value


def _measured(model, name, measure):
    """The columns of a table with the results of `measure` for every site."""
    columns = {"site": [], "layer": []}
    for site in deltas.site_deltas(model, name):
        columns["site"].append(site.address)
        columns["layer"].append(site.layer.path)
        for column, value in measure(site).items():
            columns.setdefault(column, []).append(value)
    return columns


def _rank(values, site, tolerance):
    if tolerance is None:
        tolerance = max(site.shape) * _EPSILON
    threshold = max(tolerance * values[0], site.noise)
    return int(np.sum(values > threshold))


def _without_noise(values, site):
    return np.where(values > site.noise, values, 0.0)


def _effective_rank(values, site):
    values = _without_noise(values, site)
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def _stable_rank(values, site):
    values = _without_noise(values, site)
    if values[0] == 0:
        return 0.0
    return float(np.sum((values / values[0]) ** 2))
