"""`to_lora`: any adapter that adds a delta becomes a LoRA."""

import numbers

import keras

from keras_randadapt import arguments
from keras_randadapt.matrices import low_rank as matrices
from keras_randadapt.model import low_rank
from keras_randadapt.model import low_rank_report
from keras_randadapt.model import progress
from keras_randadapt.model import updates
from keras_randadapt.sites import lanes


def to_lora(
    model: keras.Model,
    rank: int | None = None,
    energy: float | None = None,
    name: str | None = None,
    *,
    verbose: str | int = "auto",
) -> low_rank_report.LowRankReport:
    """Replaces an adapter by a `LoRA`, in place.

    By default the `LoRA` computes what the adapter computes, up to float32
    rounding, with the smallest rank that does. Where the method's rank is
    below both dimensions of a kernel, its own factors are taken, without a
    decomposition and without the ranks that are zero. Elsewhere, as for
    `RandLoRA` and `SAID`, the rank comes from a singular value decomposition.
    With `rank` or `energy` the `LoRA` is the closest one of its rank.

    The sites, the name, whether it is active and the layers that it keeps
    trainable stay the same. A site whose update is zero gets an untrained
    `LoRA` of rank 1. The `LoRA` is in float32, its `scaling` is 1, and it has
    the seed and the dropout of the adapter; penalties and optimizer wrappers
    of the method end. Optimizers start anew, as in `compact`.

    Args:
        model: An adapted model.
        rank: Optional int. The rank at every site. Where the update has a
            lower one, the other ranks start as in an untrained `LoRA`. Large
            updates are decomposed by a randomized algorithm. Its result is
            nearly the closest one, and it draws the same numbers in every run.
        energy: Optional float in `(0, 1]`, instead of `rank`. Each site gets
            the smallest rank that keeps this share of the update's energy, its
            squared Frobenius norm.
        name: Optional string. The adapter's name; by default the only one.
        verbose: 1 shows a progress bar, and 0 none. `"auto"` shows it when the
            work takes longer than two seconds.

    Returns:
        A `LowRankReport`, which has the rank, the bytes and the share of the
        energy lost at each site. It is meant to be printed.

    Raises:
        TypeError: If `rank` is no integer.
        ValueError: If the model has no adapter, none of this name or several
            and no `name`; if the adapter does more than adding a delta, as
            `DoRA` and `IA3` do; if `rank` exceeds the smaller dimension of a
            kernel view, or `energy` is out of range, or both are given; or if
            the update holds NaN. The model is then unchanged.

    Example:

    ```python
    kra.inject(classifier, kra.RandLoRA(32), keep_trainable="logits")
    print(kra.to_lora(classifier, rank=8))
    kra.save_adapter(classifier, "as_lora.safetensors")
    ```

    References:
        - Halko, Martinsson and Tropp, "Finding structure with randomness",
          SIAM Review 2011, algorithms 4.4 and 5.1, for large updates.
    """
    state, name = low_rank.replaceable(model, name)
    record = state.records[name]
    updates.check_is_delta(name, record.template)
    rank, energy = check_size(rank, energy)
    progress.check_verbose(verbose)
    views = low_rank.views_of(state.layers, record.addresses)
    if rank is not None:
        low_rank.check_rank(rank, views)
    factors, ranks, lost = factors_of(
        state.adapters(name), name, rank, energy, verbose
    )
    template, built = low_rank.build(
        state.layers,
        name,
        factors,
        ranks,
        seed=record.template.seed,
        dropout=record.template.dropout,
    )
    low_rank.warn_of_size(ranks, views)
    low_rank.replace(model, name, template, built)
    return low_rank_report.LowRankReport(model, name, lost)


def factors_of(adapters, name, rank, energy, verbose):
    """The factors of the LoRA that an adapter becomes.

    Args:
        adapters: dict from address to a built adapter that adds a delta.
        name: The adapter's name.
        rank: See `to_lora`, as all that follow.
        energy: float or `None`.
        verbose: 1, 0 or `"auto"`.

    Returns:
        `(factors, ranks, lost)`: three dicts from address, to the two NumPy
        factors, to the rank, and to the share of the energy that is lost.
    """
    found = {}
    for address in progress.shown(adapters, verbose):
        found[address] = low_rank.of_experts(
            [
                _factored(updates.parts_of(one, address, name), rank, energy)
                for one in lanes.each(adapters[address])
            ]
        )
    return (
        {address: (one.left, one.right) for address, one in found.items()},
        {address: rank or max(1, one.rank) for address, one in found.items()},
        {address: one.lost for address, one in found.items()},
    )


def _factored(parts, rank, energy):
    if rank is not None:
        return matrices.closest(parts, rank)
    if energy is None and len(parts) == 2:
        return matrices.without_zeros(parts)
    return matrices.shortest(parts, energy or 1.0)


def check_size(rank, energy):
    """Validates the arguments `rank` and `energy`."""
    if rank is not None and energy is not None:
        raise ValueError(
            "`rank` and `energy` both choose the ranks: give one of them. "
            f"Received: rank={rank}, energy={energy}"
        )
    if rank is not None:
        rank = arguments.check_rank(rank)
    if energy is not None:
        is_number = isinstance(energy, numbers.Real)
        if isinstance(energy, bool) or not is_number or not 0 < energy <= 1:
            raise ValueError(
                "`energy` must be above 0 and at most 1: it is the share of "
                "the update's energy that is kept, such as 0.99. "
                f"Received: energy={energy!r}"
            )
        energy = float(energy)
    return rank, energy
