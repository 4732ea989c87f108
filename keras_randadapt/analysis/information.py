"""`layer_information`: the information about training data in each site."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_randadapt._types import Axis
from keras_randadapt.analysis import plotting
from keras_randadapt.analysis.table import SiteTable
from keras_randadapt.analysis.table import Table


class LayerInformation(SiteTable):
    """A row for each site, a column for each estimation.

    See `layer_information`.

    Attributes:
        values: float64 array, `(estimations, sites)`.
    """

    def __init__(self, sites: Sequence[str], values: np.ndarray):
        columns = {"site": sites}
        for i, row in enumerate(values):
            columns[f"estimation_{i + 1}"] = row
        super().__init__(columns, f"estimation_{len(values)}")
        self.values = values

    # There is one measure, so there is no column to choose.
    def plot(self, axis: Axis | None = None) -> Axis:  # type: ignore[override]
        """Draws a heat map: sites from top to bottom, estimations along x.

        Args:
            axis: Optional matplotlib axis. A new one by default.

        Returns:
            The axis.
        """
        axis = plotting.axis_or_new(axis)
        estimations, sites = self.values.shape
        image = axis.imshow(
            self.values.T,
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, estimations + 0.5, sites - 0.5, -0.5),
        )
        plotting.label_sites(axis.yaxis, self["site"])
        axis.set_xlabel("estimation")
        axis.figure.colorbar(image, ax=axis, label="information")
        return axis

    def flows(self) -> Table:
        """How information moves between sites from one estimation to the next.

        With the shares `p_s` of the information of one estimation that sites
        `s = 0, ..., S - 1` hold, in the model's order, the columns are

        - `estimation`, from 1 on, and `total`, the sum over sites;
        - `depth`: `sum_s p_s s / (S - 1)`, from 0 at the model's input to 1 at
          its output, and `spread`, the standard deviation around it;
        - `sites`: `exp(-sum_s p_s log p_s)`, the number of sites that would
          hold as much if all held the same;
        - `moved`: `sum_s |p_s - q_s| / 2` for the shares `q_s` of the
          estimation before: the part of the information that is elsewhere.

        In the first row `moved` is NaN, and in rows without information all
        but `total` are.

        Returns:
            A `Table` with a row for each estimation.
        """
        count = self.values.shape[1]
        totals = self.values.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = self.values / totals[:, None]
            # NaN stays NaN, and `0 log 0` is 0.
            logs = np.where(shares == 0, 0.0, np.log(shares))
        places = np.arange(count) / max(count - 1, 1)
        depth = shares @ places
        variance = np.sum(shares * (places - depth[:, None]) ** 2, axis=1)
        moved = np.abs(np.diff(shares, axis=0)).sum(axis=1) / 2
        return Table(
            {
                "estimation": np.arange(1, len(totals) + 1),
                "total": totals,
                "depth": depth,
                "spread": np.sqrt(variance),
                "sites": np.exp(-np.sum(shares * logs, axis=1)),
                "moved": np.concatenate([[np.nan], moved]),
            }
        )


def layer_information(
    callback: Any, *, normalize: bool = False
) -> LayerInformation:
    """The PAC-Bayes information in each site's weights during training.

    `callbacks.PACBayes` estimates at the ends of epochs how much information
    about the training data the weights of each site hold. This function
    returns the estimates as a table.

    Args:
        callback: The callback after training, or any object with its two
            attributes: `information`, of shape `(estimations, sites)`, and
            `sites`, as many addresses.
        normalize: Whether the values are each site's share of an estimation's
            sum.

    Returns:
        A `LayerInformation` table with the column `site` and one for each
        estimation, in order: `estimation_1` and so on. `plot` draws a heat
        map, and `flows` tells in numbers where information is and how it moves.

    Raises:
        TypeError: If `callback` lacks the two attributes.
        ValueError: If it has estimated nothing yet, or if the shapes of the
            two differ.

    Example:

    ```python
    import types

    callback = types.SimpleNamespace(
        sites=["block_0/query", "block_1/query"],
        information=[[0.1, 0.3], [0.2, 0.9]],
    )
    table = kra.analysis.layer_information(callback)
    table.plot()
    print(table.flows())
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equation 18 and
          figure 3.
    """
    if not hasattr(callback, "information") or not hasattr(callback, "sites"):
        raise TypeError(
            "`callback` must be a `callbacks.PACBayes` that has been through "
            "training, or have its attributes `information` and `sites`. "
            f"Received: callback of type {type(callback).__name__}"
        )
    sites = list(callback.sites or ())
    values = np.asarray(
        [] if callback.information is None else callback.information, "float64"
    )
    if values.size == 0:
        raise ValueError(
            "`callback` has estimated no information yet. Give it to "
            "`model.fit(callbacks=[...])` and train an epoch first."
        )
    if values.ndim != 2 or values.shape[1] != len(sites):
        raise ValueError(
            "`callback.information` must have shape (estimations, "
            f"{len(sites)}), a column for each of `callback.sites`. "
            f"Received: shape {values.shape}"
        )
    if normalize:
        totals = values.sum(axis=1, keepdims=True)
        # Before training, the sum may be 0.
        values = values / np.where(totals == 0, 1, totals)
    return LayerInformation(sites, values)
