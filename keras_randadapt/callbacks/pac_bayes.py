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
from keras_randadapt import root
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.callbacks import example_source
from keras_randadapt.callbacks.per_example_gradients import PerExampleGradients
from keras_randadapt.regularizers import pac_bayes

_ATTRIBUTE = "pac_bayes"


class PACBayes(keras.callbacks.Callback):
    """Penalizes the information that the trained weights hold.

    At the end of every epoch it draws training examples and computes the
    gradient `g_t` of each one's loss with respect to the active adapters'
    trainable weights `w`. Until the next estimation, with `d = w - reference`,

        strength * sum_t (d . g_t)^2

    is part of the training loss, a quadratic of the live weights: directions
    that examples care about are expensive to move along. In the first epoch,
    before any estimate, nothing is added.

    The loss that `fit` shows includes the term, as it does with every Keras
    regularizer, and so does the validation loss. `logs["pac_bayes"]` is its
    value at the end of the epoch, with the estimate used in that epoch, for
    the callbacks that come after this one, `History` and the progress bar
    among them. Nothing is compiled anew when the estimate changes.

    The loss of an example is what `model.compute_loss` says for a batch of
    one, as in `evaluate`: without dropout, with sample weights, without
    regularizers of weights. Activity regularizers and `add_loss` count. A
    custom `compute_loss` must add `self.losses` to be regularized, and class
    weights are for `sample_weight` to express. Sums are over examples, while
    the training loss is a mean over a batch: `strength` absorbs the factor,
    and the paper's are 5e-5 to 1e-3, up to 1e-2 with few examples.

    Files of weights that are written during `fit` hold the estimate, so that
    `BackupAndRestore` resumes exactly; models without the callback load them
    too. In mode `"quadratic"` that is `4 * samples` bytes a trained weight.

    Args:
        x: The training examples to draw from, as `fit` takes them: arrays in
            any nest, a `PyDataset`, `tf.data.Dataset`, torch `DataLoader` or
            another iterable of batches. Draws are uniform with replacement;
            a pipeline is gone through once an estimation for that, without
            any of the model's computation. (A `tf.data` shuffle counts its
            passes: to leave `fit`'s order alone, give it a pipeline of its
            own.) Of a generator, an iterator or an endless pipeline, the next
            `samples` examples are taken.
        y: Targets, with arrays.
        strength: float, at least 0. With 0 information is only estimated and
            training is as it would be without the callback.
        sample_weight: Weights of the examples, with arrays.
        samples: int. Examples an estimation.
        every: `"epoch"`, or int: steps between estimations.
        mode: `"quadratic"`; `"linear"`, its tangent at the weights of the
            estimation, whose gradient stays as it is until the next one, as
            in the code that the paper builds on; or `"diagonal"`,
            `strength * sum_i d_i^2 sum_t g_ti^2`, which needs one number a
            weight rather than `samples`: for adapters with many.
        reference: `"initial"`, the weights before training, or `"zero"`.
        head_strength: float, at least 0: the strength for the layers of
            `keep_trainable`, which are always penalized in mode `"diagonal"`,
            as distances from what they were before training.
        blocks: `"model"`, the paper's equation 18, or `"site"`: the sum over
            sites of each site's own information.
        reduction: `"sum"` or `"mean"` over examples.
        seed: int. Gives the draws; no other random state is touched.
        chunk_size: int: how many examples' gradients to compute at once. By
            default as many as fit into 256 MiB, counting for each its
            gradient and all that the forward pass computes.

    Attributes:
        information: float array `(estimations, sites)`: each site's own
            information (mode `"diagonal"`: its part of the diagonal form) at
            each estimation. NaN where an estimate was not finite.
        head_information: The same for kept layers, `(estimations, layers)`;
            without columns if `head_strength` is 0.
        total_information: list of floats: the information that `strength`
            multiplies, at each estimation.
        sites: list of the sites' structural addresses.
        heads: list of the kept layers' structural addresses.
        costs: list of dicts, an estimation each: `seconds`, `share` (of the
            time that the rest of its epoch took; NaN until that has ended)
            and `bytes`, those of the buffers and of one chunk.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range; and when `fit` begins, if
            the model is not adapted, has nothing to regularize, trains on
            several devices where that is not supported, or is another than
            in the `fit` before.

    Example:

    ```python
    pac_bayes = kra.callbacks.PACBayes(x, y, strength=1e-3)
    model.fit(x, y, epochs=2, batch_size=2, callbacks=[pac_bayes])
    print(pac_bayes.information.shape)
    ```

    References:
        - Lei, Qian and Cheung, "RLoRA", Findings of ACL 2024, equations 18
          and 19, with the choices that they leave open: gradients are those
          of single examples, squared before they are summed, at the true
          labels.
    """

    def __init__(
        self,
        x,
        y=None,
        strength: float = 1e-3,
        *,
        sample_weight=None,
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
        self.strength = _check_strength("strength", strength)
        self.head_strength = _check_strength("head_strength", head_strength)
        self.samples = _check_count("samples", samples)
        self.every = every
        if every != "epoch":
            self.every = _check_count("every", every, 'or "epoch"')
            # Not a method: Keras waits for every step's logs where a callback
            # has one.
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
            chunk_size = _check_count("chunk_size", chunk_size, "or None")
        self.chunk_size = chunk_size
        self._pipeline = x
        self._source = example_source.source_of(x, y, sample_weight)
        self._penalty = None
        self._gradients = None
        self._attached_to = None
        self._training = False

    # What was found.

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
        history = self._penalty.history.costs if self._penalty else []
        return [
            {"seconds": seconds, "share": share, "bytes": int(size)}
            for seconds, share, size in history
        ]

    def _table(self, name, columns):
        rows = getattr(self._penalty.history, name) if self._penalty else []
        table = np.array(rows, "float64")
        return np.reshape(table, (len(rows), len(columns)))

    def plot(self, axis=None):
        """Draws the sites' information over the estimations.

        The paper's figure 3, as `keras_randadapt.analysis.layer_information`
        draws it: sites from top to bottom, estimations along x.

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

    def set_model(self, model):
        _check_one_device(model)
        state = root.state_of(model)
        root.check_no_block(model)
        weights, heads = self._weights(model, state)
        if self._penalty is None:
            penalty = self._new_penalty(weights, heads)
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
        # In `set_model`, before the training step is compiled and before
        # `BackupAndRestore` reads its file.
        if penalty.is_attached:
            self._attach(model, state, stack)

    def _weights(self, model, state):
        """The regularized weights, adapters' and kept layers'."""
        sites = {}
        seen = set()
        for address in state.site_addresses:
            found = [
                variable
                for adapter in state.layers[address].adapter.active()
                for variable in adapter.trainable_variables
                # Some methods share weights between sites.
                if not (id(variable) in seen or seen.add(id(variable)))
            ]
            if found:
                sites[address] = found
        if not sites:
            raise ValueError(
                f"Model '{model.name}' has no active adapter with trainable "
                "weights to regularize. Active: "
                f"{list(state.active)}. See `keras_randadapt.set_active`."
            )
        heads = {}
        if self.head_strength:
            for name in state.active:
                for address in state.records[name].kept:
                    heads[address] = list(
                        state.layers[address].trainable_variables
                    )
            if not heads:
                raise ValueError(
                    "`head_strength` is for the layers of `keep_trainable`, "
                    f"of which model '{model.name}' has none. Received: "
                    f"head_strength={self.head_strength}"
                )
        return pac_bayes.FlatWeights(sites), pac_bayes.FlatWeights(heads)

    def _new_penalty(self, weights, heads):
        owner = weights.variables[0].path.rpartition("/adapter/")[0]
        with keras.name_scope("pac_bayes", override_parent=f"{owner}/adapter"):
            return pac_bayes.PACBayesPenalty(
                weights,
                heads,
                samples=self.samples,
                strength=self.strength,
                head_strength=self.head_strength,
                mode=self.mode,
                blocks=self.blocks,
                reduction=self.reduction,
                reference=self.reference,
            )

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
            # Those of blocks in callbacks know the penalty's variables.
            state.functions.clear()

        self._undo = undo
        self._attached_to = state
        state.attachments.append(self._detach)

    def _detach(self):
        state, self._attached_to = self._attached_to, None
        if state is not None:
            state.attachments.remove(self._detach)
            self._undo()

    def on_test_begin(self, logs=None):
        if not self._training and self._attached_to is not None:
            # Given to `evaluate` by itself, which has its function already.
            self._detach()
            self.model.make_test_function()

    def on_predict_begin(self, logs=None):
        if not self._training and self._attached_to is not None:
            self._detach()
            self.model.make_predict_function()

    # Training.

    def on_train_begin(self, logs=None):
        self._training = True
        self._epoch_costs = []
        with self._own_random_state():
            example = self._source.peek()
            if example is not None:
                # Before an epoch is spent: do data, model and loss agree?
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

    def on_epoch_begin(self, epoch, logs=None):
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
                # The backup was written by a callback before this one, at
                # these weights and before the estimation at them.
                self._estimate(epoch - 1)
        self._epoch_costs = []
        self._epoch_started = time.perf_counter()

    def _count_steps(self, batch, logs=None):
        """`on_train_batch_end`, if information is estimated every n steps."""
        history = self._penalty.history
        # With `steps_per_execution`, one call for several steps.
        new = batch - self._batch if batch > self._batch else batch + 1
        self._batch = batch
        history.steps += new
        if history.steps // self.every > (history.steps - new) // self.every:
            self._estimate(history.epoch)

    def on_epoch_end(self, epoch, logs=None):
        # Reading the property brings JAX's state back to the variables.
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

    def on_train_end(self, logs=None):
        self._training = False
        state = self._attached_to
        # `fit` detaches by itself, after callbacks that go back to weights of
        # before, such as `EarlyStopping`, have found all of them.
        if state is not None and not state.fitting:
            self._detach()

    # Estimation.

    def _estimate(self, epoch):
        started = time.perf_counter()
        # The property: on JAX it brings the state back to the variables.
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
                "The gradients of some training examples are not finite: the "
                "estimate of information is left as it was. Has training "
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


def _check_one_device(model):
    if keras.config.backend() == "torch":
        from torch.nn.parallel import DistributedDataParallel

        if isinstance(model, DistributedDataParallel):
            _refuse_devices("torch's DistributedDataParallel")
    if keras.config.backend() == "tensorflow":
        root.check_is_model(model)
        replicas = model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            _refuse_devices(f"a tf.distribute strategy of {replicas} replicas")
    distribution = keras.distribution.distribution()
    if distribution is not None and keras.config.backend() != "jax":
        _refuse_devices(f"a {type(distribution).__name__}")


def _refuse_devices(what):
    raise ValueError(
        f"`PACBayes` does not work with {what}: every device would estimate "
        "by itself. Train on one device, or on JAX, where "
        "`keras.distribution` is supported."
    )


def _check_strength(name, value):
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be a number, at least 0; `y` is given before "
            f"`strength`. Received: {name}={example_source._short(value)}"
        ) from None
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"`{name}` must be finite and at least 0. "
            f"Received: {name}={value!r}"
        )
    return number


def _check_count(name, value, otherwise=""):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` must be an integer {otherwise}".rstrip()
            + f". Received: {name}={value!r} (of type {type(value).__name__})"
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1. Received: {name}={value}"
        )
    return int(value)
