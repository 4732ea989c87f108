"""`KernelSite`: one kernel of a layer that has several.

Such a layer, a bank of experts for example, is changed as a whole: it gets one
class and one `adapter`, a `stack.KernelStacks`. For adapters each of its
kernels is a site. A `KernelSite` is what `Layers` has at the address of such a
site: the layer's address, a slash, and the name of the kernel. It answers what
a layer with one kernel answers: its view, its variables and its adapters.
"""

from keras import ops

from keras_randadapt.sites import folding
from keras_randadapt.sites.kernel_view import KernelView


class KernelSite(folding.Folds):
    """One kernel of a layer that has several.

    A subclass for a class of layers sets `layer_mixin`, and overrides
    `to_view` and `from_view` unless the kernel is its own view.

    Args:
        layer: The layer.
        attribute: The attribute that holds the kernel.
        bias_attribute: Optional attribute that holds the bias which is added
            to the product with this kernel.
        owner: Optional layer that has the two attributes, such as the cell of
            a recurrent layer; by default it is `layer`.
    """

    #: The mixin for the class of the layer, an `AdaptedLayer`.
    layer_mixin: type | None = None

    #: See `Adapter.site_kinds`.
    kind = "product"

    #: The number of kernels that are stacked in the variable, or `None`.
    stack: int | None = None

    #: Whether the products with this kernel can be those of dropped inputs.
    takes_dropout = True

    def __init__(self, layer, attribute, bias_attribute=None, owner=None):
        self.layer = layer
        self.attribute = attribute
        self.kernel_name = attribute.lstrip("_")
        self.name = self.kernel_name
        self.owner = layer if owner is None else owner
        self.bias = vars(self.owner).get(bias_attribute)

    @property
    def key(self):
        """What is equal for two objects of the same kernel."""
        return id(self.layer), self.kernel_name

    @property
    def _kernel(self):
        # `_compat.kernel_of` reads this name, which is that of Keras.
        return vars(self.owner)[self.attribute]

    @property
    def _trainable_variables(self):
        # `_compat.owned_variables` reads these two names.
        return [v for v in (self._kernel, self.bias) if v is not None]

    @property
    def _non_trainable_variables(self):
        return []

    @property
    def path(self):
        return f"{self.layer.path or self.layer.name}/{self.name}"

    @property
    def built(self):
        return self.layer.built

    @property
    def quantization_mode(self):
        return self.layer.quantization_mode

    @property
    def compute_dtype(self):
        return self.layer.compute_dtype

    @property
    def adapter(self):
        """The `AdapterStack` of this kernel, once the layer is adapted."""
        return self.layer.adapter[self.kernel_name]

    @property
    def is_adapted(self):
        """Whether the kernel has an `AdapterStack`."""
        return _has_stack(self.layer) and self.kernel_name in self.layer.adapter

    @property
    def kernel_view(self):
        return KernelView(*map(int, self._kernel.shape[-2:]))

    def to_view(self, kernel):
        return kernel

    def from_view(self, view):
        return view

    def merged_kernel(self, training=None):
        """The kernel with every active adapter folded in, for a product.

        Returns:
            Tensor of the kernel's shape and the compute dtype.
        """
        view = self._merged_kernel_view(self._kernel, training)
        return ops.cast(self.from_view(view), self.compute_dtype)


def layer_of(site):
    """The layer that a site belongs to: the site itself if it is a layer."""
    return site.layer if isinstance(site, KernelSite) else site


def is_adapted(site):
    """Whether a layer or a `KernelSite` has a stack of adapters."""
    if isinstance(site, KernelSite):
        return site.is_adapted
    return _has_stack(site)


def _has_stack(layer):
    # A layer of the user's own may have an attribute of this name.
    own = getattr(type(layer), "_site_base", None)
    return own is not None and getattr(layer, "adapter", None) is not None
