"""RM-LoRA's masked gradients: computed and then zeroed, or not computed.

    KERAS_BACKEND=jax python benchmarks/masked_gradients.py     # one backend
    python benchmarks/masked_gradients.py --all                 # each of them

Section 4.3 of the RM-LoRA paper expects much of not computing the gradients of
masked directions. A frozen `Dense(d)` with LoRA gets `--tokens` inputs of `d`
features in float32, and half of the rank is masked. A step consists of the
forward pass and of the gradients of the input and of the trained weights:

- "none": no gradient of `A` and `B`. Nothing that skips gradients is faster;
- "all": the gradients of LoRA;
- "zeroed": the gradients of LoRA, of which half are set to zero. This is what
  `MaskedGradient` does;
- "skipped": the gradients of half of the columns of `A` and rows of `B`. Which
  half is a constant here, which is better than what training could do.

The steps take turns in one loop. The table has the least CPU seconds of the
process, since other programs of the machine add to the time on the wall.
"saved" is the share of the step that skipping saves, "floor" the same share if
a step took as long as its multiply-adds say, and "at most" that of "none".
"""

import time

import randlora
import side_by_side

COLUMNS = (
    ("rank", "{}"),
    ("all, CPU ms", "{:.2f}"),
    ("zeroed, CPU ms", "{:.2f}"),
    ("skipped, CPU ms", "{:.2f}"),
    ("none, CPU ms", "{:.2f}"),
    ("saved", "{:.1%}"),
    ("floor", "{:.1%}"),
    ("at most", "{:.1%}"),
)


def saved_share(tokens, d, rank, update_rank):
    """The share of a step's multiply-adds that skipping leaves out."""
    product = tokens * d * d
    thin = tokens * d * rank
    # Both passes have the product of the base, and two of the adapter. The
    # weights' gradients are two more.
    whole = 2 * product + 6 * thin
    return 2 * thin * (1 - update_rank / rank) / whole


def weights(d, rank):
    import numpy as np
    from keras import ops

    rng = np.random.default_rng(0)
    shapes = ((d, d), (d, rank), (rank, d))
    return [
        ops.convert_to_tensor(
            rng.standard_normal(shape, dtype="float32") / d**0.5
        )
        for shape in shapes
    ]


def gradients(way, x, g, w, a, b, update_rank):
    """The output and the gradients of one step, written out."""
    from keras import ops

    u = ops.matmul(x, a)
    y = ops.matmul(x, w) + ops.matmul(u, b)
    of_u = ops.matmul(g, ops.transpose(b))
    of_x = ops.matmul(g, ops.transpose(w)) + ops.matmul(of_u, ops.transpose(a))
    if way == "none":
        return y, of_x
    if way == "skipped":
        u, of_u = u[:, :update_rank], of_u[:, :update_rank]
    of_a = ops.matmul(ops.transpose(x), of_u)
    of_b = ops.matmul(ops.transpose(u), g)
    rank = b.shape[0]
    if way == "skipped":
        # The optimizer wants gradients of the whole weights.
        missing = rank - update_rank
        of_a = ops.pad(of_a, ((0, 0), (0, missing)))
        of_b = ops.pad(of_b, ((0, missing), (0, 0)))
    elif way == "zeroed":
        kept = ops.arange(rank) < update_rank
        of_a = ops.where(kept, of_a, 0.0)
        of_b = ops.where(kept[:, None], of_b, 0.0)
    return y, of_x, of_a, of_b


def step(way, tensors, update_rank):
    import keras

    if keras.config.backend() == "jax":
        import jax

        function = jax.jit(
            lambda x, g, *rest: gradients(way, x, g, *rest, update_rank)
        )
        return lambda x, g: function(x, g, *tensors)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(
            lambda x, g: gradients(way, x, g, *tensors, update_rank)
        )

    import torch

    def function(x, g):
        with torch.no_grad():
            return gradients(way, x, g, *tensors, update_rank)

    return function


def shortest(functions, x, g, repeats):
    times = {way: [] for way in functions}
    for repeat in range(repeats + 2):
        for way, function in functions.items():
            start = time.process_time()
            randlora.wait(function(x, g))
            # The first two repetitions compile and fill caches.
            if repeat >= 2:
                times[way].append(1e3 * (time.process_time() - start))
    return {way: min(found) for way, found in times.items()}


def rows(arguments):
    import keras
    import numpy as np

    d, tokens = arguments.dim, arguments.tokens
    rng = np.random.default_rng(1)
    x, g = (
        keras.ops.convert_to_tensor(
            rng.standard_normal((tokens, d), dtype="float32")
        )
        for _ in range(2)
    )
    for rank in arguments.ranks:
        tensors = weights(d, rank)
        ways = ("all", "zeroed", "skipped", "none")
        functions = {way: step(way, tensors, rank // 2) for way in ways}
        t = shortest(functions, x, g, arguments.repeats)
        yield (
            rank,
            *(t[way] for way in ways),
            1 - t["skipped"] / t["zeroed"],
            saved_share(tokens, d, rank, rank // 2),
            1 - t["none"] / t["zeroed"],
        )


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        repeats=dict(type=int, default=40),
        tokens=dict(type=int, default=1024),
        dim=dict(type=int, default=768),
        ranks=dict(type=int, nargs="+", default=[8, 64]),
    )
