"""The options that a config of PEFT may have, and those that are refused."""

import re
import reprlib

#: Options that change nothing of what the adapter computes, or that are read
#: elsewhere. An option that is neither here nor in the other tables must be
#: off: false, empty or null.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "beta1",
    "beta2",
    "corda_config",
    "d_initial",
    "deltaT",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_r",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "modules_to_save",
    "orth_reg_weight",
    "peft_type",
    "peft_version",
    "projection_prng_key",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "save_projection",
    "sparse",
    "target_modules",
    "target_r",
    "task_type",
    "tfinal",
    "tinit",
    "total_step",
    "very_sparse",
}

#: Those of LoHa and LoKr.
_LYCORIS = {
    "alpha_pattern": dict,
    "r": int,
    "rank_pattern": dict,
}

#: The options of each method that are read, with their types.
READ = {
    "LORA": {
        "alpha_pattern": dict,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "r": int,
        "rank_pattern": dict,
        "target_parameters": (list, type(None)),
        "use_dora": bool,
        "use_rslora": bool,
    },
    "ADALORA": {
        "init_r": int,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "rank_pattern": (dict, type(None)),
    },
    "VERA": {"r": int, "vera_dropout": (int, float)},
    "RANDLORA": {
        "r": int,
        "randlora_alpha": (int, float),
        "randlora_dropout": (int, float),
    },
    "IA3": {},
    "MISS": {
        "init_weights": (bool, str, type(None)),
        "mini_r": int,
        "miss_dropout": (int, float),
        "r": int,
    },
    "SHIRA": {"r": int, "random_seed": (int, type(None))},
    "HIRA": {
        "hira_dropout": (int, float),
        "r": int,
        "rank_pattern": dict,
    },
    "LOHA": {"alpha": (int, float), **_LYCORIS},
    "LOKR": {
        "alpha": (int, float),
        "decompose_both": bool,
        "decompose_factor": int,
        **_LYCORIS,
    },
    "OFT": {
        "block_share": bool,
        "oft_block_size": int,
        "r": int,
        "use_cayley_neumann": bool,
    },
}

#: Options that a method has and that change nothing of what its file means.
_UNUSED = {
    "ADALORA": {"r", "alpha_pattern", "use_rslora"},
    # The file has the places.
    "SHIRA": {"mask_type"},
    # These act in training alone, or only in another form.
    "LOHA": {"rank_dropout", "module_dropout"},
    "LOKR": {"rank_dropout", "module_dropout", "rank_dropout_scale"},
    "OFT": {"module_dropout", "eps", "num_cayley_neumann_terms"},
}

_DEFAULTS = {
    "alpha": 8,
    "alpha_pattern": {},
    "block_share": False,
    "decompose_both": False,
    "decompose_factor": -1,
    "hira_dropout": 0.0,
    "init_r": 12,
    "init_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "mini_r": 1,
    "miss_dropout": 0.0,
    "oft_block_size": 32,
    "r": 8,
    "randlora_alpha": 640,
    "randlora_dropout": 0.0,
    "random_seed": None,
    "rank_pattern": {},
    "target_parameters": None,
    "use_cayley_neumann": True,
    "use_dora": False,
    "use_rslora": False,
    "vera_dropout": 0.0,
}

#: First values that leave the base weights as they are.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

#: How many characters and unbounded repetitions a pattern may have.
_LONGEST_PATTERN = 300
_MOST_REPETITIONS = 3


def checked(path, config):
    """Validates a config.

    Args:
        path: The directory, for errors.
        config: A dict that was read from JSON.

    Returns:
        `(method, options)`: the type of the adapter, a key of `READ`, and a
        dict of the options that are read.

    Raises:
        ValueError: If the method or an option is not known, or if an option
            has a value whose effect can't be held.
    """
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in READ:
        raise ValueError(
            f"'{path}' holds an adapter of the type {reprlib.repr(method)}. "
            f"`kra.peft.load` reads {sorted(READ)}. Merge it with PEFT "
            "(`merge_and_unload`) and load the merged model instead."
        )
    known = {*READ[method], *_HARMLESS, *_UNUSED.get(method, ())}
    _check_bias(path, config)
    _check_initialization(path, config)
    wrong = sorted(
        key
        for key, value in config.items()
        if key not in known
        and key not in ("bias", "init_lora_weights")
        and not _is_off(value)
    )
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"'{path}' has the option {reprlib.repr(key)} = "
            f"{reprlib.repr(config[key])}, which `kra.peft.load` does not know "
            f"for {method}, so the adapter would compute something else here."
            + (f" The same goes for {wrong[1:5]}." if wrong[1:] else "")
            + " Merge it with PEFT (`merge_and_unload`) instead."
        )
    options = {}
    for key, kind in READ[method].items():
        value = config.get(key, _DEFAULTS[key])
        is_number = kind in (int, (int, float))
        if not isinstance(value, kind) or (
            is_number and isinstance(value, bool)
        ):
            raise ValueError(
                f"'{path}' has {key} = {reprlib.repr(value)}, which must be of "
                f"the type {_type_names(kind)}."
            )
        options[key] = value
    _check_numbers(path, options)
    targets = options.get("target_parameters") or []
    if not all(isinstance(one, str) and one for one in targets):
        raise ValueError(
            f"'{path}' has target_parameters = {reprlib.repr(targets)}, which "
            "must be a list of the names of parameters."
        )
    return method, options


