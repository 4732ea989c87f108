"""The classes and stacks that layers get when adapters are attached to them."""

from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import stack
from keras_randadapt.sites import straight_through
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import layer_of


def carry_gradients(change):
    """Lets gradients pass the quantized heads that are no sites."""
    for layer in change.model._randadapt.layers.values():
        if (
            layer_lib.own_class(layer) is None
            and straight_through.stops_gradient(layer)
            and supported.supported_class(layer) is not None
        ):
            change.set(
                layer,
                "__class__",
                straight_through.carrying_class(type(layer)),
            )


def stop_carrying(change):
    """Undoes `carry_gradients`."""
    for layer in change.model._randadapt.layers.values():
        if isinstance(layer, straight_through.CarriesGradient):
            change.set(layer, "__class__", layer._site_base)


def become_site(change, site):
    """Gives a layer, or one kernel of a layer with several, its stack.

    Args:
        change: A `transaction.Change`.
        site: A layer of a supported class, or a `KernelSite`.
    """
    layer = layer_of(site)
    several = layer is not site
    if not isinstance(layer, layer_lib.AdaptedLayer):
        own = layer_lib.own_class(layer) or type(layer)
        mixin = site.layer_mixin if several else None
        change.set(layer, "__class__", supported.site_class(own, mixin))
        stacks = stack.KernelStacks() if several else stack.AdapterStack()
        change.attach_sublayer(layer, "adapter", stacks)
    if several and not site.is_adapted:
        attribute = stack.kernel_attribute(site.kernel_name)
        new = stack.AdapterStack(site.kernel_name)
        change.attach_sublayer(layer.adapter, attribute, new)


def leave_unused_site(change, address):
    """Gives a layer its own class back if no adapter is left on it."""
    state = change.model._randadapt
    if any(address in record.changed for record in state.records.values()):
        return
    site = state.layers[address]
    layer = layer_of(site)
    if not isinstance(layer, layer_lib.AdaptedLayer):
        return
    if layer is not site:
        if site.is_adapted:
            attribute = stack.kernel_attribute(site.kernel_name)
            change.detach_sublayer(layer.adapter, attribute)
        if list(layer.adapter):
            return
    change.detach_sublayer(layer, "adapter")
    change.set(layer, "__class__", layer._site_base)
    carry_gradients(change)
