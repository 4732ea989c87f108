"""The PAC-Bayes penalty that an estimate of information adds to the loss.

The callback `keras_randadapt.callbacks.PACBayes` makes estimates and attaches
the penalty. This module computes with an estimate, in the training step and on
the host.
"""

import keras
import numpy as np
from keras import ops

MODES = ("quadratic", "linear", "diagonal")
BLOCKS = ("model", "site")
REDUCTIONS = ("sum", "mean")


class FlatWeights:
    """The weights of several owners, seen as one float32 vector.

    It is a plain object, because a layer with these variables in a list would
    own them.

    Attributes:
        owners: list of the owners' structural addresses.
        variables: list of Keras variables, owner by owner.
        size: The length of the vector.
        blocks: list of slices of the vector, one for each owner.
    """

    def __init__(self, weights_by_owner):
        self.owners = list(weights_by_owner)
        self.variables = []
        self.blocks = []
        start = 0
        for weights in weights_by_owner.values():
            self.variables.extend(weights)
            stop = start + sum(int(np.prod(w.shape)) for w in weights)
            self.blocks.append(slice(start, stop))
            start = stop
        self.size = start

    def tensor(self):
        """The vector as a tensor with gradients to the variables."""
        parts = [
            ops.reshape(ops.cast(variable, "float32"), (-1,))
            for variable in self.variables
        ]
        return ops.concatenate(parts)

    def values(self):
        """The vector as a NumPy array."""
        parts = [
            np.ravel(ops.convert_to_numpy(variable)).astype("float32")
            for variable in self.variables
        ]
        return np.concatenate(parts or [np.zeros(0, "float32")])


class Estimate:
    """Sums over per-example gradients, added a chunk at a time on the host.

    For the gradient `g_t` of example `t` and the distance `d` of the weights
    from their reference, the information is `sum_t (d . g_t)^2` (equation 18
    of the RLoRA paper). With `blocks="site"` it is the sum of each site's own
    information. In mode `"diagonal"` it is `sum_i F_i d_i^2` with `F_i =
    sum_t g_ti^2`.

    Args:
        weights: The adapters' `FlatWeights`.
        heads: The kept layers' `FlatWeights`, which may be empty.
        mode: One of `MODES`.
        blocks: One of `BLOCKS`.
        distance: Array of shape `(weights.size,)`.
        head_distance: Array of shape `(heads.size,)`.
        keep_gradients: Whether to keep the adapters' gradients themselves.
    """

    def __init__(
        self, weights, heads, mode, blocks, distance, head_distance, keep
    ):
        self.weights = weights
        self.heads = heads
        self.mode = mode
        self.blocks = blocks
        self.distance = distance.astype("float64")
        self.head_distance = head_distance.astype("float64")
        self.count = 0
        self.finite = True
        self.gradients = [] if keep else None
        self.curvature = np.zeros(weights.size)
        self.slope = np.zeros(weights.size)
        self.head_curvature = np.zeros(heads.size)
        self._site_sums = np.zeros(len(weights.blocks))
        self._joint_sum = 0.0

    def add(self, rows):
        """Adds some examples.

        Args:
            rows: float32 array `(examples, weights.size + heads.size)`.
        """
        self.count += len(rows)
        if not np.all(np.isfinite(rows)):
            self.finite = False
            return
        head_rows = rows[:, self.weights.size :].astype("float64")
        rows = rows[:, : self.weights.size]
        if self.gradients is not None:
            self.gradients.append(rows)
        rows = rows.astype("float64")
        self.head_curvature += np.sum(head_rows**2, axis=0)
        if self.mode == "diagonal":
            self.curvature += np.sum(rows**2, axis=0)
            return
        # These are the derivatives of each example's loss along the distance,
        # for each site's part of it.
        along = np.stack(
            [rows[:, b] @ self.distance[b] for b in self.weights.blocks], axis=1
        )
        joint = np.sum(along, axis=1)
        self._site_sums += np.sum(along**2, axis=0)
        self._joint_sum += np.sum(joint**2)
        for i, block in enumerate(self.weights.blocks):
            weight = joint if self.blocks == "model" else along[:, i]
            self.slope[block] += 2 * weight @ rows[:, block]

    @property
    def site_information(self):
        """Each site's own information, `(sites,)`."""
        if self.mode != "diagonal":
            return self._site_sums
        terms = self.curvature * self.distance**2
        return np.array([np.sum(terms[b]) for b in self.weights.blocks])

    @property
    def information(self):
        """The information that the penalty multiplies by its strength."""
        if self.mode == "diagonal" or self.blocks == "site":
            return float(np.sum(self.site_information))
        return float(self._joint_sum)

    @property
    def head_information(self):
        """Each kept layer's information, `(kept layers,)`."""
        terms = self.head_curvature * self.head_distance**2
        return np.array([np.sum(terms[b]) for b in self.heads.blocks])


