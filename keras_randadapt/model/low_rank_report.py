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
        self.site_bytes = {
            address: 4 * adapter.rank * (adapter.input_dim + adapter.output_dim)
            for address, adapter in adapters.items()
        }
        self.energy_lost = {address: lost[address] for address in adapters}

    def __str__(self):
        rows = [("site", "rank", "bytes", "energy lost")]
        rows += [
            (
                address,
                f"{rank:,}",
                f"{self.site_bytes[address]:,}",
                f"{100 * self.energy_lost[address]:.4g} %",
            )
            for address, rank in self.ranks.items()
        ]
        first, *others = (max(map(len, column)) for column in zip(*rows))
        lines = [super().__str__()]
        for address, *cells in rows:
            padded = (c.rjust(w) for c, w in zip(cells, others, strict=True))
            lines.append(f"  {address.ljust(first)}  {'  '.join(padded)}")
        return "\n".join(lines)

    __repr__ = __str__
