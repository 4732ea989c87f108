"""LoRA adapters of given factors, and adapters that are replaced by them."""

import warnings

import keras
import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import LoRA
from keras_randadapt.matrices import low_rank as matrices
from keras_randadapt.model import attach
from keras_randadapt.model import build as build_lib
from keras_randadapt.model import checks
from keras_randadapt.model import distribution
from keras_randadapt.model import site_layers
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import weighting
from keras_randadapt.sites import supported


def build(layers, name, factors, ranks, **options):
    """LoRA adapters with these factors, built but not attached.

    Args:
        layers: dict from structural address to layer.
        name: The adapter's name.
        factors: dict from the sites' addresses to `(a, b)`, NumPy arrays
            `(input_dim, k)` and `(k, output_dim)`, with an axis of experts in
            front where kernels are stacked.
        ranks: dict from address to the rank of the site, at least 1 and at
            least `k`. Ranks that have no factors start as in an untrained
            LoRA: they add nothing, and they can be trained.
        **options: Arguments of `LoRA`.

    Returns:
        `(template, built)`: the template, and a dict from address to adapter.

    Raises:
        ValueError: If a factor is not finite in the adapter's dtype.
    """
    template = template_of(ranks, options)
    built = build_lib.build_adapters(template, name, layers, list(factors), {})
    give(built, factors)
    return template, built


def build_at_sites(sites, name, factors, ranks, **options):
    """LoRA adapters with these factors, without a model.

    Args:
        sites: dict from address to `Site`.
        name: See `build`, as all that follow.
        factors: dict.
        ranks: dict.
        **options: Arguments of `LoRA`.

    Returns:
        See `build`.
    """
    template = template_of(ranks, options)
    built = build_lib.build_at_sites(template, name, sites)
    give(built, factors)
    return template, built


def template_of(ranks, options):
    """A LoRA with a rank of its own at each site.

    Args:
        ranks: dict from address to rank.
        options: dict of further arguments of `LoRA`.
    """
    largest = max(ranks.values())
    return LoRA(
        largest,
        site_ranks={a: r for a, r in ranks.items() if r < largest},
        **options,
    )


def give(built, factors):
    """Assigns factors to built adapters."""
    for address, (a, b) in factors.items():
        adapter, rank = built[address], b.shape[-2]
        whole_a = _float32(keras.ops.convert_to_numpy(adapter.lora_a)).copy()
        whole_b = np.zeros(adapter.lora_b.shape, "float32")
        whole_a[..., :rank] = _float32(a)
        whole_b[..., :rank, :] = _float32(b)
        # The product must not overflow either, and no entry of it exceeds this.
        with np.errstate(over="ignore", invalid="ignore"):
            largest = np.abs(whole_a).max(axis=-2), np.abs(whole_b).max(axis=-1)
            bound = (largest[0] * largest[1]).sum(axis=-1)
        if not np.all(np.isfinite(bound)):
            raise ValueError(
                f"The update of '{address}' would hold NaN or infinity. "
                "Either training diverged (lower the learning rate), or a "
                "number is too large for float32."
            )
        adapter.lora_a.assign(whole_a)
        adapter.lora_b.assign(whole_b)


def of_experts(found):
    """The updates of the experts of a site as one, or that of another site.

    Args:
        found: list of `LowRank`, one an expert, or one in all.

    Returns:
        A `LowRank`. That of experts has arrays with an axis of experts in
        front, and ranks of zeros where an expert has fewer than another.
    """
    if len(found) == 1:
        return found[0]
    rank = max(one.rank for one in found)
    left = [_widened(one.left, 1, rank) for one in found]
    right = [_widened(one.right, 0, rank) for one in found]
    # An expert whose update is lost as a whole has an unknown energy.
    kept = [np.sum((one.left @ one.right) ** 2) for one in found]
    whole = [k / max(1 - one.lost, 1e-12) for k, one in zip(kept, found)]
    lost = 1 - sum(kept) / sum(whole) if sum(whole) else 0.0
    return matrices.LowRank(np.stack(left), np.stack(right), lost)


def padded(arrays, axis):
    """Arrays with as many zeros at the end of an axis as the longest needs."""
    size = max(array.shape[axis] for array in arrays)
    return np.stack([_widened(array, axis, size) for array in arrays])


def _widened(array, axis, size):
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def _float32(values):
    # Numbers that are too large become infinite; the caller tells the user.
    with np.errstate(over="ignore"):
        return values.astype("float32")


def replaceable(model, name):
    """Checks that an adapter of a model can be replaced.

    Args:
        model: An adapted model.
        name: The adapter's name, or `None` for the only one.

    Returns:
        `(state, name)`: the `AdaptedState` and the name.
    """
    state = state_lib.state_of(model)
    state_lib.check_no_block(model)
    state_lib.check_not_fitting(model)
    name = checks.one_name(state, name)
    distribution.check_scope(model)
    record = state.records[name]
    # A condition of injection may not hold now, such as a distribution.
    checks.check_attachable(model, state.layers, record.addresses, record.kept)
    return state, name


def replace(model, name, template, built):
    """Puts built adapters in the place of an attached adapter.

    Args:
        model: An adapted model that was checked.
        name: The adapter's name.
        template: The template of which the new adapters are clones.
        built: dict from address to adapter. Sites that it lacks are removed.
    """
    with attach.changing(model) as change:
        _put(change, name, template, built)


def _put(change, name, template, built):
    state = change.model._randadapt
    record = state.records[name]
    changed = record.changed
    attach.record_common(change)
    for address in changed:
        attach.remove_adapter(change, state.layers[address], name)
        if address in built:
            layer = state.layers[address]
            attach.add_adapter(change, layer, name, built[address])
    change.set(record, "template", template)
    change.set(record, "addresses", list(built))
    change.set(record, "sources", {})
    weighting.settle(change, name)
    for address in changed:
        if address not in built:
            site_layers.leave_unused_site(change, address)
    attach.activate(change, state.active)
    attach.refresh(change)


def views_of(layers, addresses):
    """dict from the addresses of sites to their kernel views."""
    return {
        address: supported.view_of(layers[address]) for address in addresses
    }


def check_rank(rank, views):
    """Raises `ValueError` if a rank exceeds a dimension of a kernel view.

    Args:
        rank: int.
        views: dict from address to `KernelView`.
    """
    for address, view in views.items():
        if rank > min(view):
            raise ValueError(
                f"`rank` must be at most {min(view)}, the smaller dimension "
                f"of the kernel view {tuple(view)} of '{address}': no update "
                f"has a larger rank. Received: rank={rank}. Lower the rank, "
                "or leave it out: each site then has its own."
            )


def size_warning(ranks, views):
    """The warning of LoRA adapters that are larger than their kernels.

    Args:
        ranks: dict from address to rank.
        views: dict from address to `KernelView`.

    Returns:
        A string, or `None` if no adapter is.
    """
    larger = [
        address
        for address, rank in ranks.items()
        if rank * sum(views[address]) > views[address][0] * views[address][1]
    ]
    if not larger:
        return None
    address = larger[0]
    return (
        f"At {len(larger)} of {len(ranks)} sites the LoRA is larger than "
        f"the kernel, such as rank {ranks[address]} at '{address}', whose "
        f"kernel view is {tuple(views[address])}. A smaller `rank` makes it "
        "smaller, and the report says what that loses."
    )


def warn_of_size(ranks, views, stacklevel=3):
    """Warns of LoRA adapters that are larger than the kernels they adapt."""
    message = size_warning(ranks, views)
    if message is not None:
        warnings.warn(message, AdapterWarning, stacklevel=stacklevel)