def _type_names(kind):
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds)


def _is_off(value):
    return value is None or value is False or value in (0, "", [], {})


def _check_bias(path, config):
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"'{path}' has bias = {reprlib.repr(config['bias'])}: biases of "
            "the base model were trained along with the adapter. "
            "`kra.peft.load` takes adapters that change no bias "
            '(bias = "none"). Merge it with PEFT (`merge_and_unload`) instead.'
        )


def _check_initialization(path, config):
    value = config.get("init_lora_weights", True)
    if not any(value is one or value == one for one in _INITIALIZATIONS):
        raise ValueError(
            f"'{path}' has init_lora_weights = {reprlib.repr(value)}, which "
            "changes the base weights when the adapter is made, so its update "
            "is not one of the original weights. Save it with PEFT's "
            "`path_initial_model_for_weight_conversion`. Known are "
            f"{[one for one in _INITIALIZATIONS if one is not None]}."
        )


def _check_numbers(path, options):
    _check_form_of_miss(path, options)
    if options.get("use_cayley_neumann"):
        raise ValueError(
            f"'{path}' has use_cayley_neumann = True: its rotations are a "
            "series that is cut off, and no `OFT` computes the same. Merge it "
            "with PEFT (`merge_and_unload`) instead."
        )
    for key, value in options.items():
        if key == "r" and "oft_block_size" in options:
            # One of the two is 0, and it follows from the other.
            continue
        if key in ("r", "init_r", "mini_r") and value < 1:
            raise ValueError(f"'{path}' has {key} = {value}, below 1.")
        if key.endswith("dropout") and not 0 <= value < 1:
            raise ValueError(
                f"'{path}' has {key} = {value}; it must be at least 0 and "
                "below 1."
            )
        # NaN is not equal to itself.
        if key.endswith("alpha") and not abs(value) < float("inf"):
            raise ValueError(f"'{path}' has {key} = {value}, no finite number.")
    if options.get("decompose_factor", 1) < 1 != -options["decompose_factor"]:
        raise ValueError(
            f"'{path}' has decompose_factor = {options['decompose_factor']}, "
            "which must be -1 or at least 1."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (options.get(key) or {}).items():
            if isinstance(value, list):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"'{path}' has {key}[{reprlib.repr(pattern)}] = "
                    f"{reprlib.repr(value)}, which must be a number."
                )
            compiled(path, key, pattern)


def _check_form_of_miss(path, options):
    form = options.get("init_weights")
    if isinstance(form, str) and form != "mini":
        raise ValueError(
            f"'{path}' has init_weights = {reprlib.repr(form)}. Known are true "
            'and "mini"; the update of "bat" depends on the base kernel in '
            "another way. Merge it with PEFT (`merge_and_unload`) instead."
        )


def compiled(path, key, pattern):
    """The regular expression of a pattern, which must not take forever.

    Args:
        path: The directory, for errors.
        key: The option that the pattern is in.
        pattern: string, as PEFT has it: a name, the end of one or a regular
            expression of that.

    Raises:
        ValueError: If the pattern is none, or one that may run away.
    """
    repetitions = len(re.findall(r"(?<!\\)[*+{]", pattern))
    nested = re.search(r"(?<!\\)\)[*+{?]", pattern)
    if len(pattern) > _LONGEST_PATTERN or (
        nested or repetitions > _MOST_REPETITIONS
    ):
        raise ValueError(
            f"'{path}' has in {key} the pattern {reprlib.repr(pattern)}, which "
            f"is longer than {_LONGEST_PATTERN} characters, repeats a group or "
            f"has more than {_MOST_REPETITIONS} repetitions, so matching it "
            "might take forever. Write the names of the modules."
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(
            f"'{path}' has in {key} the pattern {reprlib.repr(pattern)}, which "
            f"is no regular expression: {error}"
        ) from error


def by_pattern(path, key, patterns, module, default):
    """The value that PEFT's patterns give a module.

    Args:
        path: The directory, for errors.
        key: The option's name.
        patterns: dict from pattern to value. The first that matches counts.
        module: The module's name, as the directory has it.
        default: The value where none matches.
    """
    for pattern, value in (patterns or {}).items():
        if compiled(path, key, pattern).match(module):
            return value
    return default


def missing_targets(config, held, names):
    """Modules that the config targets, and that the tensors do not have.

    Args:
        config: The config.
        held: The modules that have tensors.
        names: A `NameMap`.

    Returns:
        list of names.
    """
    if config.get("layers_to_transform") is not None or config.get(
        "exclude_modules"
    ):
        return []
    lacking = []
    for key, is_parameter in (
        ("target_modules", False),
        ("target_parameters", True),
    ):
        targets = config.get(key)
        if not isinstance(targets, list):
            continue
        targets = [one for one in targets if isinstance(one, str)]
        whole = {names.find(target) for target in targets}
        lacking += [
            module
            for module, places in names.by_module().items()
            if module not in held
            and (places[0][1].kind == "experts") == is_parameter
            and (
                module in whole
                or any(module.endswith(f".{target}") for target in targets)
            )
        ]
    return lacking
