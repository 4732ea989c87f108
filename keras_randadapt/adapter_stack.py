"""The adapters of one site, and how they act on its product one by one."""

import functools
import threading

import keras
from keras import ops

from keras_randadapt import _compat


class Relay:
    """Hands a layer's input to an adapter of a layer that is called later."""

    def __init__(self):
        # By thread: two may call one model at a time.
        self._tensors = {}

    def put(self, x):
        self._tensors[threading.get_ident()] = x

    def take(self):
        # Taken once: a tensor of one trace must not turn up in another.
        return self._tensors.pop(threading.get_ident(), None)


class AdapterStack(keras.layers.Layer):
    """The adapters of one site, by name, and which of them are active.

    A sublayer of the site named `adapter`, so that variables are called
    `<site>/adapter/<adapter name>/<variable>`. It knows nothing of the site.

    Attributes:
        active_names: tuple of the names of the model's active adapters.
        relays_in: `(name, Relay)` pairs: where adapters of this site take
            what another layer was called with.
        relays_out: `(name, Relay)` pairs: where this site's input goes.
    """

    def __init__(self, name="adapter"):
        super().__init__(name=name, dtype="float32")
        self.built = True
        self.active_names = ()
        self.relays_in = ()
        self.relays_out = ()

    def listen_to(self, other, name):
        """Lets the adapter of this name get the input of another site.

        Args:
            other: The `AdapterStack` of that site.
            name: The adapter's name.
        """
        relay = Relay()
        self.relays_in = (*self.relays_in, (name, relay))
        other.relays_out = (*other.relays_out, (name, relay))

    def relay(self, x):
        """Passes the site's input on to adapters of other sites."""
        for name, relay in self.relays_out:
            if name in self.active_names:
                relay.put(x)

    def forget(self):
        """Drops what was relayed to this site and not taken."""
        for _, relay in self.relays_in:
            relay.take()

    def adapt_output(self, y, x, training):
        """The site's output as those adapters leave it that adapt outputs.

        Args:
            y: Tensor `(..., output_dim)`.
            x: Tensor `(..., input_dim)`, the site's input.
            training: Whether a training step is running.
        """
        relays = dict(self.relays_in)
        for name in self.active_names:
            adapter = self.get(name)
            if adapter is None or not adapter.adapts_output:
                continue
            source = x
            if name in relays:
                source = relays[name].take()
                if source is None:
                    raise ValueError(
                        f"The adapter '{adapter.path}' needs the input of the "
                        "first layer of its feed-forward network, which was "
                        "not called before the last one."
                    )
            y = adapter.adapt_output(y, source, training)
        return y

    def add(self, name, adapter):
        _compat.attach_sublayer(self, _attribute(name), adapter)

    def remove(self, name):
        """Takes an adapter off, and what other sites hand it."""
        self.relays_in = tuple(r for r in self.relays_in if r[0] != name)
        self.relays_out = tuple(r for r in self.relays_out if r[0] != name)
        if self.get(name) is not None:
            _compat.detach_sublayer(self, _attribute(name))

    def get(self, name):
        return getattr(self, _attribute(name), None)

    def active(self):
        """The active adapters of this site, in order of activation.

        A method, because Keras's saving walks into lists that properties
        give.
        """
        found = (self.get(name) for name in self.active_names)
        return [adapter for adapter in found if adapter is not None]

    def load_own_variables(self, store):
        # Empty in files of adapted models, absent in files of plain ones.
        return


def _attribute(name):
    # The prefix keeps a user's name ("path", "name") off Keras's attributes.
    return f"named_{name}"


class Product:
    """The product that an adapter adapts: `linear` of `Adapter.adapt`.

    Called with `(..., input_dim)`, it gives `(..., output_dim)`.

    Attributes:
        base: The `Product` without any adapter; perhaps this one.
    """

    def __init__(self, product, site, base=None):
        self._product = product
        self._site = site
        self.base = self if base is None else base

    def __call__(self, x):
        return self._product(x)

    def kernel(self):
        """The kernel view that this is the product with, if there is one.

        Returns:
            Tensor `(input_dim, output_dim)` of the site's compute dtype; the
            product with another matrix like it is `ops.matmul(x, matrix)`.
            `None` if the kernel is quantized, or if this is what another
            adapter made of the base product.
        """
        if self.base is not self:
            return None
        return self._kernel(self._site.compute_dtype)

    def times_base(self, rows):
        """A float32 matrix times the base kernel view, of any layout.

        Args:
            rows: Tensor `(n, input_dim)`.

        Returns:
            float32 tensor `(n, output_dim)`.
        """
        kernel = self._kernel("float32")
        if kernel is not None:
            return ops.matmul(rows, kernel)
        rows = ops.cast(rows, self._site.compute_dtype)
        return ops.cast(self._site.multiply(rows), "float32")

    def base_kernel(self):
        """The base kernel view, float32, dequantized if need be."""
        kernel = self._kernel("float32")
        if kernel is None:
            kernel = self.times_base(ops.eye(self._site.kernel_view.input_dim))
        return kernel

    def _kernel(self, dtype):
        if self._site.quantization_mode is not None:
            return None
        return self._site.to_view(ops.cast(self._site._kernel, dtype))


def adapt_all(adapters, x, linear, training):
    """Every adapter adapts what those before it made of the base product."""
    for adapter in adapters:
        linear = Product(
            functools.partial(adapter.adapt, linear=linear, training=training),
            linear._site,
            linear.base,
        )
    return linear(x)


def fold(adapters, base):
    """A kernel view with adapters folded in.

    Args:
        adapters: list of built adapters.
        base: float32 tensor, the base kernel view.

    Returns:
        float32 tensor of the same shape.
    """
    view = base
    for adapter in adapters:
        if adapter.additive:
            view = adapter.merged(view)
        else:
            view = adapter.merged(view, base)
    return view
