"""`AdapterCheckpoint`: adapter files during `fit`, from which it goes on."""

import os
import re
import string
import tempfile
import warnings

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt._types import Logs
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.model import checks
from keras_randadapt.model import load
from keras_randadapt.model import paths
from keras_randadapt.model import save
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import training_file
from keras_randadapt.model import transaction
from keras_randadapt.model import weighting

# The parts of a metric's name from which `mode="auto"` infers the direction.
_UP = re.compile(
    r"acc|auc|precision|recall|f1|f_?beta|iou|r2|score|similarity|top_"
)
_DOWN = re.compile(
    r"loss|error|mse|mae|mape|msle|entropy|divergence|perplexity"
)


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves an adapter during `fit`, and what is needed to go on with it.

    It has the habits of Keras's `ModelCheckpoint`, and writes kilobytes: the
    adapter file, and beside it a training file with the optimizer's variables
    and the state of random generators. `resume` reads the latter.

    Args:
        filepath: The path of the adapter files, by convention
            `*.safetensors`. It may have fields for the epoch, which counts from
            1, and for logs: `"{epoch:02d}-{val_loss:.2f}.safetensors"`.
            Without fields, the file is overwritten. The training file has the
            same name without the fields and the ending
            `.training.safetensors`.
        name: Optional string. The adapter to save; by default the only one.
            The training file has all that are trained.
        monitor: The name in the logs by which `save_best_only` decides.
        mode: `"min"`, `"max"`, or `"auto"`, which infers it from the name.
        save_best_only: Whether the adapter file is written only when the
            monitored value is better than before. The training file is always
            written.
        save_freq: `"epoch"`, or an int, a number of batches.
        keep: Optional int. The number of adapter files to keep; older ones of
            this run are removed.
        verbose: 0 for silence, 1 for a line whenever something is saved.

    Attributes:
        best: The best value so far, or `None`.
        training_file: The path of the training file.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or if `mode="auto"` can't
            tell the direction. When training begins, if the model has no
            adapter or several and no `name`.

    Example:

    ```python
    checkpoint = kra.callbacks.AdapterCheckpoint("best.safetensors")
    epoch = checkpoint.resume(model)  # 0 if there is nothing to go on with.
    model.fit(x, y, epochs=3, initial_epoch=epoch, callbacks=[checkpoint])
    ```
    """

    def __init__(
        self,
        filepath: str | bytes | os.PathLike,
        name: str | None = None,
        *,
        monitor: str = "val_loss",
        mode: str = "auto",
        save_best_only: bool = False,
        save_freq: str | int = "epoch",
        keep: int | None = None,
        verbose: int = 0,
    ):
        super().__init__()
        self.filepath = paths.check_path(filepath)
        self._fields = _fields(self.filepath)
        self.name = name
        self.monitor = monitor
        self.save_best_only = bool(save_best_only)
        self.mode = _checked_mode(mode, monitor)
        self.save_freq = save_freq
        self._frequency: int | None = None
        if save_freq != "epoch":
            self._frequency = arguments.check_rank(save_freq, "save_freq")
        self.keep = keep
        if keep is not None:
            self.keep = arguments.check_rank(keep, "keep")
        self.verbose = verbose
        self.best: float | None = None
        self.training_file = _training_file(self.filepath)
        self._epoch = 0
        self._batches = 0
        self._last_batch = -1
        self._written: list[str] = []

    def resume(self, model: keras.Model) -> int:
        """Goes on with an interrupted training.

        The model gets the adapters, the optimizer's variables and the random
        state of the last save. On the same backend, the training then takes
        the same steps as one that was not interrupted, if `fit` gets the same
        batches in the same order and the save was at the end of an epoch.
        Other callbacks have a state of their own, which this file does not
        have.

        Args:
            model: The model, made, injected and compiled as before.

        Returns:
            int, the number of epochs that were completed, for `initial_epoch`.
            0 if there is no training file; the model is then untouched.

        Raises:
            ValueError: If the file is damaged or of another training. The
                model is then unchanged.
        """
        state_lib.check_is_model(model)
        if not os.path.exists(self.training_file):
            return 0
        paths.check_readable(self.training_file)
        adapters, tensors, metadata = training_file.read(self.training_file)
        state = state_lib.state_of(model)
        if sorted(adapters) != sorted(state.trained):
            raise ValueError(
                f"'{self.training_file}' has the adapters {sorted(adapters)}, "
                f"and this model trains {sorted(state.trained)}. Inject the "
                "adapters as before."
            )
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                f"Model '{model.name}' is not compiled. Compile it as before, "
                "so that its optimizer can go on."
            )
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        training_file.check(self.training_file, model, tensors, metadata)
        loadings = self._checked(model, adapters)
        with transaction.change(model) as change:
            for loading in loadings:
                loading.assign(change)
            training_file.restore(change, tensors)
        told = metadata["told"]
        self.best = told["best"]
        self._written = list(told["written"])
        self._batches = told["batches"]
        return told["epochs"]

    def _checked(self, model, adapters):
        """The adapter files inside of the training file, as `Loading`s."""
        loadings = []
        with tempfile.TemporaryDirectory() as folder:
            for i, (name, data) in enumerate(adapters.items()):
                path = os.path.join(folder, f"{i}.safetensors")
                with open(path, "wb") as file:
                    file.write(data)
                try:
                    loading = load.checked(model, path, name)
                    loading.check_base_weights("error")
                except ValueError as error:
                    raise ValueError(
                        f"'{self.training_file}' does not fit this model: "
                        f"{error}"
                    ) from error
                state = model._randadapt
                weight = weighting.of(state, [name])[name]
                if weight != loading.attachment.weight:
                    raise ValueError(
                        f"In '{self.training_file}' the adapter '{name}' has "
                        f"the weight {loading.attachment.weight:g}, and in "
                        f"this model {weight:g}. Call `set_active` as before."
                    )
                loadings.append(loading)
        return loadings

    def on_train_begin(self, logs: Logs = None) -> None:
        state = state_lib.state_of(self.model)
        checks.one_name(state, self.name)
        for path in (self.training_file, self._path(1, None)):
            if path is not None:
                paths.check_writable(path)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._epoch = epoch
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._frequency is None:
            return
        # With `steps_per_execution` not every batch comes here.
        self._batches += batch - self._last_batch
        self._last_batch = batch
        if self._batches >= self._frequency:
            self._batches = 0
            self._save(self._epoch, logs, self._epoch)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self._frequency is None:
            self._save(epoch, logs, epoch + 1)

    def _save(self, epoch, logs, epochs):
        if self._is_to_be_saved(epoch, logs):
            path = self._path(epoch + 1, logs)
            self._say(f"Epoch {epoch + 1}: saving the adapter to {path}")
            save.save_adapter(self.model, path, self.name)
            if path in self._written:
                self._written.remove(path)
            self._written.append(path)
        old = []
        if self.keep is not None:
            old = self._written[: -self.keep]
            self._written = self._written[-self.keep :]
        training_file.write(
            self.model,
            paths.check_writable(self.training_file),
            {
                "epochs": epochs,
                "best": self.best,
                "written": self._written,
                "batches": self._batches,
            },
        )
        for path in old:
            # A user may have moved it.
            if os.path.isfile(path):
                os.unlink(path)

    def _is_to_be_saved(self, epoch, logs):
        if not self.save_best_only:
            return True
        value = (logs or {}).get(self.monitor)
        if value is None:
            warnings.warn(
                f"The logs have no '{self.monitor}' to tell the best adapter "
                f"by, only {sorted(logs or {})}. The adapter is saved.",
                AdapterWarning,
                stacklevel=2,
            )
            return True
        value = float(value)
        better = np.less if self.mode == "min" else np.greater
        # NaN is not better than anything.
        if np.isnan(value) or not (
            self.best is None or better(value, self.best)
        ):
            self._say(f"Epoch {epoch + 1}: {self.monitor} did not improve")
            return False
        self._say(
            f"Epoch {epoch + 1}: {self.monitor} improved from {self.best} to "
            f"{value:.5g}"
        )
        self.best = value
        return True

    def _path(self, epoch, logs):
        """The path of an adapter file, or `None` if it depends on logs."""
        if logs is None and self._fields - {"epoch"}:
            return None
        try:
            return self.filepath.format(epoch=epoch, **(logs or {}))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"`filepath` has a field that can't be filled: {error}. It may "
                f"have 'epoch' and the logs {sorted(logs or {})}. "
                f"Received: filepath={self.filepath!r}"
            ) from error

    def _say(self, text):
        if self.verbose:
            print(f"\n{text}", flush=True)


def _fields(filepath):
    try:
        parts = list(string.Formatter().parse(filepath))
    except ValueError as error:
        raise ValueError(
            f"`filepath` has a field that can't be read: {error}. "
            f"Received: filepath={filepath!r}"
        ) from error
    return {field for _, field, _, _ in parts if field is not None}


def _training_file(filepath):
    """The path of the training file that belongs to adapter files."""
    literal = "".join(text for text, *_ in string.Formatter().parse(filepath))
    folder, name = os.path.split(literal)
    if os.path.dirname(filepath) and not folder:
        folder = os.path.dirname(literal)
    stem, ending = os.path.splitext(name)
    if not ending:
        # The whole name was a field, and the ending is left.
        stem = "" if stem.startswith(".") else stem
    stem = stem.strip("-_. ") or "checkpoint"
    return os.path.join(folder, f"{stem}.training.safetensors")


def _checked_mode(mode, monitor):
    if mode not in ("auto", "min", "max"):
        raise ValueError(
            f'`mode` must be "auto", "min" or "max". Received: mode={mode!r}'
        )
    if mode != "auto":
        return mode
    if _DOWN.search(monitor):
        return "min"
    if _UP.search(monitor):
        return "max"
    raise ValueError(
        f"The direction of monitor={monitor!r} can't be told from its name. "
        'Give `mode="min"` or `mode="max"`.'
    )