class History:
    """The callback's estimations so far, which files of weights hold.

    It is a plain object, because Keras's saving walks into layers' lists and
    dicts.

    Attributes:
        rows: list of `(sites,)` arrays, one for each estimation.
        head_rows: list of `(kept layers,)` arrays.
        totals: list of floats, the information of the penalty.
        costs: list of `(seconds, share of the epoch, bytes)`.
        epoch: The epoch after which the last estimation was made, or -1.
        steps: The number of training steps so far.
        restored: Whether this was read from a file since `fit` began.
    """

    def __init__(self):
        self.rows = []
        self.head_rows = []
        self.totals = []
        self.costs = []
        self.epoch = -1
        self.steps = 0
        self.restored = False

    def save(self, store, sites, heads):
        count = len(self.rows)
        for name, rows, columns in (
            ("information", self.rows, sites),
            ("head_information", self.head_rows, heads),
            ("costs", self.costs, 3),
        ):
            table = np.asarray(rows, "float64")
            store[name] = np.reshape(table, (count, columns))
        store["totals"] = np.asarray(self.totals, "float64")
        store["progress"] = np.array([self.epoch, self.steps], "int64")

    def load(self, store):
        self.rows = list(np.array(store["information"]))
        self.head_rows = list(np.array(store["head_information"]))
        self.totals = [float(v) for v in np.array(store["totals"])]
        self.costs = [tuple(map(float, r)) for r in np.array(store["costs"])]
        self.epoch, self.steps = map(int, np.array(store["progress"]))
        self.restored = True


