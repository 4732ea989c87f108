"""RM-LoRA's Table 5 and Figure 1: rank, orthogonality, generalization.

    KERAS_BACKEND=jax python benchmarks/quality/rm_lora.py --quick
    KERAS_BACKEND=jax python benchmarks/quality/rm_lora.py

MiniLM is trained on SST-2 with 200 examples. Its query and value projections
are adapted, at three ranks. The methods are LoRA, LoRA with masked gradients
(GM-LoRA), LoRA with the orthogonality penalty (R-LoRA), and LoRA with both
(RM-LoRA). The learning rate of each method is searched at the middle rank.
"""

import experiment
import tasks

import keras_randadapt as kra

RATES = (1e-3, 3e-3, 1e-2)
#: Singular values below this share of the largest do not count.
TOLERANCE = 0.01
COLUMNS = {
    "parameters": ("trained, head apart", ",.0f", 1),
    "rank": ("rank of the update", ".1f", 1),
    "effective_rank": ("effective rank", ".1f", 1),
    "orthogonality": ("orthogonality loss", ",.1f", 1),
    # The task has the format of these two.
    "test": None,
    "gap": None,
}


def adapters(rank):
    """The methods, which differ only in the penalty and the masks."""
    return {
        "LoRA": lambda seed: kra.RMLoRA(
            rank, orthogonality=0.0, update_rank=rank, seed=seed
        ),
        "GM-LoRA": lambda seed: kra.RMLoRA(rank, orthogonality=0.0, seed=seed),
        "R-LoRA": lambda seed: kra.RMLoRA(rank, update_rank=rank, seed=seed),
        "RM-LoRA": lambda seed: kra.RMLoRA(rank, seed=seed),
    }


def measure(model):
    def mean(table, column):
        return sum(table[column]) / len(table)

    analysis = kra.analysis
    return {
        "rank": mean(
            analysis.intrinsic_rank(model, tolerance=TOLERANCE), "rank"
        ),
        "effective_rank": mean(
            analysis.effective_rank(model), "effective_rank"
        ),
        "orthogonality": mean(
            analysis.orthogonality_loss(model), "orthogonality_loss"
        ),
    }


def methods(task):
    """The rows of the table of one rank."""

    def method(name, adapter):
        return experiment.Method(
            name,
            {"rate": RATES},
            lambda seed, final, rate: task.train(
                seed, final, adapter(seed), rate, measure=measure
            ),
        )

    return [method(*row) for row in adapters(task.rank).items()]


def settings(quick):
    """The tables."""
    searched = None
    for rank in (8,) if quick else (32, 8, 128):
        if quick:
            task = tasks.SentenceTask("sst2", 50, 4, 200, 300)
        else:
            task = tasks.SentenceTask("sst2", 100, 8)
        task.rank = rank
        name = f"SST-2, {2 * task.per_class}, rank {rank}"
        seeds = 2 if quick else 3
        yield experiment.Setting(name, task, seeds, choices_of=searched)
        searched = searched or name


if __name__ == "__main__":
    experiment.main("rm_lora", __doc__, settings, methods, COLUMNS, "LoRA")
