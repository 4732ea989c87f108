"""The updates that the tensors of a PEFT directory describe.

Each function reads one method and gives an `Update` for each module. Formulas
are PEFT's, since its files mean what its code computes.
"""

import functools
import math

from keras_randadapt.peft import canonical
from keras_randadapt.peft import options as options_lib
from keras_randadapt.peft import own_updates
from keras_randadapt.peft.update import Update

#: The endings of the tensors of each method: those of one module, and those
#: that all modules share.
_ENDINGS = {
    "LORA": (
        (".lora_A.weight", "a"),
        (".lora_B.weight", "b"),
        (".lora_embedding_A", "a"),
        (".lora_embedding_B", "b"),
        (".lora_magnitude_vector", "magnitude"),
    ),
    "ADALORA": ((".lora_A", "a"), (".lora_B", "b"), (".lora_E", "e")),
    # PEFT writes the frozen matrices of RandLoRA once more for each module.
    "VERA": (
        (".vera_lambda_b", "b"),
        (".vera_lambda_d", "d"),
        (".vera_A", "frozen_a"),
        (".vera_B", "frozen_b"),
    ),
    "RANDLORA": (
        (".randlora_lambda", "lambda"),
        (".randlora_gamma", "gamma"),
        (".randlora_A", "frozen_a"),
        (".randlora_B", "frozen_b"),
    ),
    "IA3": ((".ia3_l", "l"),),
    "MISS": ((".miss_block", "block"),),
    "SHIRA": ((".shira_weight", "values"), (".shira_indices", "places")),
    "HIRA": (
        (".hira_A", "a"),
        (".hira_B", "b"),
        (".hira_embedding_A", "a"),
        (".hira_embedding_B", "b"),
    ),
    "LOHA": (
        (".hada_w1_a", "b1"),
        (".hada_w1_b", "a1"),
        (".hada_w2_a", "b2"),
        (".hada_w2_b", "a2"),
    ),
    "LOKR": tuple((f".{name}", name) for name in own_updates.LOKR),
    "OFT": ((".oft_R.weight", "q"),),
}
_SHARED = {
    "VERA": ("base_model.vera_A", "base_model.vera_B"),
    "RANDLORA": ("base_model.randlora_A", "base_model.randlora_B"),
}
_REQUIRED = {
    "LORA": ("a", "b"),
    "ADALORA": ("a", "b", "e"),
    "VERA": ("b", "d"),
    "RANDLORA": ("lambda", "gamma"),
    "IA3": ("l",),
    "MISS": ("block",),
    "SHIRA": ("values", "places"),
    "HIRA": ("a", "b"),
    "LOHA": ("a1", "b1", "a2", "b2"),
    "LOKR": (),
    "OFT": ("q",),
}

#: Methods whose update is no matrix that is added to the kernel.
NOT_ADDITIVE = ("HIRA", "IA3", "OFT")

_NAMES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "VERA": "VeRA",
    "RANDLORA": "RandLoRA",
    "IA3": "IA3",
    "MISS": "MiSS",
    "SHIRA": "SHiRA",
    "HIRA": "HiRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
}


def label(method, config):
    """The name of a method as its paper has it.

    Args:
        method: The type of an adapter in PEFT, which may be an unknown one.
        config: The adapter's config.
    """
    found = _NAMES.get(str(method), str(method))
    if found == "LoRA":
        found = "rsLoRA" if config.get("use_rslora") is True else found
        found = "DoRA" if config.get("use_dora") is True else found
    return found


def grouped(path, method, tensors):
    """Sorts the tensors of a directory by module.

    Args:
        path: The directory, for errors.
        method: A key of `options.READ`.
        tensors: dict from key to array.

    Returns:
        `(modules, shared, others)`: a dict from module to a dict from role to
        array, a list of the arrays that all modules share (`None` where each
        module has its own), and a dict of what is left, from the key without
        its start to the array.

    Raises:
        ValueError: If a tensor is missing, or its name is no module's.
    """
    modules, others, found = {}, {}, {}
    shared_keys = _SHARED.get(method, ())
    for key, array in tensors.items():
        if key in shared_keys:
            found[key] = array
            continue
        if not key.startswith(canonical.START):
            raise ValueError(
                f"'{path}' holds the tensor {key!r}, and those of PEFT start "
                f"with '{canonical.START}'."
            )
        name = key.removeprefix(canonical.START)
        for ending, role in _ENDINGS[method]:
            if name.endswith(ending):
                module = name.removesuffix(ending)
                if role in modules.setdefault(module, {}):
                    raise ValueError(
                        f"'{path}' holds two tensors of one role for the "
                        f"module '{module}'."
                    )
                modules[module][role] = array
                break
        else:
            others[name] = array
    lost = [
        key
        for key, role in zip(shared_keys, ("frozen_a", "frozen_b"))
        if key not in found
        and not all(role in roles for roles in modules.values())
    ]
    if lost:
        raise ValueError(
            f"'{path}' lacks {lost}, the frozen matrices of {method}, which "
            "PEFT can draw again and other programs can't. Save it with "
            "`save_projection=True`."
        )
    for module, roles in modules.items():
        lacking = [r for r in _REQUIRED[method] if r not in roles]
        if lacking:
            endings = [e for e, r in _ENDINGS[method] if r in lacking]
            raise ValueError(
                f"'{path}' has tensors of the module '{module}', and lacks "
                f"{[canonical.START + module + e for e in endings]}: it is "
                "incomplete."
            )
    return modules, [found.get(key) for key in shared_keys], others


