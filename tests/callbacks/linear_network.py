"""A small linear network, and its training with the penalty in NumPy."""

import keras
import numpy as np
from keras import ops

import keras_randadapt as kra
from keras_randadapt.adapters import base
from tests import zoo

BACKEND = keras.backend.backend()
RATE = 0.08


@keras.saving.register_keras_serializable(package="tests")
class WholeDelta(base.Adapter):
    """Trains the whole delta: its gradients can be written down."""

    def build(self, site):
        self.update = self.add_trainable("update", site.kernel_view, "zeros")

    def delta(self, x, training=None):
        return ops.matmul(x, ops.cast(self.update, x.dtype))

    def delta_kernel(self):
        return ops.convert_to_tensor(self.update)


def data_of(n=12, features=3, seed=0):
    return zoo.normal(n, features, seed=seed), zoo.normal(n, 1, seed=seed + 7)


def network(head=True, **kwargs):
    """Two linear sites and a head, small enough to differentiate by hand."""
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(2, use_bias=False, name="first"),
        keras.layers.Dense(2, use_bias=False, name="second"),
        keras.layers.Dense(1, name="head"),
    ]
    model = zoo.set_weights(keras.Sequential(layers))
    kra.inject(
        model,
        WholeDelta(),
        ["first", "second"],
        keep_trainable="head" if head else None,
    )
    model.compile(
        **{"optimizer": keras.optimizers.SGD(RATE), "loss": "mse", **kwargs}
    )
    return model


def flat(model):
    """The trained weights as one float64 vector, adapters first."""
    return np.concatenate(
        [
            np.ravel(ops.convert_to_numpy(v)).astype("float64")
            for v in model.trainable_variables
        ]
    )


class Simulation:
    """Full-batch gradient descent of `_network` in float64.

    Gradients of examples come from central differences. Written from the
    paper's equations 18 and 19, and knows nothing of the library but in which
    order numbers are drawn.
    """

    def __init__(self, model, x, y, weights=None, **options):
        self.kernels = [
            ops.convert_to_numpy(model.get_layer(name)._kernel).astype(float)
            for name in ("first", "second")
        ]
        self.x, self.y = x.astype(float), y.astype(float)
        self.example_weights = np.ones(len(x)) if weights is None else weights
        self.w = flat(model)
        self.start = self.w.copy()
        self.options = {
            "strength": 1.0,
            "head_strength": 0.0,
            "mode": "quadratic",
            "blocks": "model",
            "reduction": "sum",
            "reference": "initial",
            "samples": 5,
            "seed": 0,
            **options,
        }
        # Both sites' deltas, then the head: its kernel and its bias.
        self.blocks = [slice(0, 6), slice(6, 10)]
        self.adapters = slice(0, 10)
        self.head = slice(10, None)
        self.estimate = None
        self.estimations = 0
        self.rows = []
        self.totals = []
        self.losses = []
        self.logged = []

    def example_losses(self, w):
        first = self.kernels[0] + w[:6].reshape(3, 2)
        second = self.kernels[1] + w[6:10].reshape(2, 2)
        out = self.x @ first @ second @ w[10:12].reshape(2, 1) + w[12]
        return self.example_weights * ((out - self.y) ** 2)[:, 0]

    def differences(self, function, w, step=1e-5):
        """Derivatives of a vector-valued function, `(outputs, len(w))`."""
        columns = []
        for i in range(len(w)):
            up, down = w.copy(), w.copy()
            up[i] += step
            down[i] -= step
            columns.append((function(up) - function(down)) / (2 * step))
        return np.stack(columns, axis=-1)

    def distance(self, w):
        reference = self.start.copy()
        if self.options["reference"] == "zero":
            reference[self.adapters] = 0.0
        return w - reference

    def quadratic(self, w, g):
        d = self.distance(w)
        if self.options["mode"] == "diagonal":
            return np.sum((g * d)[:, self.adapters] ** 2)
        if self.options["blocks"] == "model":
            return np.sum((g[:, self.adapters] @ d[self.adapters]) ** 2)
        return sum(np.sum((g[:, b] @ d[b]) ** 2) for b in self.blocks)

    def penalty(self, w):
        if self.estimate is None:
            return 0.0
        at, g = self.estimate
        if self.options["mode"] == "linear":
            slope = self.differences(lambda v: self.quadratic(v, g), at)
            information = self.quadratic(at, g) + slope @ (w - at)
        else:
            information = self.quadratic(w, g)
        d = self.distance(w)
        head = np.sum((g * d)[:, self.head] ** 2)
        scale = 1.0
        if self.options["reduction"] == "mean":
            scale = 1.0 / self.options["samples"]
        return scale * (
            self.options["strength"] * information
            + self.options["head_strength"] * head
        )

    def loss(self, w):
        return np.mean(self.example_losses(w)) + self.penalty(w)

    def estimate_now(self):
        key = np.array([self.options["seed"], self.estimations], "uint64")
        generator = np.random.Generator(np.random.Philox(key=key))
        drawn = generator.integers(0, len(self.x), self.options["samples"])
        g = self.differences(self.example_losses, self.w)[drawn]
        self.estimate = (self.w.copy(), g)
        self.estimations += 1
        scale = 1.0
        if self.options["reduction"] == "mean":
            scale /= self.options["samples"]
        d = self.distance(self.w)
        if self.options["mode"] == "diagonal":
            row = [np.sum((g * d)[:, b] ** 2) for b in self.blocks]
        else:
            row = [np.sum((g[:, b] @ d[b]) ** 2) for b in self.blocks]
        self.rows.append(scale * np.array(row))
        self.totals.append(scale * self.quadratic(self.w, g))

    def run(self, epochs, rate=RATE, estimate=lambda epoch: True):
        for epoch in range(epochs):
            self.losses.append(self.loss(self.w))
            gradient = self.differences(
                lambda w: np.atleast_1d(self.loss(w)), self.w
            )
            self.w = self.w - rate * gradient[0]
            self.logged.append(self.penalty(self.w))
            if estimate(epoch):
                self.estimate_now()
        return self


def fit(model, callback, x, y, epochs=4, **kwargs):
    return model.fit(
        x,
        y,
        batch_size=len(x),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        **kwargs,
    ).history


def attachments(model):
    """What a callback has left on a model."""
    found = [v.path for v in model.variables if "pac_bayes" in v.path]
    found += [v.path for v in model.trainable_variables if v.regularizer]
    return found + model._randadapt.attachments
