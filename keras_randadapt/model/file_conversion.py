"""Converts an adapter file to that of a LoRA, without a model."""

import dataclasses
import re
from typing import NoReturn

from keras_randadapt.adapters import configs
from keras_randadapt.model import build
from keras_randadapt.model import convert
from keras_randadapt.model import file_checks
from keras_randadapt.model import file_format
from keras_randadapt.model import file_reading
from keras_randadapt.model import load
from keras_randadapt.model import low_rank
from keras_randadapt.model import low_rank_report
from keras_randadapt.model import paths
from keras_randadapt.model import tensor_data
from keras_randadapt.model import updates
from keras_randadapt.sites.site import Site

_IN_THE_MODEL = (
    "Load the file into its model, call `keras_randadapt.to_lora` there and "
    "save."
)
_NO_FINGERPRINT = (
    "The file is of version 1 and has no fingerprint of the base kernels, so "
    "its LoRA is of version 1 too, and `load_adapter` will warn that it can't "
    "tell the base weights. For the current version there is another way. "
    + _IN_THE_MODEL
)
# No model bounds what a file claims. The largest kernels are those of token
# embeddings, and they are smaller by far.
_MOST_IN_A_DIMENSION = 2**24
_MOST_IN_A_KERNEL = 2**32
_VIEW = re.compile(r"([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert_file` did.

    Attributes:
        name: The adapter's name.
        method: The name of the class that it had.
        version: The version of the written file.
        bytes: The size of the written file.
        ranks: dict from the sites' addresses to the ranks of the LoRA.
        site_bytes: dict from address to the bytes of the site.
        energy_lost: dict from address to the share of the update's energy
            that the LoRA lacks.
        notes: list of sentences that the user should know.
    """

    name: str
    method: str
    version: int
    bytes: int
    ranks: dict[str, int]
    site_bytes: dict[str, int]
    energy_lost: dict[str, float]
    notes: list[str]

    def __str__(self):
        table = low_rank_report.lines(
            self.ranks, self.site_bytes, self.energy_lost
        )
        first = (
            f"{self.method} '{self.name}' as a LoRA: version {self.version}, "
            f"{self.bytes:,} bytes"
        )
        return "\n".join([first, *table])


def convert_file(source, target, rank=None, energy=None, verbose="auto"):
    """Writes a file whose adapter is the `LoRA` of that of another file.

    Everything else of the file is carried over: the fingerprints of the base
    kernels, the layers that are kept trainable, the state that training moved,
    the weight and the preset.

    Args:
        source: The path of a file that `save_adapter` wrote.
        target: The path of the file to write; it may be the same.
        rank: See `to_lora`, as all that follow.
        energy: float or `None`.
        verbose: 1, 0 or `"auto"`.

    Returns:
        A `Conversion`.

    Raises:
        FileNotFoundError: If there is no such file, or no folder for the other.
        ValueError: If the file is damaged, or its adapter can't be converted
            without a model. Nothing is written then.
    """
    source = paths.check_path(source)
    destination = paths.check_writable(paths.check_path(target))
    rank, energy = convert.check_size(rank, energy)
    tensors, metadata = file_reading.read(source)
    file_reading.check_finite(source, tensors)
    template = load.template_of(source, metadata)
    name, method = metadata["name"], type(template).__name__
    updates.check_is_delta(
        name,
        template,
        "Load the file into its model, and fold the adapter into the kernels "
        "with `keras_randadapt.merge`."
        if template.mergeable
        else "`keras_randadapt.load_adapter` is its only use.",
    )
    if template.depends_on_base:
        _refuse_base(source, template)
    sites = _sites(source, tensors, metadata)
    if rank is not None:
        views = {address: site.kernel_view for address, site in sites.items()}
        low_rank.check_rank(rank, views)
    adapters = _adapters(source, tensors, metadata, template, sites)
    factors, ranks, lost = convert.factors_of(
        adapters, name, rank, energy, verbose
    )
    lora, built = low_rank.build_at_sites(
        sites,
        name,
        factors,
        ranks,
        seed=template.seed,
        dropout=template.dropout,
    )
    data = _written(tensors, metadata, lora, built)
    paths.replace(destination, data)
    views = {address: site.kernel_view for address, site in sites.items()}
    notes = [low_rank.size_warning(ranks, views)]
    notes += [_NO_FINGERPRINT] if metadata["version"] < 2 else []
    return Conversion(
        name=name,
        method=method,
        version=metadata["version"],
        bytes=len(data),
        ranks=ranks,
        site_bytes=low_rank_report.site_bytes(built),
        energy_lost=lost,
        notes=[note for note in notes if note is not None],
    )


def _written(tensors, metadata, lora, built):
    """The bytes of the new file.

    A file of version 1 can't become one of version 2, which must tell the base
    kernels and all state that training moved.
    """
    tensors = {**tensors, **file_format.values_of(built)}
    metadata = {
        **metadata,
        "adapter": configs.serialize(lora),
        "bases": file_format.basis_hashes(built),
    }
    if metadata["version"] > 1:
        metadata["version"] = file_format.VERSION
        metadata["digest"] = file_format.digest(tensors, metadata)
    return tensor_data.data_of(
        tensors, {file_format.METADATA_KEY: configs.canonical(metadata)}
    )


class _SiteOfFile(Site):
    """A site of which nothing is known but what an adapter file tells.

    A method that reads anything else would compute another update than in the
    model, so reading it is an error.
    """

    untold: tuple[str, ...] = (
        "bias_shape",
        "input_channels",
        "kernel_name",
        "number",
        "output_channels",
        "source_dim",
    )

    def __post_init__(self):
        # The fields that the other class fills here are untold.
        pass

    def __getattribute__(self, field):
        if field in type(self).untold:
            _refuse_untold(field)
        return super().__getattribute__(field)


class _OnlySiteOfFile(_SiteOfFile):
    """The only site of a file; its number is known."""

    untold = tuple(one for one in _SiteOfFile.untold if one != "number")


def _refuse_untold(field) -> NoReturn:
    raise ValueError(
        f"the method takes the `{field}` of each site into account, which only "
        f"the model tells. {_IN_THE_MODEL}"
    )


def _refuse_base(source, template):
    raise ValueError(
        f"The adapter of '{source}' is a `{type(template).__name__}` whose "
        "update is computed from the base kernels, which the file does not "
        f"hold. {_IN_THE_MODEL}"
    )


def _sites(source, tensors, metadata):
    """dict from address to `_SiteOfFile`."""
    keys = file_format.site_keys(tensors)
    if not keys:
        raise ValueError(f"'{source}' holds no site.")
    views = [view for view, n in metadata["kernel_views"] for _ in range(n)]
    cls = _OnlySiteOfFile if len(keys) == 1 else _SiteOfFile
    sites = {}
    for address, view in zip(keys, views, strict=True):
        if view.count("x") == 2:
            raise ValueError(
                f"'{source}' adapts the experts of '{address}', which are "
                f"not converted without the model. {_IN_THE_MODEL}"
            )
        match = _VIEW.fullmatch(view)
        if match is None:
            raise ValueError(
                f"'{source}' is damaged: the shape of the kernel of "
                f"'{address}' must be like '768x768'. Received: {view!r}"
            )
        rows, columns = map(int, match.groups())
        largest = max(rows, columns)
        if largest > _MOST_IN_A_DIMENSION or rows * columns > _MOST_IN_A_KERNEL:
            raise ValueError(
                f"'{source}' claims a kernel of {rows:,} rows and {columns:,} "
                f"columns for '{address}', which is too large to convert "
                f"without the model: at most {_MOST_IN_A_DIMENSION:,} in a "
                f"dimension and {_MOST_IN_A_KERNEL:,} in all. {_IN_THE_MODEL}"
            )
        sites[address] = cls(
            input_dim=rows, output_dim=columns, address=address
        )
    return sites


def _adapters(source, tensors, metadata, template, sites):
    """dict from address to the adapter of the file, with its values."""
    counts = {address: tensors[address].size for address in sites}
    try:
        built = build.build_at_sites(
            template, metadata["name"], sites, counts=counts
        )
    except ValueError as error:
        raise ValueError(
            f"The `{type(template).__name__}` of '{source}' can't be built "
            f"from the file alone: {error}"
        ) from error
    if any(adapter.has_derived() for adapter in built.values()):
        _refuse_base(source, template)
    file_checks.check_bases(source, metadata, built)
    values = file_checks.adapter_values(source, built, tensors)
    for address, arrays in values.items():
        for weight, array in zip(built[address].stored_weights(), arrays):
            weight.assign(array)
    return built
