"""RLoRA's Tables 2 and 3: few examples, real models, paired seeds.

    KERAS_BACKEND=jax python benchmarks/quality/rlora.py --quick
    KERAS_BACKEND=jax python benchmarks/quality/rlora.py

MiniLM on SST-2 and rt_polarity with 100 and 200 examples, SmolLM2-135M on
SST-2 as a prompt and on E2E generation with 128: the head alone (or zero
shot), LoRA, VeRA, RLoRA, and RLoRA with the PAC-Bayes term. Query and value
projections are adapted.
"""

import pathlib

import experiment
import tasks

import keras_randadapt as kra

OUTPUT = pathlib.Path("outputs/quality/rlora.csv")
RANK = 384
COLUMNS = {
    "parameters": ("trained, head apart", ",.0f", 1),
    # The task says how these two are printed.
    "test": None,
    "gap": None,
    "seconds": ("seconds", ".0f", 1),
}
LORA_RATES = (1e-3, 3e-3, 1e-2)
SCALING_RATES = (1e-2, 3e-2, 1e-1)
STRENGTHS = (1e-4, 1e-3, 1e-2)


def methods(task):
    """The rows of one table."""

    def pac_bayes(strength):
        return lambda x, y: [task.pac_bayes(x, y, strength)]

    rows = [
        experiment.Method(
            "LoRA, rank 8",
            {"rate": LORA_RATES},
            lambda seed, rate: task.train(seed, kra.LoRA(8, seed=seed), rate),
        ),
        experiment.Method(
            "VeRA, rank 256",
            {"rate": SCALING_RATES},
            lambda seed, rate: task.train(seed, kra.VeRA(256, seed=seed), rate),
        ),
        experiment.Method(
            f"RLoRA, rank {RANK}",
            {"rate": SCALING_RATES},
            lambda seed, rate: task.train(
                seed, kra.RLoRA(RANK, seed=seed), rate
            ),
        ),
        experiment.Method(
            "RLoRA and PAC-Bayes",
            {"rate": SCALING_RATES, "strength": STRENGTHS},
            lambda seed, rate, strength: task.train(
                seed, kra.RLoRA(RANK, seed=seed), rate, pac_bayes(strength)
            ),
            like=f"RLoRA, rank {RANK}",
        ),
    ]
    if task.head:
        first = experiment.Method(
            "head alone",
            {"rate": (1e-3, 3e-3, 1e-2)},
            lambda seed, rate: task.train(seed, None, rate),
        )
    else:
        first = experiment.Method(
            "zero shot", {}, lambda seed: task.zero_shot()
        )
    return [first, *rows]


def settings(quick):
    """`(name, task, seeds)` of each table."""
    if quick:
        yield "SST-2, 100", tasks.SentenceTask("sst2", 50, 4, 200, 300), 2
        return
    for examples in (200, 100):
        for dataset, title in (
            ("sst2", "SST-2"),
            ("rt_polarity", "rt_polarity"),
        ):
            task = tasks.SentenceTask(dataset, examples // 2, 20)
            yield f"{title}, {examples}", task, 5
    yield "SST-2 as a prompt, 128", tasks.PromptTask(64, 4), 3
    yield "E2E, 128", tasks.GenerationTask(128, 2), 3


if __name__ == "__main__":
    experiment.main(__doc__, OUTPUT, settings, methods, COLUMNS, "LoRA, rank 8")
