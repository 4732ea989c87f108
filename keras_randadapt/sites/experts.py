"""Adapted banks of experts: layers with kernels that are stacked.

A bank of experts, as KerasHub's mixtures have them, keeps the kernels of all
experts in variables `(experts, input, output)`, and its `call` reads these
variables and multiplies by them. Its code is the layer's own, so an adapted
bank runs that code, with two things replaced: the layer's variables are
`_Operand`s, and the name `ops` of the code means `_Ops`, whose products of an
operand add what the adapters of the experts add (docs/design/experts.md).
"""

import functools
import types

import keras
from keras import ops

from keras_randadapt import _compat
from keras_randadapt.ops.fast_products import matmul
from keras_randadapt.ops.fast_products import reshape
from keras_randadapt.sites import lanes
from keras_randadapt.sites import product
from keras_randadapt.sites.kernel_site import KernelSite
from keras_randadapt.sites.layer import AdaptedLayer
from keras_randadapt.sites.layer import own_class


class AdaptedExperts(AdaptedLayer):
    """A bank of experts; see `sites_of`."""

    kind = "experts"

    def call(self, *args, **kwargs):
        training = kwargs.get("training")
        operands = {
            site.attribute: _operand(site, self._is_training(training))
            for site in sites_of(self)
            if site.is_adapted and site.adapter.active()
        }
        if not operands:
            return self._site_base.call(self, *args, **kwargs)
        # A shadow and not the layer: another thread may be calling it.
        layer = lanes.shadow(self, operands, self._site_base)
        return _with_ops(self._site_base.call)(layer, *args, **kwargs)


class ExpertSite(KernelSite):
    """One stacked kernel of a bank of experts."""

    layer_mixin = AdaptedExperts

    @property
    def stack(self):
        return int(self._kernel.shape[0])

    def _merged_kernel_view(self, kernel, training=False):
        base = ops.cast(_compat.unrounded(kernel), "float32")

        def fold(adapters, base):
            return product.fold(adapters, base, training)

        return lanes.of_experts(fold, self.adapter.active(), base)

    def multiplied(self, x, linear, training):
        """The products of all experts, adapted.

        Args:
            x: Tensor `(tokens, input_dim)`, which all experts get, or
                `(experts, tokens, input_dim)`.
            linear: Function without arguments that gives the base products,
                `(experts, tokens, output_dim)`.
            training: Whether a training step is running.

        Returns:
            Tensor `(experts, tokens, output_dim)`.
        """
        adapters = self.adapter.active()
        if all(adapter.additive for adapter in adapters):
            y = linear()
            for adapter in adapters:
                z = adapter.drop(x, training)
                y = _plus_delta(y, adapter, z, training)
            return y
        base = ops.convert_to_tensor(_compat.unrounded(self._kernel))
        mapped = (x,) if len(x.shape) == 3 else ()

        def adapted(adapters, kernel, z=x):
            expert = _Expert(kernel, self.compute_dtype)
            linear = product.Product(expert.multiply, expert)
            return product.adapt_all(adapters, z, linear, training)

        return lanes.of_experts(adapted, adapters, base, *mapped)


class _Expert:
    """One expert's kernel, as a `Product` asks for it."""

    quantization_mode = None
    bias_name = "bias"

    def __init__(self, kernel, compute_dtype):
        self._kernel = kernel
        self.compute_dtype = compute_dtype

    def to_view(self, kernel):
        return kernel

    def multiply(self, rows):
        return matmul(rows, ops.cast(self._kernel, rows.dtype))


def sites_of(layer):
    """The sites of a bank of experts; none for all other layers.

    A bank of experts has an attribute `num_experts`, and its `call` reads
    variables of three axes of which the first has that size.

    Args:
        layer: A built layer, with or without adapters.

    Returns:
        list of `ExpertSite`s, in the order in which the layer made them.
    """
    number = getattr(layer, "num_experts", None)
    if not isinstance(number, int):
        return []
    call = (own_class(layer) or type(layer)).call
    read = getattr(getattr(call, "__code__", None), "co_names", ())
    quantized = layer.quantization_mode is not None
    return [
        ExpertSite(layer, attribute)
        for attribute, value in vars(layer).items()
        if isinstance(value, keras.Variable)
        and len(value.shape) == 3
        and value.shape[0] == number
        and attribute in read
        # Integers are kernels where the layer is quantized, which `inject`
        # tells, and tables otherwise.
        and (quantized or keras.backend.is_float_dtype(value.dtype))
    ]


def _plus_delta(y, adapter, x, training):
    """`y` plus the products of all experts with their updates."""
    of_stack = getattr(adapter, "delta_of_stack", None)
    if of_stack is not None:
        return of_stack(x, training, onto=y)
    mapped = (x,) if len(x.shape) == 3 else ()

    def delta(adapters, z=x):
        return adapters[0].delta(z, training)

    update = lanes.of_experts(delta, [adapter], *mapped)
    return y + ops.cast(update, y.dtype)


