"""Checks the sites of a model and builds adapters without attaching them."""

from keras_randadapt import _compat
from keras_randadapt.adapters import variables as adapter_variables
from keras_randadapt.model import checks
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import KernelSite


def build_adapters(template, name, layers, addresses, sources, counts=None):
    """Adapters by address, built but not attached.

    Args:
        template: An unbuilt adapter.
        name: The adapter's name.
        layers: dict from structural address to layer.
        addresses: Structural addresses of the sites.
        sources: See `Adapter.sources`.
        counts: Optional dict from address to the number of values that a file
            holds for the adapter there. An adapter of more is an error.

    Returns:
        dict from address to adapter.

    Raises:
        ValueError: If the method does not take one of the sites.
    """
    template.check_addresses(addresses)
    clones = {}
    for number, address in enumerate(addresses):
        source = sources.get(address, address)
        try:
            _check_kind(template, layers[address])
            checks.check_called(template, address, layers)
            if address in sources:
                _check_source(source, address, layers)
            site = supported.site_of(
                address, layers[address], layers[source], number
            )
            clones[address] = _clone(template, name, site)
        except ValueError as error:
            (place,) = layers.named([address])
            raise ValueError(f"At '{place}': {error}") from error
    paths = {address: layers[address].path for address in addresses}
    return _built(clones, paths, counts)


def build_at_sites(template, name, sites, counts=None):
    """Adapters by address, built for sites whose layers are not there.

    Args:
        template: An unbuilt adapter.
        name: The adapter's name.
        sites: dict from address to `Site`.
        counts: See `build_adapters`.

    Returns:
        dict from address to adapter.

    Raises:
        ValueError: If the method does not take one of the sites.
    """
    template.check_addresses(list(sites))
    clones = {}
    for address, site in sites.items():
        try:
            clones[address] = _clone(template, name, site)
        except ValueError as error:
            raise ValueError(f"At '{address}': {error}") from error
    return _built(clones, {address: address for address in sites}, counts)


def _clone(template, name, site):
    clone = template.for_site(site, name)
    # The clone is checked, since its rank may be one of its own.
    clone.check(site)
    return clone


def _built(clones, paths, counts):
    taken = list(paths.values())
    with adapter_variables.shared_bases():
        for address, clone in clones.items():
            # Two layers of one path would have variables of one path, which
            # torch's parameter lists confuse.
            path = paths[address]
            if not path or taken.count(path) > 1:
                path = address
            limit = None, None
            if counts is not None:
                limit = counts[address], sum(counts.values())
            with (
                _compat.name_scope("adapter", path),
                adapter_variables.at_most(*limit),
            ):
                clone.build_at(clone.site)
    return clones


def takes(template, layer):
    """Whether a method adapts layers like this one."""
    return supported.kind_of(layer) in template.site_kinds and (
        not template.adapts_output or supported.is_matrix_product(layer)
    )


def _check_kind(template, layer):
    if supported.kind_of(layer) not in template.site_kinds:
        raise ValueError(
            f"`{type(template).__name__}` does not adapt a "
            f"{type(layer).__name__}. Leave it out with `exclude`."
        )
    if getattr(layer, "stack", None) is not None:
        _check_stack(template)
    if template.adapts_output and not supported.is_matrix_product(layer):
        raise ValueError(
            f"`{type(template).__name__}` adapts outputs of matrix products, "
            f"and {_product_of(layer)} is none. Leave the layer out with "
            "`exclude`."
        )


def _check_stack(template):
    """Raises `ValueError` if a method can't adapt experts."""
    if template.dropout and not template.additive:
        raise ValueError(
            f"`{type(template).__name__}` has no dropout on experts. Inject "
            "it with `dropout=0`, or leave the experts out with `exclude`."
        )


def _product_of(layer):
    if isinstance(layer, KernelSite):
        return f"the product with '{layer.name}' of {layer.layer.name}"
    return f"the equation '{layer.equation}'"


def _check_source(address, site_address, layers):
    layer = layers.get(address)
    if (
        layer is None
        or supported.supported_class(layer, ("product",)) is None
        or not supported.is_matrix_product(layer)
    ):
        raise ValueError(
            f"Its input comes from '{address}', which must be a Dense or "
            f"EinsumDense layer. Received: {layer}. Leave the site out with "
            "`exclude`."
        )
    supported.check_site(address, layer)
    for one in (layer, layers[site_address]):
        if _compat.calls_in_graph(one) > 1:
            raise ValueError(
                f"It gets the input of '{address}', and '{one.name}' is used "
                "several times in the model's graph, so it is not known which "
                "input belongs to which output. Leave the site out with "
                "`exclude`."
            )
        if _compat.may_rematerialize(one):
            raise ValueError(
                f"It gets the input of '{address}', and '{one.name}' was made "
                "in a `keras.RematScope`, in which a layer can pass on only "
                "its output. Build the model outside of the scope, or leave "
                "the site out with `exclude`."
            )
