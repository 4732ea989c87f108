"""`RankMonitor`: logs rank and orthogonality of deltas during training."""

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt._types import Logs
from keras_randadapt.analysis import deltas
from keras_randadapt.analysis import rank
from keras_randadapt.analysis.table import SiteTable

_LOGGED = {
    "rank": "rank",
    "effective_rank": "effective_rank",
    "orthogonality": "orthogonality_loss",
}


class RankMonitor(keras.callbacks.Callback):
    """Logs rank and orthogonality of the deltas at the ends of epochs.

    It adds `rank_mean`, `effective_rank_mean` and `orthogonality_mean`, means
    over the sites, to the epoch's logs; see `analysis.intrinsic_rank`,
    `analysis.effective_rank` and `analysis.orthogonality_loss`. `History`, the
    progress bar and the callbacks *after* it in the list see them, so put
    `TensorBoard`, `CSVLogger` or `EarlyStopping` behind it.

    It forms and decomposes the deltas one at a time on the host. A delta of
    768 by 768 takes about a tenth of a second.

    Args:
        name: Optional string. The adapter to measure. By default the deltas
            of all active adapters are added.
        frequency: int. The last of each `frequency` epochs is measured.
        per_site: Whether `rank/<address>` and so on are logged for every
            site, too.
        prefix: string that is put before every logged name.
        tolerance: Optional float. See `analysis.intrinsic_rank`.

    Attributes:
        table: The last result of `analysis.delta_statistics`, or `None`
            before the first.

    Raises:
        TypeError: If `frequency` is no integer or `prefix` no string.
        ValueError: If an argument is out of range. When training begins, if
            the model has no adapter, none of this name or none active.

    Example:

    ```python
    monitor = kra.callbacks.RankMonitor()
    history = model.fit(x, y, epochs=2, callbacks=[monitor], verbose=0)
    print(history.history["effective_rank_mean"])
    print(monitor.table)
    ```
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        frequency: int = 1,
        per_site: bool = False,
        prefix: str = "",
        tolerance: float | None = None,
    ):
        super().__init__()
        if not isinstance(prefix, str):
            raise TypeError(
                f"`prefix` must be a string. Received: prefix={prefix!r}"
            )
        if prefix.startswith("val_"):
            raise ValueError(
                "`prefix` must not begin with 'val_', which Keras takes for "
                f"results of validation. Received: prefix={prefix!r}"
            )
        self.name = name
        self.frequency = arguments.check_rank(frequency, "frequency")
        self.per_site = bool(per_site)
        self.prefix = prefix
        self.tolerance = rank.check_tolerance(tolerance)
        self.table: SiteTable = None

    def on_train_begin(self, logs: Logs = None) -> None:
        deltas.check_measurable(self.model, self.name)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if (epoch + 1) % self.frequency:
            return
        self.table = rank.delta_statistics(
            self.model, self.name, tolerance=self.tolerance
        )
        if logs is None:
            return
        for name, column in _LOGGED.items():
            values = self.table[column]
            logs[f"{self.prefix}{name}_mean"] = float(np.mean(values))
            if self.per_site:
                for site, value in zip(self.table["site"], values):
                    logs[f"{self.prefix}{name}/{site}"] = float(value)
