"""What KerasHub may export to files of transformers."""

from keras_randadapt import _compat
from keras_randadapt.sites import layer as layer_lib


def check_transformers_export(backbone):
    """Raises `ValueError` if a backbone's files would lack its adapters.

    Some of KerasHub's exporters read the public kernels of layers, which show
    the adapters, and others read the variables, which hold the base kernels.

    Args:
        backbone: A KerasHub backbone, adapted or not.
    """
    sites = [
        layer
        for layer in _compat.flatten_layers(backbone)
        if isinstance(layer, layer_lib.AdaptedLayer)
    ]
    names = {name for site in sites for name in _active(site)}
    if names:
        raise ValueError(
            f"The adapters {sorted(names)} are active, and KerasHub would "
            "export base kernels without them. Export the merged model: `with "
            "keras_randadapt.merged(model): model.export_to_transformers(path)`"
            ", or call `keras_randadapt.merge(model)` first."
        )
    modes = {site.quantization_mode for site in sites if site.quantization_mode}
    if modes:
        raise ValueError(
            f"The model has kernels in {sorted(modes)}, and KerasHub would "
            "export their integers without the scales. Load the adapter file "
            "into the float model, and export that one."
        )


def _active(site):
    return [adapter.name for adapter in site.adapter.active()]
