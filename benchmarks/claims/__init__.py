"""Experiments that settle the papers' claims: designed first, then run.

    KERAS_BACKEND=jax python -m benchmarks.claims run rm_lora --data PATH
    python -m benchmarks.claims verdicts

`designs/` has one file an experiment. It is committed before the experiment is
run, and it says what is claimed, what is measured, how many pairs that needs
and which verdict follows from which interval. The other modules say how an
experiment is run, whatever it is about.
"""
