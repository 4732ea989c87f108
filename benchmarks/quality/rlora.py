"""RLoRA's Tables 2 and 3: few examples, real models, paired seeds.

    KERAS_BACKEND=jax python benchmarks/quality/rlora.py --quick
    KERAS_BACKEND=jax python benchmarks/quality/rlora.py

MiniLM is trained on SST-2 and rt_polarity with 100 and 200 examples, and
SmolLM2-135M on SST-2 as a prompt with 64 and on E2E generation with 32. The
methods are the head alone (or zero shot), LoRA, VeRA, RLoRA, and RLoRA with the
PAC-Bayes penalty. Query and value projections are adapted. Hyperparameters are
searched once for each dataset, for SST-2 and rt_polarity with 200 examples.
"""

import experiment
import tasks

import keras_randadapt as kra

RANK = 384
COLUMNS = {
    "parameters": ("trained, head apart", ",.0f", 1),
    # The task has the format of these two.
    "test": None,
    "gap": None,
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
            lambda seed, final, rate: task.train(
                seed, final, kra.LoRA(8, seed=seed), rate
            ),
        ),
        experiment.Method(
            "VeRA, rank 256",
            {"rate": SCALING_RATES},
            lambda seed, final, rate: task.train(
                seed, final, kra.VeRA(256, seed=seed), rate
            ),
        ),
        experiment.Method(
            f"RLoRA, rank {RANK}",
            {"rate": SCALING_RATES},
            lambda seed, final, rate: task.train(
                seed, final, kra.RLoRA(RANK, seed=seed), rate
            ),
        ),
        experiment.Method(
            "RLoRA and PAC-Bayes",
            {"rate": SCALING_RATES, "strength": STRENGTHS},
            lambda seed, final, rate, strength: task.train(
                seed,
                final,
                kra.RLoRA(RANK, seed=seed),
                rate,
                pac_bayes(strength),
            ),
            like=f"RLoRA, rank {RANK}",
        ),
    ]
    if task.head:
        first = experiment.Method(
            "head alone",
            {"rate": (1e-3, 3e-3, 1e-2)},
            lambda seed, final, rate: task.train(seed, final, None, rate),
        )
    else:
        first = experiment.Method(
            "zero shot", {}, lambda seed, final: task.zero_shot()
        )
    return [first, *rows]


def settings(quick):
    """The tables."""
    if quick:
        task = tasks.SentenceTask("sst2", 50, 4, 200, 300)
        yield experiment.Setting("SST-2, 100", task, 2)
        return
    for dataset, title in (("sst2", "SST-2"), ("rt_polarity", "rt_polarity")):
        searched = None
        for examples in (200, 100):
            name = f"{title}, {examples}"
            task = tasks.SentenceTask(dataset, examples // 2, 8)
            yield experiment.Setting(name, task, 5, choices_of=searched)
            searched = name
    task = tasks.PromptTask(32, 3)
    yield experiment.Setting("SST-2 as a prompt, 64", task, 3)
    yield experiment.Setting("E2E, 32", tasks.GenerationTask(32, 3), 3)


if __name__ == "__main__":
    experiment.main(
        "rlora",
        __doc__,
        settings,
        methods,
        COLUMNS,
        "LoRA, rank 8",
        pairs=[("RLoRA and PAC-Bayes", f"RLoRA, rank {RANK}")],
    )
