"""Arguments that have other values at some sites."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import Self

import keras

from keras_randadapt import arguments
from keras_randadapt._types import Config
from keras_randadapt._types import Layers
from keras_randadapt._types import Rename
from keras_randadapt.adapters import base
from keras_randadapt.sites import selection
from keras_randadapt.sites.kernel_site import layer_of
from keras_randadapt.sites.site import Site


class SiteArguments(base.Adapter):
    """The base of methods whose `alpha` may differ from site to site.

    Args:
        site_alphas: Optional dict to the `alpha` of some sites, from what
            `targets` of `inject` takes: the name of a layer, the end of its
            path or a `re.Pattern`, or from the layer itself. A later key wins
            over an earlier one.
        **kwargs: See `Adapter`.
    """

    #: The names of the arguments that are such dicts.
    site_arguments: tuple[str, ...] = ("site_alphas",)

    rank: int
    scaling: float

    def __init__(
        self,
        *,
        site_alphas: Mapping[Any, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.site_alphas = check(
            site_alphas, "site_alphas", arguments.check_scaling
        )

    def set_alpha(self, alpha: float) -> None:
        """Gives a clone that is not built yet another `alpha`."""
        self.scaling = alpha / self.rank

    def for_site(self, site: Site, name: str) -> Self:
        clone = super().for_site(site, name)
        if site.address in self.site_alphas:
            clone.set_alpha(self.site_alphas[site.address])
        return clone

    def resolved(self, layers: Layers, addresses: Collection[str]) -> Self:
        given = self._given()
        if not given:
            return self
        for argument, values in given.items():
            given[argument] = resolve(values, argument, layers, addresses)
        return self._with(given)

    def relocated(self, rename: Rename) -> Self:
        given = self._given()
        if not given:
            return self
        for argument, values in given.items():
            given[argument] = {rename(a): one for a, one in values.items()}
        return self._with(given)

    def check_addresses(self, addresses: Collection[str]) -> None:
        for argument, values in self._given().items():
            unused = [key for key in values if key not in addresses]
            if unused:
                raise ValueError(
                    f"`{argument}` has keys that mean no site: {unused[:5]}. "
                    f"Sites: {list(addresses)[:5]}"
                )

    def _given(self):
        found = {name: getattr(self, name) for name in self.site_arguments}
        return {name: dict(values) for name, values in found.items() if values}

    def _with(self, changed):
        return type(self).from_config({**self.get_config(), **changed})

    def get_config(self) -> Config:
        # A dict that is empty is left out, as in files of earlier versions.
        return {**super().get_config(), **self._given()}


def check(
    values: Any,
    argument: str,
    check_value: Callable[[Any, str], Any],
    words: str = "",
) -> dict[Any, Any]:
    """Validates a dict of values for some sites.

    Args:
        values: The argument.
        argument: The argument's name.
        check_value: Function of a value and its name for errors that returns
            the value.
        words: What the argument may be besides a dict and `None`.
    """
    if not isinstance(values, (Mapping, type(None))):
        plural = argument.removeprefix("site_")
        raise TypeError(
            f"`{argument}` must be a dict from names, patterns or layers to "
            f"{plural}, {words}or `None`. Received: {argument}={values!r}"
        )
    return {
        key: check_value(one, f"{argument}[{key!r}]")
        for key, one in (values or {}).items()
    }


def resolve(
    values: Mapping[Any, Any],
    argument: str,
    layers: Layers,
    addresses: Collection[str],
) -> dict[str, Any]:
    """The values by the addresses of the sites that the keys mean.

    Args:
        values: dict from names, patterns, addresses or layers.
        argument: The argument's name.
        layers: dict from structural address to layer.
        addresses: The sites' addresses.

    Raises:
        ValueError: If a key means no site.
    """
    found = {}
    for key, value in values.items():
        if isinstance(key, str) and key in addresses:
            # The address of a site, as `keras_randadapt.sites` gives it.
            meant = [key]
        elif isinstance(key, keras.layers.Layer):
            meant = [a for a in layers if layer_of(layers[a]) is key]
        else:
            meant = selection.match(layers, key, argument)
        chosen = [address for address in meant if address in addresses]
        if not chosen:
            sites = [layers[address].name for address in addresses]
            raise ValueError(
                f"`{argument}` has a key that means no site: {key!r}. "
                f"Sites: {list(dict.fromkeys(sites))[:5]}"
            )
        found.update(dict.fromkeys(chosen, value))
    return found
