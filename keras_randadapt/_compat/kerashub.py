"""KerasHub's export to files of transformers."""

import functools
import importlib
import sys

__all__ = ["check_before_export"]

_EXPORTER = "keras_hub.src.utils.transformers.export.hf_exporter"


def check_before_export(check):
    """Lets KerasHub call a function before it exports a backbone.

    Tasks and backbones export with one function of KerasHub, which finds the
    layers by itself. No class of ours is asked, and a task around an adapted
    backbone is not even known here.

    Args:
        check: Function of a backbone, which may raise an error.

    Returns:
        Whether there is a KerasHub that exports.
    """
    if "keras_hub" not in sys.modules:
        return False
    try:
        exporter = importlib.import_module(_EXPORTER)
    except ModuleNotFoundError:
        # Early versions of KerasHub do not export.
        return False
    export = exporter.export_backbone
    if getattr(export, "_check", None) is check:
        return True

    @functools.wraps(export)
    def checked(backbone, *args, **kwargs):
        check(backbone)
        return export(backbone, *args, **kwargs)

    checked._check = check
    exporter.export_backbone = checked
    return True
