"""LoRAs of other ranks and scalings as LoRAs of one rank."""

import numpy as np

from keras_randadapt.adapters import configs
from keras_randadapt.adapters.lora import LoRA
from keras_randadapt.model import file_format
from keras_randadapt.serving.tenants import File
from keras_randadapt.sites.site import Site


def is_plain(template):
    """Whether a LoRA's rank may be filled up with zeros."""
    # Other ranks of a decomposition of the kernel have other first values.
    return type(template) is LoRA and not template.depends_on_base


def first(file, rank):
    """The first `File` of a bank as one of the bank's rank.

    Args:
        file: A `File`.
        rank: See `of_rank`.

    Raises:
        ValueError: If a rank was given for another method than LoRA.
    """
    template = configs.deserialize(file.metadata["adapter"])
    if rank is not None and not is_plain(template):
        raise ValueError(
            "`rank` is for banks of LoRAs that do not start from the kernel, "
            f"and '{file.path}' has {template!r}. Received: rank={rank}"
        )
    return of_rank(file, rank)


def of_rank(file, rank=None):
    """The `File` of a LoRA with another rank and the scaling 1.

    Args:
        file: A `File`. Those of other methods are returned as they are.
        rank: Optional int, the rank of all sites; by default the largest that
            the file has at a site. At sites that are too small for it, the
            rank is the smaller dimension.

    Raises:
        ValueError: If a site of the file has a larger rank.
    """
    own = configs.deserialize(file.metadata["adapter"])
    if not is_plain(own):
        return file
    sites = _sites(file, own)
    largest = max(clone.rank for clone in sites.values())
    rank = largest if rank is None else rank
    if largest > rank:
        raise ValueError(
            f"'{file.path}' has the rank {largest}, and the bank's is {rank}. "
            f"Make the bank with `rank={largest}`."
        )
    tensors, site_ranks = dict(file.tensors), {}
    for address, clone in sites.items():
        to = min(rank, clone.input_dim, clone.output_dim)
        if to < rank:
            site_ranks[address] = to
        tensors[address] = _padded(file, address, clone, to)
    template = LoRA(rank, scaling=1.0, site_ranks=site_ranks)
    metadata = {**file.metadata, "adapter": configs.serialize(template)}
    return File(file.path, tensors, metadata)


def _sites(file, own):
    """dict from address to the adapter there, not built."""
    shapes = [
        tuple(map(int, shape.split("x")))
        for shape, count in file.metadata["kernel_views"]
        for _ in range(count)
    ]
    addresses = file_format.site_keys(file.tensors)
    for address, shape in zip(addresses, shapes):
        if len(shape) == 3:
            raise ValueError(
                f"'{file.path}' adapts '{address}', the kernels of "
                f"{shape[0]} experts. In a bank a site must have one kernel. "
                "Merge that adapter into a model of its own."
            )
    return {
        address: own.for_site(
            Site(
                input_dim=rows,
                output_dim=columns,
                address=address,
                kernel_name="kernel",
            ),
            "tenant",
        )
        for address, (rows, columns) in zip(addresses, shapes)
    }


def _padded(file, address, clone, rank):
    flat, count = file.tensors[address], clone.input_dim * clone.rank
    if flat.shape != (count + clone.rank * clone.output_dim,):
        raise ValueError(
            f"'{file.path}' is damaged: it holds {flat.size} values for "
            f"'{address}', which has the rank {clone.rank}."
        )
    a = flat[:count].reshape(clone.input_dim, clone.rank)
    b = flat[count:].reshape(clone.rank, clone.output_dim) * clone.scaling
    missing = rank - clone.rank
    a = np.pad(a, ((0, 0), (0, missing)))
    b = np.pad(b, ((0, missing), (0, 0)))
    return np.concatenate([a.ravel(), b.ravel()]).astype("float32")
