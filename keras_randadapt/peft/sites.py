"""The updates of sites, made of the updates of modules."""

import dataclasses

import numpy as np

from keras_randadapt.matrices import low_rank as matrices
from keras_randadapt.model import low_rank


@dataclasses.dataclass(kw_only=True)
class SiteUpdate:
    """The change that an adapter makes to one site.

    `left` and `right` of experts have an axis of experts in front.

    Attributes:
        left: float64 array `(input_dim, rank)`.
        right: float64 array `(rank, output_dim)`, without the scaling.
        scaling: float.
        magnitude: float64 array `(output_dim,)`, NaN where the base's norm
            stays, or `None`.
        scale: float64 array, IA3's factors, or `None`.
        of_inputs: Whether they are of inputs.
    """

    left: np.ndarray = None
    right: np.ndarray = None
    scaling: float = 1.0
    magnitude: np.ndarray | None = None
    scale: np.ndarray | None = None
    of_inputs: bool = False


def low_rank_updates(names, updates, views):
    """The low-rank updates of all sites.

    Args:
        names: A `NameMap`.
        updates: dict from module to `update.Update`.
        views: dict from address to the shape of the kernel view.

    Returns:
        dict from address to `SiteUpdate`. A site that no rank of its module
        reaches is left out, if others are reached.
    """
    scalings = {one.scaling for one in updates.values()}
    common = scalings.pop() if len(scalings) == 1 else None
    found = {}
    for address, parts in names.parts.items():
        here = [(p, updates[p.module]) for p in parts if p.module in updates]
        if not here:
            continue
        n_in, n_out = views[address]
        blocks, magnitude = [], None
        for part, update in here:
            factor = 1.0 if common is not None else update.scaling
            a, b = _trimmed(update.a, update.b, part.outputs)
            *stack, _, rank = b.shape
            right = np.zeros((*stack, rank, n_out))
            right[..., part.columns] = factor * np.swapaxes(b, -1, -2)
            left = np.swapaxes(a, -1, -2)[..., part.inputs, :]
            blocks.append((left, right))
            if update.magnitude is not None:
                if magnitude is None:
                    magnitude = np.full(n_out, np.nan)
                magnitude[part.columns] = update.magnitude[part.outputs]
        left, right = _joined(blocks)
        # A rank that is on and not here reaches another site of the module.
        elsewhere = any(_is_on(update) for _, update in here)
        if left.shape[-1] == 0 and elsewhere and magnitude is None:
            continue
        if left.shape[-1] >= min(n_in, n_out):
            left, right = _shortened(left, right)
        found[address] = SiteUpdate(
            left=left,
            right=right,
            scaling=1.0 if common is None else common,
            magnitude=magnitude,
        )
    return found


def _is_on(update):
    """Whether the update of a module is not zero."""
    return bool(
        np.any(np.any(update.a != 0, axis=-1) & np.any(update.b != 0, axis=-2))
    )


def _trimmed(a, b, outputs):
    """The ranks of a module that reach some of its outputs.

    A rank whose B is zero in the whole module is untrained and stays. Experts
    keep the ranks that one of them needs.
    """
    here = b[..., outputs, :]
    untrained = ~np.any(b != 0, axis=-2)
    on = np.any(a != 0, axis=-1) & (np.any(here != 0, axis=-2) | untrained)
    on = np.any(on.reshape(-1, on.shape[-1]), axis=0)
    return a[..., on, :], here[..., on]


def _joined(blocks):
    """One pair of factors. Pairs with the same first factor share it."""
    if len(blocks) > 1 and all(
        np.array_equal(left, blocks[0][0]) for left, _ in blocks
    ):
        return blocks[0][0], sum(right for _, right in blocks)
    return (
        np.concatenate([left for left, _ in blocks], axis=-1),
        np.concatenate([right for _, right in blocks], axis=-2),
    )


def _shortened(left, right):
    """The same product with no more ranks than the smaller dimension."""
    if left.shape[-1] == min(left.shape[-2], right.shape[-1]):
        return left, right
    products = left @ right
    if products.ndim == 2:
        found = matrices.shortest((products,))
    else:
        found = low_rank.of_experts(
            [matrices.shortest((one,)) for one in products]
        )
    return found.left, found.right


def scales(path, names, updates, views):
    """IA3's factors of all sites.

    Args:
        path: The directory, for errors.
        names: A `NameMap`.
        updates: dict from module to `update.Update`.
        views: dict from address to the shape of the kernel view.

    Returns:
        dict from address to `SiteUpdate`.

    Raises:
        ValueError: If the modules of a site scale its inputs differently.
    """
    found = {}
    for address, parts in names.parts.items():
        here = [(p, updates[p.module]) for p in parts if p.module in updates]
        if not here:
            continue
        n_in, n_out = views[address]
        by_input = [u.scale_inputs is not None for _, u in here]
        if not any(by_input):
            scale = np.ones(n_out)
            for part, update in here:
                scale[part.columns] = update.scale_outputs[part.outputs]
            found[address] = SiteUpdate(scale=scale)
            continue
        vectors = [
            u.scale_inputs[p.inputs]
            for p, u in here
            if u.scale_inputs is not None
        ]
        whole = len(here) == len(parts) and all(by_input)
        if not whole or any(
            not np.array_equal(one, vectors[0]) for one in vectors
        ):
            raise ValueError(
                f"'{path}' scales the inputs of the modules "
                f"{[p.module for p in parts]} in different ways, and in Keras "
                f"they are one layer, '{address}'."
            )
        found[address] = SiteUpdate(scale=vectors[0], of_inputs=True)
    return found
