"""Hints at what was meant by an argument that a method does not have."""

import difflib
import inspect
from collections.abc import Iterable

# Names that other libraries give to this library's arguments.
_OTHER_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "init_lora_weights": "initialization",
    "rank_pattern": "site_ranks",
    "alpha_pattern": "site_alphas",
    "target_modules": "targets` of `inject",
    "exclude_modules": "exclude` of `inject",
    "modules_to_save": "keep_trainable` of `inject",
}


def unknown_arguments(cls: type, base: type, names: Iterable[str]) -> str:
    """The text of an error about arguments that a method does not have.

    Args:
        cls: The method's class.
        base: The class above which arguments do not count.
        names: The unknown arguments.
    """
    known: set[str] = set()
    for one in cls.__mro__:
        if "__init__" in vars(one) and issubclass(one, base):
            known.update(inspect.signature(one.__init__).parameters)
    known -= {"self", "args", "kwargs", "unknown"}
    found = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        meant = _OTHER_NAMES.get(name) or (close[0] if close else None)
        found.append(f"`{name}`" + (f" (`{meant}`?)" if meant else ""))
    return (
        f"`{cls.__name__}` has no argument {', '.join(found)}. "
        f"It has: {sorted(known)}"
    )
