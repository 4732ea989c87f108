"""`combine`: one adapter of the updates of several."""

import dataclasses
import numbers
from collections.abc import Mapping

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt import random
from keras_randadapt.matrices import low_rank as matrices
from keras_randadapt.matrices import merging
from keras_randadapt.model import attach
from keras_randadapt.model import checks
from keras_randadapt.model import distribution
from keras_randadapt.model import low_rank
from keras_randadapt.model import low_rank_report
from keras_randadapt.model import moving_state
from keras_randadapt.model import progress
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import updates
from keras_randadapt.sites import lanes

METHODS = ("linear", "concat", "svd", "ties", "dare")

# The density of methods that take one, if none is given: TIES's paper keeps
# 20 % of the entries, and DARE's drops 90 %.
_DENSITIES = {"ties": 0.2, "dare": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the updates are combined: the arguments of `combine`, checked."""

    method: str
    rank: int | None
    density: float | None
    seed: int


def combine(
    model: keras.Model,
    weights: Mapping[str, float],
    name: str,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    heads_from: str | None = None,
    *,
    verbose: str | int = "auto",
) -> low_rank_report.LowRankReport:
    """Combines adapters to a new one, without training.

    The adapters may differ in method, rank and sites, and they stay as they
    are. The new adapter is a `LoRA` at each of their sites, in float32 and
    with `scaling` 1. It is attached inactive; see `set_active`.

    Args:
        model: An adapted model.
        weights: dict from the names of the adapters to their weights, which
            may be negative. An adapter that is not at a site counts as zero
            there. Those that `set_active` gave do not matter.
        name: The new adapter's name: letters, digits, `_` and `-`.
        method: How each site's updates are combined.
            `"linear"` is the sum of the updates times their weights, with the
            smallest rank that keeps all but what float32 rounds.
            `"concat"` is the same sum. It puts the factors of the adapters
            side by side as they are, so its rank is the sum of their ranks.
            `"svd"` is the closest update of a lower rank to that sum.
            `"ties"` keeps only the largest entries of each update, elects a
            sign for each entry, and takes the mean of the weighted entries of
            this sign.
            `"dare"` drops random entries of each update, divides the others by
            `density` and takes the weighted sum.
        rank: Optional int. The rank at every site. By default it is the
            smallest that keeps all but what float32 rounds, which is mostly
            the full one for `"ties"` and `"dare"`. For `"svd"` it is the
            largest rank among the adapters at the site.
        density: Optional float in `(0, 1]`. The part of the entries of each
            update that `"ties"` (0.2 by default) and `"dare"` (0.1) keep.
        seed: int. It determines the entries that `"dare"` drops.
        heads_from: Optional string. The adapter that gives the new one its
            layer where several keep the same layer trainable. The new one also
            gets the state of the base model that the training of this adapter
            moved, such as a running mean; by default that of the first adapter
            in `weights` that moved it.
        verbose: See `to_lora`.

    Returns:
        A `LowRankReport`. The energy that it calls lost is that of the
        combined update.

    Raises:
        TypeError: If `weights` is no dict, or if `rank` is no integer.
        ValueError: If a name is unknown, `name` is taken, a weight is not
            finite or no two adapters share a site; if an adapter does more
            than adding a delta, as `DoRA` and `IA3` do, or its rank is not
            known and the method needs it; if two adapters keep the same layer
            and `heads_from` chooses none; if `rank` exceeds the smaller
            dimension of a kernel view, or `density` is out of range; or if an
            update holds NaN. The model is then unchanged.

    Example:

    ```python
    kra.inject(model, kra.LoRA(8), name="law", keep_trainable="logits")
    kra.inject(model, kra.RLoRA(64), name="french")
    print(kra.combine(model, {"law": 0.7, "french": 0.3}, name="both"))
    kra.set_active(model, "both")
    ```

    References:
        - Yadav et al., "TIES-merging", NeurIPS 2023, algorithm 1, for each
          site by itself.
        - Yu et al., "Language models are super Mario" (DARE), ICML 2024,
          equation 1, followed by a weighted sum.
    """
    checks.check_model(model)
    state = state_lib.state_of(model)
    weights = _check_weights(state, weights)
    checks.check_new_name(model, name)
    distribution.check_scope(model)
    plan = _check_plan(method, rank, density, seed)
    progress.check_verbose(verbose)
    sites = _sites(state, weights)
    views = low_rank.views_of(state.layers, sites)
    if plan.rank is not None:
        low_rank.check_rank(plan.rank, views)
    kept = _kept_values(state, weights, heads_from)
    moving = _moving(state, weights, heads_from)
    checks.check_attachable(model, state.layers, sites, list(kept))

    found, ranks = {}, {}
    for address in progress.shown(sites, verbose):
        found[address] = low_rank.of_experts(
            [
                _combined(plan, place, terms, weights)
                for place, terms in _terms(state, address, weights)
            ]
        )
        ranks[address] = plan.rank or max(1, found[address].rank)
    template, built = low_rank.build(
        state.layers,
        name,
        {a: (one.left, one.right) for a, one in found.items()},
        ranks,
        seed=plan.seed,
    )
    low_rank.warn_of_size(ranks, views)
    attachment = attach.Attachment(
        template=template,
        name=name,
        layers=state.layers,
        kept=list(kept),
        sources={},
        built=built,
    )
    with attach.changing(model) as change:
        attach.attach(change, attachment)
        change.set(state.records[name], "kept_values", kept)
        change.set(state.records[name], "moving", moving)
    lost = {address: one.lost for address, one in found.items()}
    return low_rank_report.LowRankReport(model, name, lost)


def _terms(state, address, names):
    """The updates of a site by adapter, of each expert where there are some.

    Returns:
        list of pairs of a place and a dict from the adapter's name to its
        update; see `updates.parts_of`. The place is the address, and that of
        an expert its number below it.
    """
    site = state.layers[address]
    adapters = {name: site.adapter.get(name) for name in names}
    experts = {
        name: lanes.each(adapter)
        for name, adapter in adapters.items()
        if adapter is not None
    }
    (number,) = {len(one) for one in experts.values()}
    places = [address]
    if getattr(site, "stack", None) is not None:
        places = [f"{address}/{e}" for e in range(number)]
    return [
        (
            place,
            {
                name: updates.parts_of(one[e], place, name)
                for name, one in experts.items()
            },
        )
        for e, place in enumerate(places)
    ]


def _combined(plan, address, terms, weights):
    """The combined update of one site, as a `LowRank`.

    Args:
        plan: A `_Plan`.
        address: The site's address.
        terms: dict from the names of the adapters at this site to their
            updates; see `updates.parts_of`.
        weights: dict from name to weight.
    """
    weighted = [(weights[name], parts) for name, parts in terms.items()]
    if plan.method == "concat":
        return _stacked(address, terms, weighted)
    if plan.method == "ties":
        deltas = [matrices.dense(parts) for parts in terms.values()]
        own = [weights[name] for name in terms]
        parts = (merging.ties(deltas, own, plan.density),)
    elif plan.method == "dare":
        parts = (_dropped(plan, address, terms, weights),)
    else:
        parts = matrices.added(weighted)
    rank = plan.rank
    if plan.method == "svd" and rank is None:
        rank = _largest_rank(address, terms)
    if rank is None:
        return matrices.shortest(parts)
    return matrices.closest(parts, rank)


def _dropped(plan, address, terms, weights):
    """DARE's weighted sum."""
    total = 0.0
    for name, parts in terms.items():
        delta = matrices.dense(parts)
        role = f"dare/{address}/{name}"
        uniforms = random.uniforms(plan.seed, role, delta.shape)
        kept = merging.drop_and_rescale(delta, plan.density, uniforms)
        total = total + weights[name] * kept
    return total


def _stacked(address, terms, weighted):
    _check_known_ranks(address, terms, "concat", "linear")
    left, right = matrices.stacked(weighted)
    smaller = min(left.shape[0], right.shape[1])
    found = matrices.without_zeros((left, right))
    if found.rank > smaller:
        raise ValueError(
            f"The ranks of the adapters at '{address}' add up to {found.rank}, "
            f"and the smaller dimension of its kernel view is {smaller}. Use "
            '`method="linear"`, which computes the same with at most that '
            "rank."
        )
    return found


def _largest_rank(address, terms):
    _check_known_ranks(address, terms, "svd", "linear")
    return max(len(parts[1]) for parts in terms.values())


def _check_known_ranks(address, terms, method, other):
    full = [name for name, parts in terms.items() if len(parts) == 1]
    if full:
        raise ValueError(
            f"The rank of the update of '{address}' by the adapter "
            f"'{full[0]}' is not known to be below its dimensions, and "
            f'`method="{method}"` takes the rank of the result from the '
            f'adapters. Use `method="{other}"`'
            + (", or give `rank`." if method == "svd" else ".")
        )


def _check_weights(state, weights):
    """The weights as floats, by name."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            "`weights` must be a dict from names of adapters to numbers, such "
            'as {"law": 0.7, "french": 0.3}. '
            f"Received: weights={weights!r}"
        )
    if not weights:
        raise ValueError(
            "`weights` must name at least one adapter. Received: {}. "
            f"Attached: {sorted(state.records)}"
        )
    names = checks.check_names(state, list(weights))
    for name in names:
        updates.check_is_delta(name, state.records[name].template)
    return {
        name: arguments.check_scaling(weights[name], f"weights[{name!r}]")
        for name in names
    }


def _check_plan(method, rank, density, seed):
    arguments.check_choice(method, METHODS, "method")
    if rank is not None:
        rank = arguments.check_rank(rank)
        if method == "concat":
            raise ValueError(
                '`method="concat"` keeps the factors as they are and takes no '
                '`rank`. Use `method="linear"` or "svd". '
                f"Received: rank={rank}"
            )
    if density is not None and method not in _DENSITIES:
        raise ValueError(
            f"`density` is for the methods {sorted(_DENSITIES)}. "
            f"Received: density={density!r}, method={method!r}"
        )
    if density is None:
        density = _DENSITIES.get(method)
    else:
        is_number = isinstance(density, numbers.Real)
        if isinstance(density, bool) or not is_number or not 0 < density <= 1:
            raise ValueError(
                "`density` must be above 0 and at most 1: it is the part of "
                f"the entries that is kept. Received: density={density!r}"
            )
        density = float(density)
    return _Plan(
        method=method,
        rank=rank,
        density=density,
        seed=random.check_seed(seed),
    )


def _sites(state, names):
    """The addresses of all sites of these adapters, in the model's order."""
    used = [state.records[name].addresses for name in names]
    union = set().union(*used)
    if len(used) > 1 and len(union) == sum(map(len, used)):
        raise ValueError(
            f"The adapters {list(names)} share no site, so there is nothing "
            "to combine. Activate them together instead: "
            f"`keras_randadapt.set_active(model, {list(names)})`."
        )
    return [address for address in state.layers if address in union]


def _kept_values(state, names, heads_from):
    """dict from the addresses of kept layers to copies of their values."""
    if heads_from is not None and heads_from not in names:
        raise ValueError(
            "`heads_from` must be one of the combined adapters, "
            f"{list(names)}. Received: heads_from={heads_from!r}"
        )
    if heads_from is not None and not state.records[heads_from].kept:
        raise ValueError(
            f"`heads_from` names the adapter '{heads_from}', which keeps no "
            "layer trainable. Name another one, or leave it out."
        )
    owners = {}
    for name in names:
        for address in state.records[name].kept:
            owners.setdefault(address, []).append(name)
    kept = {}
    for address in state.layers:
        keeping = owners.get(address, [])
        if len(keeping) > 1 and heads_from not in keeping:
            raise ValueError(
                f"The adapters {keeping} all keep '{address}' trainable, each "
                "with weights of its own, and weights of a whole layer are "
                "not combined. Choose one of them with `heads_from`."
            )
        if keeping:
            owner = keeping[0] if len(keeping) == 1 else heads_from
            values = state.records[owner].kept_values
            if values is None:
                layer = state.layers[address]
                kept[address] = state_lib.kept_layer_values(layer)
            else:
                kept[address] = [np.array(v) for v in values[address]]
    return kept


def _moving(state, names, heads_from):
    """The state that training moved, for the new adapter's record."""
    for name in [heads_from, *names]:
        moved = {} if name is None else moving_state.moved_by(state, name)
        if moved:
            return {**moving_state.base_values(state), **moved}
    return None
