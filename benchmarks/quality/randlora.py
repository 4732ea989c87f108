"""RandLoRA's Table 3: does the rank of the update matter at equal size?

    KERAS_BACKEND=jax python benchmarks/quality/randlora.py --quick
    KERAS_BACKEND=jax python benchmarks/quality/randlora.py

The model is DINOv2-small on photographs of sign-language digits, 10 of each
class. LoRA is compared with RandLoRA whose updates have rank r, d/2 and d. All
have about the same number of trained weights (9,216 to 9,600 for a projection
of 384 x 384).
"""

import experiment
import tasks

import keras_randadapt as kra

RATES = (1e-3, 3e-3, 1e-2)
COLUMNS = {
    "parameters": ("trained, head apart", ",.0f", 1),
    "rank": ("rank of the update", ".0f", 1),
    # The task has the format of these two.
    "test": None,
    "gap": None,
}
ADAPTERS = {
    "LoRA, rank 12": lambda seed: kra.LoRA(12, seed=seed),
    "RandLoRA averaged, rank r = 16": lambda seed: kra.RandLoRA(
        16, variant="averaged", seed=seed
    ),
    # It has half of twice as many bases and thus as many weights as the full
    # one.
    "RandLoRA half, rank d/2": lambda seed: kra.RandLoRA(
        8, variant="half", seed=seed
    ),
    "RandLoRA, rank d": lambda seed: kra.RandLoRA(16, seed=seed),
    "RandLoRA hadamard, rank d": lambda seed: kra.RandLoRA(
        16, basis="hadamard", seed=seed
    ),
}


def measure(model):
    ranks = kra.analysis.intrinsic_rank(model)["rank"]
    return {"rank": sum(ranks) / len(ranks)}


def methods(task):
    """The rows of the table."""

    def method(name, adapter):
        return experiment.Method(
            name,
            {"rate": RATES},
            lambda seed, final, rate: task.train(
                seed, final, adapter(seed), rate, measure=measure
            ),
        )

    return [method(*row) for row in ADAPTERS.items()]


def settings(quick):
    """The tables."""
    if quick:
        task = tasks.PhotoTask(5, 2, 50, 100)
        yield experiment.Setting("sign_digits, 5 a class", task, 2)
        return
    task = tasks.PhotoTask(10, 8, 200, 400)
    yield experiment.Setting("sign_digits, 10 a class", task, 3)


if __name__ == "__main__":
    experiment.main(
        "randlora", __doc__, settings, methods, COLUMNS, "LoRA, rank 12"
    )
