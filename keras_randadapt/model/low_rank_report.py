"""`LowRankReport`: a printed summary of an adapter that became a LoRA."""

import keras

from keras_randadapt.model import report


class LowRankReport(report.Report):
    """The ranks of a LoRA, and what it lost at each site. `print` it.

    It has the attributes of `Report` as well.

    Attributes:
        ranks: dict from the sites' structural addresses to the LoRA's ranks.
        site_bytes: dict from address to the bytes that the site takes in an
            adapter file.
        energy_lost: dict from address to the share of the update's energy, its
            squared Frobenius norm, that the LoRA lacks. It is 0 where all is
            kept but what float32 rounds.

    Example:

    ```python
    report = kra.to_lora(model, energy=0.9)
    print(report)
    most = max(report.energy_lost, key=report.energy_lost.get)
    print(most, report.ranks[most], report.site_bytes[most])
    ```
    """

    def __init__(self, model: keras.Model, name: str, lost: dict[str, float]):
        super().__init__(model, name)
        adapters = model._randadapt.adapters(name)
        self.ranks = {a: adapter.rank for a, adapter in adapters.items()}
        self.site_bytes = site_bytes(adapters)
        self.energy_lost = {address: lost[address] for address in adapters}

    def __str__(self):
        table = lines(self.ranks, self.site_bytes, self.energy_lost)
        return "\n".join([super().__str__(), *table])

    __repr__ = __str__


def site_bytes(adapters):
    """dict from address to the bytes of a LoRA in an adapter file."""
    return {
        address: 4 * adapter.rank * (adapter.input_dim + adapter.output_dim)
        for address, adapter in adapters.items()
    }


def lines(ranks, sizes, lost):
    """The lines of a table of the sites.

    Args:
        ranks: dict from address to rank.
        sizes: dict from address to bytes.
        lost: dict from address to the share of the energy that was lost.
    """
    rows = [("site", "rank", "bytes", "energy lost")]
    rows += [
        (
            address,
            f"{rank:,}",
            f"{sizes[address]:,}",
            f"{100 * lost[address]:.4g} %",
        )
        for address, rank in ranks.items()
    ]
    first, *others = (max(map(len, column)) for column in zip(*rows))
    for address, *cells in rows:
        padded = (c.rjust(w) for c, w in zip(cells, others, strict=True))
        yield f"  {address.ljust(first)}  {'  '.join(padded)}"
