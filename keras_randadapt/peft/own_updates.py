"""The updates of methods that have the same form here and in PEFT.

Each function reads the tensors of one module for a `methods.Reader`.
"""

import numpy as np

from keras_randadapt.adapters import lokr
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


def _loha(reader, module, roles, n_in, n_out, weight_shape):
    del weight_shape
    rank = reader.rank(module)
    for number in "12":
        a, b = roles[f"a{number}"], roles[f"b{number}"]
        reader.check(module, f"hada_w{number}_b", a, (rank, n_in))
        reader.check(module, f"hada_w{number}_a", b, (n_out, rank))
    scaling = reader.alpha(module, "alpha") / rank
    a = roles["a1"][:, None] * roles["a2"][None, :]
    b = roles["b1"][:, :, None] * roles["b2"][:, None, :]
    return Update(
        a=a.reshape(rank**2, n_in),
        b=b.reshape(n_out, rank**2),
        scaling=scaling,
        own=roles,
    )


def _lokr(reader, module, roles, n_in, n_out, weight_shape):
    if len(weight_shape) > 2:
        raise ValueError(
            f"'{reader.path}' adapts the convolution '{module}', and "
            "`kra.peft.load` reads LOKR for linear layers. Merge it with PEFT "
            "(`merge_and_unload`) instead."
        )
    rank, factor = reader.rank(module), reader.options["decompose_factor"]
    factor = None if factor == -1 else factor
    (m, n), (k, columns) = (lokr.parts(d, factor) for d in (n_in, n_out))
    whole = {}
    for name, rows, width in (("lokr_w1", k, m), ("lokr_w2", columns, n)):
        if name in roles:
            reader.check(module, name, roles[name], (rows, width))
            whole[name] = roles[name]
            continue
        found = [roles.get(f"{name}_{part}") for part in "ab"]
        if any(one is None for one in found):
            raise ValueError(
                f"'{reader.path}' lacks {name} of the module '{module}': it is "
                "incomplete."
            )
        reader.check(module, f"{name}_a", found[0], (rows, rank))
        reader.check(module, f"{name}_b", found[1], (rank, width))
        whole[name] = found[0] @ found[1]
    delta = np.kron(whole["lokr_w1"], whole["lokr_w2"])
    scaling = reader.alpha(module, "alpha") / rank
    own = {**roles, "delta": delta}
    if n_in <= n_out:
        return Update(a=np.eye(n_in), b=delta, scaling=scaling, own=own)
    return Update(a=delta, b=np.eye(n_out), scaling=scaling, own=own)


def _oft(reader, module, roles, n_in, n_out, weight_shape):
    del n_out, weight_shape
    q, size = roles["q"], reader.options["oft_block_size"]
    number = 1 if reader.options["block_share"] else None
    if size == 0 and reader.options["r"] > 0:
        size = n_in // reader.options["r"]
    if size < 2 or n_in % size:
        raise ValueError(
            f"'{reader.path}' has blocks of {size} rows, which do not make up "
            f"the {n_in} inputs of the module '{module}'. Merge it with PEFT "
            "(`merge_and_unload`) instead."
        )
    shape = (number or n_in // size, size * (size - 1) // 2)
    reader.check(module, "oft_R", q, shape)
    return Update(own={"q": q, "size": size})


#: The names of the tensors of LoKr.
LOKR = (
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
)

READERS = {
    "MISS": _miss,
    "SHIRA": _shira,
    "HIRA": _hira,
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
}
