"""Adapters for the sites of a model, checked and built, attached to nothing."""

import keras

from keras_randadapt import _compat
from keras_randadapt.adapters import variables as adapter_variables
from keras_randadapt.model import checks
from keras_randadapt.sites import supported


def build_adapters(template, name, layers, addresses, sources):
    """Built adapters by address, attached to nothing yet."""
    template.check_addresses(addresses)
    paths = [layers[address].path for address in addresses]
    built = {}
    for address in addresses:
        try:
            _check_kind(template, layers[address])
            checks.check_called(template, address, layers)
            if address in sources:
                _check_source(sources[address], address, layers)
            template.check(tuple(supported.view_of(layers[address])))
        except ValueError as error:
            raise ValueError(f"At '{address}': {error}") from error
    with adapter_variables.shared_bases():
        for number, address in enumerate(addresses):
            layer = layers[address]
            # Two layers of one path would give two variables of one path,
            # which torch's parameter lists confuse.
            path = layer.path
            if not path or paths.count(path) > 1:
                path = address
            view = tuple(supported.view_of(layer))
            clone = template.for_site(address, name)
            clone.input_dim, clone.output_dim = view
            clone.site_number = number
            bias = supported.bias_variable(layer)
            clone.bias_shape = None if bias is None else tuple(bias.shape)
            source = layers[sources.get(address, address)]
            clone.source_dim = supported.view_of(source).input_dim
            with keras.name_scope("adapter", override_parent=path):
                clone.build(view)
            built[address] = clone
    return built


def _check_kind(template, layer):
    if supported.kind_of(layer) not in template.site_kinds:
        raise ValueError(
            f"`{type(template).__name__}` does not adapt a "
            f"{type(layer).__name__}. Leave it out with `exclude`."
        )
    if template.adapts_output and not supported.is_matrix_product(layer):
        raise ValueError(
            f"`{type(template).__name__}` adapts outputs of matrix products, "
            f"and the equation '{layer.equation}' is none. Leave the layer "
            "out with `exclude`."
        )


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
                "in a `keras.RematScope`, which lets nothing else out of a "
                "layer than its output. Build the model outside of the scope, "
                "or leave the site out with `exclude`."
            )
