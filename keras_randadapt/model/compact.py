"""Makes a trained adapter smaller by leaving out ranks."""

import keras

from keras_randadapt import arguments
from keras_randadapt.model import low_rank
from keras_randadapt.model import report as report_lib
from keras_randadapt.sites import lanes


def compact(model: keras.Model, name: str | None = None) -> report_lib.Report:
    """Leaves out the ranks that training switched off.

    An `AdaLoRA` or `SoRA` becomes a `LoRA` that computes the same, with its own
    rank at each site. Sites without a remaining rank are no longer sites. The
    model's outputs do not change, and the adapter's file gets smaller.

    Args:
        model: An adapted model.
        name: Optional string. The adapter's name; by default the only one.

    Returns:
        A `Report` of the adapter.

    Raises:
        TypeError: If the adapter has no ranks that can be switched off.
        ValueError: If the model has no adapter, none of this name or several
            and no `name`, or if no rank is left at any site.

    Example:

    ```python
    kra.inject(classifier, kra.SoRA(8), keep_trainable="logits")
    kra.compact(classifier)
    ```
    """
    return _replace(model, name, lambda adapter: adapter.compacted())


def truncate(
    model: keras.Model, rank: int, name: str | None = None
) -> report_lib.Report:
    """Cuts a `DyLoRA` down to its first ranks, without a search.

    It becomes a `LoRA` of that rank. The `LoRA` computes what the `DyLoRA`
    computes in training steps that draw this rank.

    Args:
        model: An adapted model.
        rank: int. The rank to keep.
        name: Optional string. The adapter's name; by default the only one.

    Returns:
        A `Report` of the adapter.

    Raises:
        TypeError: If `rank` is no integer, or if the adapter does not order
            its ranks.
        ValueError: If `rank` is out of range, or if the model has no adapter,
            none of this name or several and no `name`.

    Example:

    ```python
    kra.inject(classifier, kra.DyLoRA(8), keep_trainable="logits")
    kra.truncate(classifier, rank=4)
    ```
    """
    rank = arguments.check_rank(rank)
    return _replace(model, name, lambda adapter: adapter.truncated(rank))


def _replace(model, name, factors_of):
    state, name = low_rank.replaceable(model, name)
    record = state.records[name]
    found = {
        address: _of_experts([factors_of(one) for one in lanes.each(adapter)])
        for address, adapter in state.adapters(name).items()
    }
    factors = {
        address: (a, b) for address, (a, b, _) in found.items() if b.shape[-2]
    }
    if not factors:
        raise ValueError(
            f"No rank of the adapter '{name}' is switched on at any site: "
            "there would be nothing left. Eject it instead."
        )
    ranks = {address: b.shape[-2] for address, (_, b) in factors.items()}
    scalings = {address: found[address][2] for address in factors}
    # A site whose scaling is another one has an `alpha` of its own.
    scaling = next(iter(scalings.values()))
    template, built = low_rank.build(
        state.layers,
        name,
        factors,
        ranks,
        scaling=scaling,
        site_alphas={
            address: one * ranks[address]
            for address, one in scalings.items()
            if one != scaling
        },
        seed=record.template.seed,
        dropout=record.template.dropout,
        dtype=record.template.dtype,
    )
    low_rank.replace(model, name, template, built)
    return report_lib.Report(model, name)


def _of_experts(found):
    """The factors of a site; an expert with fewer ranks gets zeros."""
    if len(found) == 1:
        return found[0]
    a, b, scalings = zip(*found)
    return low_rank.padded(a, 1), low_rank.padded(b, 0), scalings[0]