class _Operand(keras.Variable):
    """A stacked kernel whose products are adapted.

    Outside of the products that `_Ops` knows it is the merged kernel, which is
    formed there. It is always right, and it costs what the kernel costs.
    """

    def __init__(self, site, training, dtype):
        # The initializer of `keras.Variable` would make a variable.
        vars(self).update(
            site=site, training=training, product_dtype=dtype, _merged=None
        )

    @property
    def value(self):
        dropped = [a for a in self.site.adapter.active() if a.dropout]
        if self.training and dropped:
            raise ValueError(
                f"The layer of '{self.site.path}' does not multiply inputs by "
                "its kernels in a way that is known, so the adapter's "
                "`dropout` would be missed. Inject an adapter without it, or "
                "leave the kernel out with `exclude`."
            )
        kernel = self.site.merged_kernel(self.training)
        return ops.cast(kernel, self.product_dtype)

    @property
    def shape(self):
        return tuple(self.site._kernel.shape)

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def dtype(self):
        return self.product_dtype

    def cast(self, dtype):
        return _Operand(self.site, self.training, dtype)

    def base(self):
        return ops.cast(self.site._kernel, self.product_dtype)

    def __repr__(self):
        return f"<adapted kernel of '{self.site.path}'>"


def _operand(site, training):
    return _Operand(site, training, site.compute_dtype)


class _Ops:
    """`keras.ops`, whose products know an `_Operand`."""

    def __getattr__(self, name):
        return getattr(keras.ops, name)

    def cast(self, x, dtype):
        if isinstance(x, _Operand):
            return x.cast(keras.backend.standardize_dtype(dtype))
        return ops.cast(x, dtype)

    def convert_to_tensor(self, x, dtype=None, **kwargs):
        if isinstance(x, _Operand):
            return x if dtype is None else self.cast(x, dtype)
        return ops.convert_to_tensor(x, dtype=dtype, **kwargs)

    def einsum(self, subscripts, *operands, **kwargs):
        if len(operands) == 2 and isinstance(operands[1], _Operand):
            plan = _plan(subscripts, len(operands[0].shape))
            if plan is not None:
                return _product(plan, subscripts, *operands, **kwargs)
        return ops.einsum(subscripts, *operands, **kwargs)

    def matmul(self, x1, x2):
        if isinstance(x2, _Operand) and len(x1.shape) in (2, 3):
            rows = "ti" if len(x1.shape) == 2 else "eti"
            return self.einsum(f"{rows},eio->eto", x1, x2)
        return ops.matmul(x1, x2)


_OPS = _Ops()


class _Keras:
    """The module `keras`, whose `ops` are `_Ops`."""

    ops = _OPS

    def __getattr__(self, name):
        return getattr(keras, name)


_REPLACED = {keras.ops: _OPS, keras: _Keras()}


def _with_ops(function):
    """A function of the same code, whose `ops` are `_Ops`.

    Functions that it calls keep their own names. For them, and for a `call`
    that is no plain function, an operand is the merged kernel.
    """
    if not isinstance(function, types.FunctionType):
        return function
    names = {
        name: _REPLACED[value]
        for name, value in function.__globals__.items()
        if isinstance(value, types.ModuleType) and value in _REPLACED
    }
    found = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


class _Plan:
    """How a product with a stacked kernel is one product an expert."""

    def __init__(self, x, kernel, y):
        expert, row, column = kernel
        self.shared = expert not in x
        rest = [label for label in x if label not in kernel]
        inputs = [*rest, row] if self.shared else [expert, *rest, row]
        outputs = [expert, *rest, column]
        self._inputs = [x.index(label) for label in inputs]
        self._rest = [x.index(label) for label in rest]
        self._outputs = [outputs.index(label) for label in y]
        self._to_rows = [y.index(label) for label in outputs]

    def rows(self, x):
        """The input as `(tokens, input)` or `(experts, tokens, input)`."""
        x = _transposed(x, self._inputs)
        if len(self._rest) == 1:
            return x
        experts = () if self.shared else (x.shape[0],)
        return reshape(x, (*experts, -1, x.shape[-1]))

    def columns(self, y):
        """The output as `(experts, tokens, output)`."""
        y = _transposed(y, self._to_rows)
        return reshape(y, (y.shape[0], -1, y.shape[-1]))

    def output(self, y, x):
        """Undoes `columns`, with the sizes of the input's other axes."""
        shape = ops.shape(x)
        rest = [shape[axis] for axis in self._rest]
        y = reshape(y, (y.shape[0], *rest, y.shape[-1]))
        return _transposed(y, self._outputs)


@functools.lru_cache(maxsize=512)
def _plan(subscripts, rank):
    """The `_Plan` of an equation, or `None` if it is no product an expert."""
    left, arrow, y = subscripts.replace(" ", "").partition("->")
    x, _, kernel = left.partition(",")
    if "." in subscripts or not arrow or len(kernel) != 3 or len(x) != rank:
        return None
    expert, row, column = kernel
    rest = set(x) - {expert, row}
    fits = (
        len(set(kernel)) == 3
        and len(set(x)) == len(x)
        and row in x
        and column not in x
        and set(y) == {expert, column} | rest
        and len(y) == len(rest) + 2
    )
    return _Plan(x, kernel, y) if fits else None


def _product(plan, subscripts, x, operand, **kwargs):
    def linear():
        y = ops.einsum(subscripts, x, operand.base(), **kwargs)
        return plan.columns(y)

    x = ops.cast(x, operand.product_dtype)
    y = operand.site.multiplied(plan.rows(x), linear, operand.training)
    return plan.output(y, x)


def _transposed(x, axes):
    return x if axes == sorted(axes) else ops.transpose(x, axes)