class Reader:
    """Makes the updates of one directory.

    Args:
        path: The directory, for errors.
        method: A key of `options.READ`.
        options: What `options.checked` gave.
        shared: The arrays that all modules share.
    """

    def __init__(self, path, method, options, shared):
        self.path, self.options = path, options
        self.shared = [
            None if one is None else one.astype("float64") for one in shared
        ]
        self._read = {
            "LORA": self._lora,
            "ADALORA": self._adalora,
            "VERA": self._vera,
            "RANDLORA": self._randlora,
            "IA3": self._ia3,
        }.get(method)
        if self._read is None:
            self._read = functools.partial(own_updates.READERS[method], self)

    def update(self, module, roles, dims, weight_shape):
        """The update of one module.

        Args:
            module: Its name, as the directory has it.
            roles: dict from role to array.
            dims: The module's numbers of inputs and of outputs.
            weight_shape: The shape of its weight.

        Returns:
            An `Update`.
        """
        roles = {role: one.astype("float64") for role, one in roles.items()}
        return self._read(module, roles, *dims, weight_shape)

    def shape_of_experts(self, module, roles):
        """`(experts, outputs, inputs)`, as the tensors of a parameter have it.

        Args:
            module: The parameter's name.
            roles: dict from role to array.
        """
        rank, _ = self._rank_and_scaling(module)
        a, b = roles["a"], roles["b"]
        if a.ndim != 2 or b.ndim != 2 or len(a) % rank:
            raise ValueError(
                f"'{self.path}' holds factors of the shapes {a.shape} and "
                f"{b.shape} for the experts of '{module}', and their rank is "
                f"{rank} by its config."
            )
        return len(a) // rank, len(b), a.shape[1]

    def update_of_experts(self, module, roles, weight_shape):
        """The update of a parameter that holds experts.

        Args:
            module: The parameter's name.
            roles: dict from role to array.
            weight_shape: `(experts, outputs, inputs)`.

        Returns:
            An `Update`, whose arrays have an axis of experts in front.
        """
        if self.options["use_dora"] or "magnitude" in roles:
            raise ValueError(
                f"'{self.path}' holds a DoRA of the experts of '{module}', "
                "which PEFT itself refuses."
            )
        stack, n_out, n_in = weight_shape
        rank, scaling = self._rank_and_scaling(module)
        a, b = roles["a"].astype("float64"), roles["b"].astype("float64")
        self.check(module, "lora_A", a, (stack * rank, n_in))
        self.check(module, "lora_B", b, (n_out, rank * stack))
        # Experts come first in the ranks of A, and last in those of B.
        return Update(
            a=a.reshape(stack, rank, n_in),
            b=b.reshape(n_out, rank, stack).transpose(2, 0, 1),
            scaling=scaling,
        )

    def check(self, module, role, array, *shapes):
        """Raises `ValueError` if an array has none of some shapes."""
        if array.shape not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(
                f"'{self.path}' holds a tensor ({role}) of shape {array.shape} "
                f"for the module '{module}', and in this model it must be "
                f"{wanted}. The adapter is of another model, or its config is "
                "of another adapter."
            )

    def rank(self, module):
        """The rank of a module, which may have one of its own."""
        rank = options_lib.by_pattern(
            self.path,
            "rank_pattern",
            self.options["rank_pattern"],
            module,
            self.options["r"],
        )
        if rank < 1:
            raise ValueError(
                f"'{self.path}' has the rank {rank} for the module '{module}', "
                "which must be at least 1."
            )
        return rank

    def alpha(self, module, key):
        """The alpha of a module, which may have one of its own."""
        return options_lib.by_pattern(
            self.path,
            "alpha_pattern",
            self.options["alpha_pattern"],
            module,
            self.options[key],
        )

    def _rank_and_scaling(self, module):
        options, rank = self.options, self.rank(module)
        root = math.sqrt(rank) if options["use_rslora"] else rank
        return rank, self.alpha(module, "lora_alpha") / root

    def _lora(self, module, roles, n_in, n_out, weight_shape):
        options = self.options
        rank, scaling = self._rank_and_scaling(module)
        ones = tuple(1 for _ in weight_shape[2:])
        a, b = self.pair(module, roles, rank, (n_in, n_out), weight_shape)
        if options["use_dora"] != ("magnitude" in roles):
            raise ValueError(
                f"'{self.path}' has use_dora = {options['use_dora']}, and "
                f"{'no' if options['use_dora'] else 'a'} magnitude of the "
                f"module '{module}'."
            )
        magnitude = roles.get("magnitude")
        if magnitude is not None:
            self.check(
                module,
                "lora_magnitude_vector",
                magnitude,
                (n_out,),
                (1, n_out, *ones),
            )
            magnitude = magnitude.reshape(n_out)
        return Update(a=a, b=b, scaling=scaling, magnitude=magnitude)

    def pair(self, module, roles, rank, dims, weight_shape, start="lora"):
        """The factors of a module, `(rank, inputs)` and `(outputs, rank)`."""
        a, b = roles["a"], roles["b"]
        n_in, n_out = dims
        window = weight_shape[2:]
        ones = tuple(1 for _ in window)
        of_window = (rank, weight_shape[1], *window)
        self.check(module, f"{start}_A", a, of_window, (rank, n_in))
        self.check(module, f"{start}_B", b, (n_out, rank, *ones), (n_out, rank))
        return a.reshape(rank, n_in), b.reshape(n_out, rank)

    def _adalora(self, module, roles, n_in, n_out, weight_shape):
        a, b, e = roles["a"], roles["b"], roles["e"]
        rank = self.options["init_r"]
        masks = {
            # PEFT's keys end in the name of a tensor.
            key.rpartition(".lora_")[0]: mask
            for key, mask in (self.options["rank_pattern"] or {}).items()
        }
        kept = rank
        if module in masks:
            mask = masks[module]
            if not isinstance(mask, list):
                raise ValueError(
                    f"'{self.path}' has a rank_pattern for '{module}' that is "
                    "no list."
                )
            kept = sum(one is True for one in mask)
        self.check(module, "lora_A", a, (kept, n_in))
        self.check(module, "lora_B", b, (n_out, kept))
        self.check(module, "lora_E", e, (kept, 1))
        alpha = self.options["lora_alpha"]
        # PEFT adds the small number to every division.
        scaling = (alpha if alpha > 0 else float(kept)) / (rank + 1e-5)
        return Update(a=a * e, b=b, scaling=scaling)

    def _vera(self, module, roles, n_in, n_out, weight_shape):
        rank = self.options["r"]
        a, b = self._frozen(module, roles, (rank, n_in), (n_out, rank))
        self.check(module, "vera_lambda_d", roles["d"], (rank,))
        self.check(module, "vera_lambda_b", roles["b"], (n_out,))
        return Update(
            a=roles["d"][:, None] * a[:, :n_in],
            b=roles["b"][:, None] * b[:n_out],
        )

    def _randlora(self, module, roles, n_in, n_out, weight_shape):
        rank = self.options["r"]
        small, large = sorted((n_in, n_out))
        terms = -(-small // rank)
        a, b = self._frozen(
            module, roles, (rank, 1, small), (large, terms, rank)
        )
        self.check(module, "randlora_lambda", roles["lambda"], (rank, terms))
        self.check(module, "randlora_gamma", roles["gamma"], (terms, small))
        a = roles["lambda"][:, :, None] * a[:, :, :small] * roles["gamma"]
        # PEFT flattens one by (rank, term) and the other by (term, rank), so
        # it pairs other columns than the paper. Its files mean that.
        thin = a.reshape(-1, small)
        wide = b[:large, :terms].reshape(large, -1)
        scaling = self.options["randlora_alpha"] / rank
        if n_in == small:
            return Update(a=thin, b=wide, scaling=scaling)
        return Update(a=wide.T, b=thin.T, scaling=scaling)

    def _frozen(self, module, roles, *least):
        """The frozen matrices, which are at least as large as a module's."""
        arrays = [
            roles.get(role, shared)
            for role, shared in zip(("frozen_a", "frozen_b"), self.shared)
        ]
        for array, shape in zip(arrays, least):
            fits = array.ndim == len(shape) and all(
                have >= need for have, need in zip(array.shape, shape)
            )
            if not fits or self.options["r"] not in array.shape:
                raise ValueError(
                    f"'{self.path}' holds a frozen matrix of shape "
                    f"{array.shape}, and the module '{module}' needs one of "
                    f"at least {shape} with the rank {self.options['r']}."
                )
        return arrays

    def _ia3(self, module, roles, n_in, n_out, weight_shape):
        scale = roles["l"]
        self.check(module, "ia3_l", scale, (n_out, 1), (1, n_in))
        # With one output, PEFT's form of the outputs comes first.
        if scale.shape == (n_out, 1):
            return Update(scale_outputs=scale.reshape(-1))
        return Update(scale_inputs=scale.reshape(-1))
