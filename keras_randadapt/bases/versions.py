"""Versions of the bases that adapters take by name.

`"sparse"` and `"very_sparse"` are filled to full rank and have variance 1. The
bases of earlier versions are `"sparse_v1"` and `"very_sparse_v1"`.
"""

from typing import Any

from keras_randadapt._types import Config
from keras_randadapt.bases.by_name import KINDS
from keras_randadapt.bases.by_name import Basis
from keras_randadapt.bases.by_name import make_basis

_EARLIER = {"sparse_v1": "sparse", "very_sparse_v1": "very_sparse"}

# How configs spell bases. Files of earlier versions say "sparse" and mean the
# basis that is "sparse_v1" now.
_SPELLINGS = {
    "sparse": "sparse_v2",
    "very_sparse": "very_sparse_v2",
    **_EARLIER,
}
_READ = {spelling: name for name, spelling in _SPELLINGS.items()}


def check_version(basis: str, argument: str = "basis") -> str:
    """Raises `ValueError` unless `basis` names a basis or an earlier one."""
    allowed = (*KINDS, *_EARLIER)
    if basis not in allowed:
        raise ValueError(
            f"`{argument}` must be one of {allowed}. "
            f"Received: {argument}={basis!r}"
        )
    return basis


def make_version(
    basis: str, *args: Any, fill_v1: bool = False, **kwargs: Any
) -> Basis:
    """The basis that `basis` names in this version of the package.

    Args:
        basis: What `check_version` accepts.
        *args: See `make_basis`.
        fill_v1: bool. Whether an earlier version of the basis is filled.
        **kwargs: See `make_basis`.
    """
    if basis in _EARLIER:
        return make_basis(_EARLIER[basis], *args, fill=fill_v1, **kwargs)
    return make_basis(basis, *args, fill="full_rank", **kwargs)


def spelling(basis: str) -> str:
    """The word for a basis in configs, which files hold."""
    return _SPELLINGS.get(basis, basis)


def read_spelling(config: Config) -> Config:
    """A config in which `spelling` of the basis is undone."""
    name = config.get("basis")
    # Damaged files hold what is no name.
    if not isinstance(name, str):
        return config
    return {**config, "basis": _READ.get(name, name)}