class PACBayesPenalty(keras.layers.Layer):
    """The penalty of the latest estimate, as a function of the weights.

    The penalty is `strength * I(w) + head_strength * H(w)`. Between
    estimations the gradients `g_t` are constant. With `d = w - reference`:

    - For `"quadratic"`, `I(w) = sum_t (d . g_t)^2`.
    - For `"linear"`, `I` is the tangent of that at the weights `w_e` of the
      estimation. Its gradient, `2 sum_t (d_e . g_t) g_t`, does not depend on
      `w`.
    - For `"diagonal"`, `I(w) = sum_i F_i d_i^2`. `H` always has this form.

    An estimate is stored in non-trainable weights of fixed shape, which are
    zero before the first estimate. A compiled training step therefore stays
    valid, and files of weights hold the estimate.

    Args:
        weights: The adapters' `FlatWeights`.
        heads: The kept layers' `FlatWeights`.
        samples: int. The number of examples in an estimation.
        strength: float. With 0 no buffers are made for the adapters.
        head_strength: float.
        mode: One of `MODES`.
        blocks: One of `BLOCKS`.
        reduction: One of `REDUCTIONS`. With `"mean"`, sums over examples are
            divided by their number.
        reference: `"initial"`, the adapters' weights at construction, or
            `"zero"`. The reference of kept layers is always their weights at
            construction.
    """

    def __init__(
        self,
        weights,
        heads,
        *,
        samples,
        strength,
        head_strength,
        mode,
        blocks,
        reduction,
        reference,
    ):
        super().__init__(name="pac_bayes", dtype="float32")
        self.history = History()
        self.flat = weights
        self.flat_heads = heads
        self.samples = samples
        self.strength = strength
        self.head_strength = head_strength
        self.mode = mode
        self.blocks = blocks
        self.scale = 1.0 / samples if reduction == "mean" else 1.0
        self.gradients = self.slope = self.offset = self.curvature = None
        size = (weights.size,)
        self.reference = self._buffer("reference", size)
        if reference == "initial":
            self.reference.assign(weights.values())
        if strength and mode == "quadratic":
            self.gradients = self._buffer("gradients", (samples, weights.size))
        elif strength and mode == "linear":
            self.slope = self._buffer("slope", size)
            self.offset = self._buffer("offset", ())
        elif strength:
            self.curvature = self._buffer("curvature", size)
        self.head_curvature = self.head_reference = None
        if heads.size:
            size = (heads.size,)
            self.head_reference = self._buffer("head_reference", size)
            self.head_reference.assign(heads.values())
            self.head_curvature = self._buffer("head_curvature", size)
        self.built = True

    def _buffer(self, name, shape):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )

    @property
    def is_attached(self):
        """Whether the penalty is added to the loss."""
        return bool(self.strength or self.head_strength)

    def value(self):
        """The penalty, a float32 scalar tensor."""
        total = 0.0
        if self.strength:
            total = self.strength * self.scale * self._information()
        if self.head_strength:
            distance = self.flat_heads.tensor() - self.head_reference
            information = ops.sum(self.head_curvature * distance**2)
            total = total + self.head_strength * self.scale * information
        return total

    def _information(self):
        distance = self.flat.tensor() - self.reference
        if self.mode == "linear":
            # At the weights of the estimation, slope . d is twice the
            # information.
            return ops.sum(self.slope * distance) - self.offset
        if self.mode == "diagonal":
            return ops.sum(self.curvature * distance**2)
        gradients = ops.convert_to_tensor(self.gradients)
        if self.blocks == "model":
            return ops.sum(_matvec(gradients, distance) ** 2)
        information = 0.0
        for block in self.flat.blocks:
            along = _matvec(gradients[:, block], distance[block])
            information = information + ops.sum(along**2)
        return information

    def new_estimate(self):
        """An empty `Estimate` at the current weights."""
        head_distance = self.flat_heads.values()
        if self.head_reference is not None:
            head_distance = head_distance - ops.convert_to_numpy(
                self.head_reference
            )
        return Estimate(
            self.flat,
            self.flat_heads,
            self.mode,
            self.blocks,
            self.flat.values() - ops.convert_to_numpy(self.reference),
            head_distance,
            keep=self.gradients is not None,
        )

    def assign(self, estimate):
        """Makes the penalty use an estimate."""
        if self.gradients is not None:
            self.gradients.assign(np.concatenate(estimate.gradients))
        if self.slope is not None:
            self.slope.assign(estimate.slope.astype("float32"))
            self.offset.assign(np.float32(estimate.information))
        if self.curvature is not None:
            self.curvature.assign(estimate.curvature.astype("float32"))
        if self.head_curvature is not None:
            self.head_curvature.assign(
                estimate.head_curvature.astype("float32")
            )

    def count_bytes(self):
        """The bytes of the buffers."""
        return sum(4 * int(np.prod(w.shape)) for w in self.weights)

    def save_own_variables(self, store):
        for weight in self.weights:
            store[weight.name] = ops.convert_to_numpy(weight)
        self.history.save(
            store, len(self.flat.owners), len(self.flat_heads.owners)
        )

    def load_own_variables(self, store):
        if not len(store.keys()):
            # The file was written without the callback. It has no estimate,
            # and the reference does not change.
            return
        for weight in self.weights:
            found = store[weight.name] if weight.name in store.keys() else None
            if found is None or tuple(found.shape) != tuple(weight.shape):
                raise ValueError(
                    "The file holds the state of a `PACBayes` callback with "
                    "other arguments or for other trainables: its "
                    f"'{weight.name}' is "
                    f"{'missing' if found is None else found.shape}, where "
                    f"{tuple(weight.shape)} is expected. Resume with the "
                    "arguments (`samples`, `mode`, `strength`, ...) that "
                    "training began with."
                )
        for weight in self.weights:
            weight.assign(np.array(store[weight.name]))
        self.history.load(store)


class JointRegularizer(keras.regularizers.Regularizer):
    """The penalty, in the form of one variable's regularizer.

    Keras adds the regularizers of trainable variables to every loss. On every
    backend it calls them where all variables of the model can be read. This
    regularizer is set on a single variable and reads all of them.

    Args:
        penalty: A `PACBayesPenalty`.
        own: The variable's own regularizer, or `None`.
    """

    def __init__(self, penalty, own=None):
        self.penalty = penalty
        self.own = own

    def __call__(self, variable):
        value = self.penalty.value()
        if self.own is not None:
            value = value + self.own(variable)
        return value


def _matvec(matrix, vector):
    return ops.squeeze(ops.matmul(matrix, ops.expand_dims(vector, 1)), 1)
