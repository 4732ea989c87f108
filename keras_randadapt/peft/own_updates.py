"""The updates of methods that have the same form here and in PEFT.

Each function reads the tensors of one module for a `methods.Reader`.
"""

import numpy as np

from keras_randadapt.peft.update import Update


def _miss(reader, module, roles, n_in, n_out, weight_shape):
    del weight_shape
    rank, block = reader.options["r"], roles["block"]
    if reader.options["init_weights"] == "mini":
        repeated = reader.options["mini_r"]
        reader.check(module, "miss_block", block, (rank, repeated))
        if n_out % repeated:
            raise ValueError(
                f"'{reader.path}' has mini_r = {repeated}, which does not "
                f"divide the {n_out} outputs of the module '{module}'."
            )
        whole = np.tile(block, n_out // repeated)
    else:
        reader.check(module, "miss_block", block, (rank, n_out))
        whole = block
    if rank > n_in:
        raise ValueError(
            f"'{reader.path}' has r = {rank}, above the {n_in} inputs of the "
            f"module '{module}'."
        )
    a = np.eye(rank)[:, np.arange(n_in) % rank]
    return Update(a=a, b=whole.T)


def _shira(reader, module, roles, n_in, n_out, weight_shape):
    del weight_shape
    values, places = roles["values"], roles["places"]
    count = reader.options["r"] * (n_in + n_out)
    reader.check(module, "shira_weight", values, (count,))
    reader.check(module, "shira_indices", places, (2, count))
    sizes = np.array([[n_out], [n_in]])
    if np.any(places != np.round(places)) or np.any(
        (places < 0) | (places >= sizes)
    ):
        raise ValueError(
            f"'{reader.path}' holds places (shira_indices) that are outside "
            f"of the weight {(n_out, n_in)} of the module '{module}'."
        )
    delta = np.zeros((n_out, n_in))
    # PEFT adds up values of one place.
    np.add.at(delta, tuple(places.astype(int)), values)
    if n_in <= n_out:
        return Update(a=np.eye(n_in), b=delta, own={"delta": delta})
    return Update(a=delta, b=np.eye(n_out), own={"delta": delta})


def _hira(reader, module, roles, n_in, n_out, weight_shape):
    dims = n_in, n_out
    rank = reader.rank(module)
    if roles["a"].shape[:1] == (reader.options["r"],):
        # PEFT 0.21 makes new layers without looking at the pattern.
        rank = reader.options["r"]
    a, b = reader.pair(module, roles, rank, dims, weight_shape, "hira")
    return Update(a=a, b=b)


READERS = {"MISS": _miss, "SHIRA": _shira, "HIRA": _hira}
