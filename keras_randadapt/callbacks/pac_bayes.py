"""The PAC-Bayes regularizer of the RLoRA paper, as a callback."""

import hashlib
import time
import warnings

import keras
import numpy as np

from keras_randadapt import _compat
from keras_randadapt import analysis
from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt._types import Axis
from keras_randadapt._types import Data
from keras_randadapt._types import Logs
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.callbacks import pac_bayes_setup as setup
from keras_randadapt.model import state as state_lib
from keras_randadapt.per_example import PerExampleGradients
from keras_randadapt.per_example import example_source
from keras_randadapt.regularizers import pac_bayes

_ATTRIBUTE = "pac_bayes"


class PACBayes(keras.callbacks.Callback):
    """Penalizes the information that the trained weights hold.

    At the end of every epoch it draws training examples and computes the
    gradient `g_t` of each example's loss with respect to the active adapters'
    trainable weights `w`. Until the next estimation, with `d = w - reference`,
    the training loss includes

        strength * sum_t (d . g_t)^2

    This is a quadratic function of the current weights. It makes it expensive
    to move along directions to which the loss of examples is sensitive. In the
    first epoch there is no estimate, and nothing is added.

    The loss that `fit` shows includes the penalty, as it does with every Keras
    regularizer, and so does the validation loss. `logs["pac_bayes"]` is the
    penalty at the end of the epoch, with the estimate of that epoch. The
    callbacks after this one see it, and so do `History` and the progress bar.
    A new estimate does not cause a new compilation.

    The loss of an example is `model.compute_loss` of a batch of one, as in
    `evaluate`: without dropout, with sample weights, and without regularizers
    of weights. Activity regularizers and `add_loss` count. A custom
    `compute_loss` must add `self.losses` for the penalty to work. Class
    weights must be given as `sample_weight`. The penalty is a sum over
    examples, while the training loss is a mean over a batch, so `strength`
    includes the factor. The paper uses 5e-5 to 1e-3, and up to 1e-2 with few
    examples. In this library's own experiment (docs/evidence.md) the term beat
    early stopping, and it was no better than no term where all labels were
    right.

    Files of weights that are written during `fit` hold the estimate, so that
    `BackupAndRestore` resumes exactly. Models without the callback can load
    them too. In mode `"quadratic"` the estimate takes `4 * samples` bytes for
    each trained weight.

    Args:
        x: The training examples to draw from, as `fit` takes them: arrays in
            any nest, a `PyDataset`, `tf.data.Dataset`, torch `DataLoader` or
            another iterable of batches. Draws are uniform with replacement;
            for this, each estimation iterates over a pipeline once, without
            running the model. (A `tf.data` shuffle depends on the number of
            passes. To keep `fit`'s order, give the callback a pipeline of its
            own.) From a generator, an iterator or an endless pipeline, the
            next `samples` examples are taken.
        y: Targets, if `x` is arrays.
        strength: float, at least 0. With 0 information is only estimated, and
            training is the same as without the callback.
        sample_weight: Weights of the examples, if `x` is arrays.
        samples: int. The number of examples in an estimation.
        every: `"epoch"`, or int, the number of steps between estimations.
        mode: `"quadratic"`, `"linear"` or `"diagonal"`. `"linear"` is the
            tangent of the quadratic function at the weights of the estimation,
            whose gradient is constant until the next one, as in the code that
            the paper builds on. `"diagonal"` is `strength * sum_i d_i^2 sum_t
            g_ti^2`; it keeps one number for each weight instead of `samples`,
            for adapters with many weights.
        reference: `"initial"`, the weights before training, or `"zero"`.
        head_strength: float, at least 0. The strength for the layers of
            `keep_trainable`. Their penalty always has the form `"diagonal"`,
            and its reference is their weights before training.
        blocks: `"model"`, the paper's equation 18, or `"site"`, the sum over
            sites of each site's own information.
        reduction: `"sum"` or `"mean"` over examples.
        seed: int. It determines the draws; no other random state changes.
        chunk_size: Optional int. The number of examples whose gradients are
            computed at once. The default is as many as fit into 256 MiB, with
            the gradient and all results of the forward pass for each.

    Attributes:
        information: float array `(estimations, sites)`, each site's own
            information at each estimation; in mode `"diagonal"`, the site's
            part of the sum. NaN where an estimate was not finite.
        head_information: The same for kept layers, `(estimations, layers)`.
            It has no columns if `head_strength` is 0.
        total_information: list of floats, the information that `strength`
            multiplies at each estimation.
        sites: list of the sites' structural addresses.
        heads: list of the kept layers' structural addresses.
        costs: list of dicts, one for each estimation: `seconds`; `share`, the
            seconds divided by those of the rest of the epoch, or NaN until the
            epoch ends; and `bytes`, those of the buffers and of one chunk.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range. When `fit` begins, if the
            model is not adapted, has no weights to regularize, trains on
            several devices where that is not supported, or is not the model of
            the previous `fit`.

    Example:

    ```python
    pac_bayes = kra.callbacks.PACBayes(x, y, strength=1e-3)
    model.fit(x, y, epochs=2, batch_size=2, callbacks=[pac_bayes])
    print(pac_bayes.information.shape)
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equations 18
          and 19. Where they leave a choice, gradients here are those of single
          examples at the true labels and are squared before they are summed.
    """

    def __init__(
        self,
        x: Data,
        y: Data = None,
        strength: float = 1e-3,
        *,
        sample_weight: Data = None,
        samples: int = 100,
        every: str | int = "epoch",
        mode: str = "quadratic",
        reference: str = "initial",
        head_strength: float = 0.0,
        blocks: str = "model",
        reduction: str = "sum",
        seed: int = 0,
        chunk_size: int | None = None,
    ):
        super().__init__()
        self.strength = setup.check_strength("strength", strength)
        self.head_strength = setup.check_strength(
            "head_strength", head_strength
        )
        self.samples = setup.check_count("samples", samples)
        self.every = every
        if every != "epoch":
            self.every = setup.check_count("every", every, 'or "epoch"')
            # It is set only here and is no method, because Keras waits for
            # every step's logs if a callback has this method.
            self.on_train_batch_end = self._count_steps
        self.mode = arguments.check_choice(mode, pac_bayes.MODES, "mode")
        self.reference = arguments.check_choice(
            reference, ("initial", "zero"), "reference"
        )
        self.blocks = arguments.check_choice(blocks, pac_bayes.BLOCKS, "blocks")
        self.reduction = arguments.check_choice(
            reduction, pac_bayes.REDUCTIONS, "reduction"
        )
        self.seed = random.check_seed(seed)
        if chunk_size is not None:
            chunk_size = setup.check_count("chunk_size", chunk_size, "or None")
        self.chunk_size = chunk_size
        self._pipeline = x
        self._source = example_source.source_of(x, y, sample_weight)
        self._penalty: pac_bayes.PACBayesPenalty = None
        self._gradients: PerExampleGradients = None
        self._attached_to = None
        self._training = False

    # Results.

    @property
    def information(self) -> np.ndarray:
        return self._table("rows", self.sites)

    @property
    def head_information(self) -> np.ndarray:
        return self._table("head_rows", self.heads)

    @property
    def total_information(self) -> list[float]:
        return list(self._penalty.history.totals) if self._penalty else []

    @property
    def sites(self) -> list[str]:
        return list(self._penalty.flat.owners) if self._penalty else []

    @property
    def heads(self) -> list[str]:
        return list(self._penalty.flat_heads.owners) if self._penalty else []

    @property
    def costs(self) -> list[dict]:
        history: list[tuple[float, ...]] = (
            self._penalty.history.costs if self._penalty else []
        )
        return [
            {"seconds": seconds, "share": share, "bytes": int(size)}
            for seconds, share, size in history
        ]

    def _table(self, name, columns):
        rows = getattr(self._penalty.history, name) if self._penalty else []
        table = np.array(rows, "float64")
        return np.reshape(table, (len(rows), len(columns)))

    def plot(self, axis: Axis | None = None) -> Axis:
        """Draws the sites' information over the estimations.

        The plot is like the paper's figure 3: sites go from top to bottom and
        estimations along x. See `keras_randadapt.analysis.layer_information`.

        Args:
            axis: Optional Matplotlib axis to draw on.

        Returns:
            The axis.

        Raises:
            ImportError: If Matplotlib is not installed.
            ValueError: If nothing was estimated yet.
        """
        axis = analysis.layer_information(self).plot(axis)
        if self.every == "epoch":
            axis.set_xlabel("epoch")
        return axis

    # Attaching and detaching.

    def set_model(self, model: keras.Model) -> None:
        setup.check_one_device(model)
        state = state_lib.state_of(model)
        state_lib.check_no_block(model)
        weights, heads = setup.regularized_weights(
            model, state, self.head_strength
        )
        if self._penalty is None:
            penalty = setup.new_penalty(self, weights, heads)
        else:
            self._check_same(weights, heads)
            penalty = self._penalty
        if self._attached_to is not None:
            self._detach()
        stack = state.layers[weights.owners[0]].adapter
        if penalty.is_attached and hasattr(stack, _ATTRIBUTE):
            raise ValueError(
                f"Model '{model.name}' has a `PACBayes` callback at work "
                "already. Use one at a time."
            )
        super().set_model(model)
        self._penalty = penalty
        self._gradients = PerExampleGradients(
            model, [*weights.variables, *heads.variables], self.chunk_size
        )
        # The penalty is attached in `set_model`, which comes before the
        # training step is compiled and before `BackupAndRestore` reads its
        # file.
        if penalty.is_attached:
            self._attach(model, state, stack)

    def _check_same(self, weights, heads):
        before = self._penalty.flat.variables
        before = [*before, *self._penalty.flat_heads.variables]
        now = [*weights.variables, *heads.variables]
        if list(map(id, before)) != list(map(id, now)):
            raise ValueError(
                "This `PACBayes` callback holds the estimate for another "
                "model, or for other adapters of it. Make a new one for each "
                "model, and after adapters were injected, ejected or switched."
            )

    def _attach(self, model, state, stack):
        _compat.attach_sublayer(stack, _ATTRIBUTE, self._penalty)
        variable = self._penalty.flat.variables[0]
        own = variable.regularizer
        variable.regularizer = pac_bayes.JointRegularizer(self._penalty, own)
        _compat.reset_compiled_functions(model)

        def undo():
            variable.regularizer = own
            _compat.detach_sublayer(stack, _ATTRIBUTE)
            _compat.reset_compiled_functions(model)
            # Functions that blocks in callbacks compiled use the penalty's
            # variables.
            state.functions.clear()

        self._undo = undo
        self._attached_to = state
        state.attachments.append(self._detach)

    def _detach(self):
        state, self._attached_to = self._attached_to, None
        if state is not None:
            state.attachments.remove(self._detach)
            self._undo()

    def on_test_begin(self, logs: Logs = None) -> None:
        if not self._training and self._attached_to is not None:
            # The callback was given to `evaluate`, which has made its function
            # already.
            self._detach()
            self.model.make_test_function()

    def on_predict_begin(self, logs: Logs = None) -> None:
        if not self._training and self._attached_to is not None:
            self._detach()
            self.model.make_predict_function()

    # Training.

    def on_train_begin(self, logs: Logs = None) -> None:
        self._training = True
        self._epoch_costs: list[tuple[float, ...]] = []
        with self._own_random_state():
            example = self._source.peek()
            if example is not None:
                # This checks, before an epoch is trained, that data, model and
                # loss fit together.
                example = example_source.preprocess(self.model, example)
                self._prepare(example)

    def _prepare(self, example):
        try:
            self._gradients.prepare(example)
        except (TypeError, ValueError) as error:
            if example[1] is not None:
                raise
            raise ValueError(
                "`PACBayes` has no `y`, and without it the model's loss can't "
                "be computed: give `PACBayes(x, y)`, or a data set of both."
            ) from error

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        if self._penalty.is_attached and self._attached_to is None:
            raise RuntimeError(
                "The model's adapters were switched or removed during `fit`, "
                "and with them went the penalty of `PACBayes`."
            )
        self._batch = -1
        history = self._penalty.history
        if history.restored:
            history.restored = False
            if self.every == "epoch" and history.epoch < epoch - 1:
                # A callback before this one has written the backup, with these
                # weights but before their estimation.
                self._estimate(epoch - 1)
        self._epoch_costs = []
        self._epoch_started = time.perf_counter()

    def _count_steps(self, batch, logs=None):
        """The `on_train_batch_end` for estimations every n steps."""
        history = self._penalty.history
        # With `steps_per_execution`, Keras calls it once for several steps.
        new = batch - self._batch if batch > self._batch else batch + 1
        self._batch = batch
        history.steps += new
        if history.steps // self.every > (history.steps - new) // self.every:
            self._estimate(history.epoch)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        # On JAX, reading the property puts values back into the variables.
        self.model
        if logs is not None:
            value = keras.ops.convert_to_numpy(self._penalty.value())
            logs["pac_bayes"] = float(value)
        seconds = time.perf_counter() - self._epoch_started
        if self.every == "epoch":
            self._estimate(epoch)
        else:
            seconds -= sum(cost[0] for cost in self._epoch_costs)
        costs = self._penalty.history.costs
        for i in range(len(costs) - len(self._epoch_costs), len(costs)):
            costs[i] = (costs[i][0], costs[i][0] / seconds, costs[i][2])

    def on_train_end(self, logs: Logs = None) -> None:
        self._training = False
        state = self._attached_to
        # `fit` detaches the penalty itself, after all callbacks. Callbacks that
        # restore earlier weights, such as `EarlyStopping`, need its variables.
        if state is not None and not state.fitting:
            self._detach()

    # Estimation.

    def _estimate(self, epoch):
        started = time.perf_counter()
        # On JAX, reading the property puts values back into the variables.
        model = self.model
        penalty = self._penalty
        history = penalty.history
        estimate = penalty.new_estimate()
        with self._own_random_state():
            for batch in self._draw():
                batch = example_source.preprocess(model, batch)
                for rows in self._gradients(batch):
                    estimate.add(rows)
        history.epoch = epoch
        if estimate.finite:
            penalty.assign(estimate)
            history.rows.append(penalty.scale * estimate.site_information)
            history.head_rows.append(penalty.scale * estimate.head_information)
            history.totals.append(penalty.scale * estimate.information)
        else:
            history.rows.append(np.full(len(self.sites), np.nan))
            history.head_rows.append(np.full(len(self.heads), np.nan))
            history.totals.append(float("nan"))
            warnings.warn(
                "The gradients of some training examples are not finite, so "
                "the estimate of information is not updated. Has training "
                "diverged, or does the loss overflow in half precision?",
                AdapterWarning,
                stacklevel=2,
            )
        cost = (
            time.perf_counter() - started,
            float("nan"),
            penalty.count_bytes() + self._gradients.working_bytes(self.samples),
        )
        history.costs.append(cost)
        self._epoch_costs.append(cost)

    def _draw(self):
        key = [self.seed, len(self._penalty.history.rows)]
        generator = np.random.Generator(
            np.random.Philox(key=np.array(key, "uint64"))
        )
        max_batches = (self.params or {}).get("steps")
        return self._source.draw(generator, self.samples, max_batches)

    def _own_random_state(self):
        number = len(self._penalty.history.rows)
        digest = hashlib.sha256(f"PACBayes {self.seed} {number}".encode())
        seed = int.from_bytes(digest.digest()[:4], "little")
        return example_source.own_random_state(seed, self._pipeline)
