"""`save`: writes an adapter as a directory of PEFT."""

import functools
import os
import warnings

import keras
import numpy as np

from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters import DoRA
from keras_randadapt.adapters import LoRA
from keras_randadapt.model import checks
from keras_randadapt.model import convert
from keras_randadapt.model import file_format
from keras_randadapt.model import low_rank
from keras_randadapt.model import moving_state
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import tensor_data
from keras_randadapt.model import updates
from keras_randadapt.peft import canonical
from keras_randadapt.peft import card
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import names as names_lib
from keras_randadapt.peft import own_forms
from keras_randadapt.sites import lanes
from keras_randadapt.sites import quantized
from keras_randadapt.sites import supported

#: The option with the parameters of experts.
_PARAMETERS = "target_parameters"


def save(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str | None = None,
    base: bool = False,
    rank: int | None = None,
    energy: float | None = None,
) -> None:
    """Writes an adapter as a directory that PEFT, vLLM and llama.cpp read.

    The directory gets `adapter_config.json`, `adapter_model.safetensors` and
    `README.md`, a model card. Layers that the adapter keeps trainable go to
    `heads.safetensors`, which other programs do not read. `LoRA`, `DoRA`,
    `HiRA`, `LoHa`, `LoKr`, `MiSS`, `OFT` and `SHiRA` go out as they are, and
    every other method that adds an update of its own as the `LoRA` that
    computes the same; see `to_lora`. So do `LoHa`, `LoKr`, `MiSS` and `SHiRA`
    with `rank` or `energy`, and where PEFT's form can't have them; the model
    card then tells why.

    All readers scale a LoRA alike: there is one rank for all modules,
    `lora_alpha` is equal to it, and the scaling is folded into B. Sites with a
    lower rank are padded with zeros. Where a module holds several sites, as in
    GPT-2, their ranks add up. Adapters of experts are those of two parameters
    of transformers 5, which PEFT takes as `target_parameters`.

    Files are written one after the other, and each is complete or as before.
    The adapter's weight in the model is not written; see `set_active`.

    Args:
        model: An adapted backbone or task of KerasHub.
        directory: Path of the directory. It is made if it is not there. Files
            of these names are replaced or, without heads, removed. Other files
            stay.
        name: Optional string. The adapter's name; by default the only one.
        base_model: Optional string. Where readers find the base model: a name
            at Hugging Face, or a path. llama.cpp needs it or its `--base`.
        base: Whether the adapter is for transformers' base class, such as
            `LlamaModel`. By default it is for its task classes, whose modules
            have a prefix such as `model.`.
        rank: Optional int, the rank at each site; see `to_lora`.
        energy: Optional float, the share of each update's energy that is kept,
            instead of `rank`; see `to_lora`.

    Raises:
        TypeError: If `directory` is no path or `base_model` no string.
        ValueError: If the model has no adapter, or several and no `name`; if
            KerasHub has no converter for the model; if a site is in no module
            of transformers; if the method does more than adding an update, as
            `IA3` does, or is a `DoRA` of experts; if a number is not finite;
            or if `directory` is a file. Nothing is written then.

    Example:

    ```python
    kra.peft.save(classifier, "sentiment-peft", base_model="roberta-base")
    ```
    """
    state_lib.check_is_model(model)
    if not state_lib.is_adapted(model):
        # It raises the error for models without adapters.
        state_lib.state_of(model)
    target = directory_lib.check_writable(directory)
    _check_arguments(base_model, base)
    files = model._randadapt.between_steps.run(
        functools.partial(
            _files_of, model, name, base_model, base, rank, energy
        )
    )
    directory_lib.write(target, files)


def _check_arguments(base_model, base):
    if not isinstance(base_model, (str, type(None))):
        raise TypeError(
            "`base_model` must be a string, the name or path of the base "
            f"model, or `None`. Received: base_model={base_model!r}"
        )
    if not isinstance(base, bool):
        raise TypeError(
            "`base` must be a bool: whether the adapter is for transformers' "
            f"base class. Received: base={base!r}"
        )


def _files_of(model, name, base_model, base, rank, energy):
    """dict from the names of the directory's files to their bytes."""
    state = state_lib.state_of(model)
    if state.block == "merged":
        # The kernels hold the deltas, and magnitudes are compared with them.
        state_lib.check_no_block(model)
    name = checks.one_name(state, name)
    record = state.records[name]
    rank, energy = convert.check_size(rank, energy)
    has_size = rank is not None or energy is not None
    if has_size or not own_forms.has(record.template):
        _check_is_delta(name, record.template)
    if rank is not None:
        views = low_rank.views_of(state.layers, record.addresses)
        low_rank.check_rank(rank, views)
    _check_moved(state, name)
    if isinstance(record.template, DoRA):
        _check_no_experts(state, name)
    names = names_lib.name_map(model)
    check_expressible(names, record.addresses, name)
    common = {
        "base_model_name_or_path": base_model,
        "task_type": _task_type(model),
    }
    own = None if has_size else _own_form(names, state, name, base)
    if own is None or isinstance(own, str):
        _check_is_delta(name, record.template, own)
        config, tensors, lost = _lora_form(
            names, state, name, base, rank, energy, common
        )
        form = f"LoRA, since {own}" if own else "LoRA"
    else:
        lost = 0.0
        config, tensors = own
        config = canonical.common_config(**{**config, **common})
        form = config["peft_type"]
    _check_finite(tensors, name)
    heads = file_format.kept_tensors(state, name)
    about = card.About(
        name=name,
        template=record.template,
        base_model=base_model,
        model_type=names.model_type,
        modules=[*config["target_modules"], *config.get(_PARAMETERS, ())],
        sites=len(record.addresses),
        form=form,
        rank=config.get("r"),
        bytes=sum(one.nbytes for one in tensors.values()),
        lost=lost,
        heads=[(a, _path(state, a)) for a in record.kept],
    )
    files = {
        **canonical.files_of(config, tensors),
        directory_lib.CARD: card.text(about).encode(),
    }
    if heads:
        files[directory_lib.HEADS] = tensor_data.data_of(
            heads, {"format": "keras_randadapt_heads"}
        )
    return files


def _check_is_delta(name, template, reason=None):
    is_dora = isinstance(template, DoRA)
    way = None
    if reason is None and own_forms.has(template):
        way = (
            "PEFT has a form of its own for it, which has no other size: "
            "leave out `rank` and `energy`."
        )
    if reason is not None:
        way = (
            f"A form of its own is not possible either: {reason}. Save it "
            "with `save_adapter`, or merge it and use `save_merged`."
        )
    updates.check_is_delta(name, template.inner if is_dora else template, way)


def _own_form(names, state, name, base):
    """What `own_forms.write` gives for the adapter, with `modules` besides."""
    adapters = state.adapters(name)
    template = state.records[name].template
    if not own_forms.has(template):
        return None
    modules = [
        own_forms.Module(
            name=_named(module, names, base),
            sites=[(adapters[a], part) for a, part in here if a in adapters],
            places=len(here),
        )
        for module, here in names.by_module().items()
        if any(a in adapters for a, _ in here)
    ]
    found = own_forms.write(template, modules)
    if isinstance(found, str):
        return found
    config, tensors = found
    config["modules"] = [module.name for module in modules]
    return config, {key: _float32(one) for key, one in tensors.items()}


def _float32(array):
    if array.dtype.kind != "f":
        return array
    # Numbers that are too large become infinite; the caller tells the user.
    with np.errstate(over="ignore"):
        return array.astype("float32")


def _lora_form(names, state, name, base, rank, energy, common):
    """`(config, tensors, lost)` of the LoRA that computes the same."""
    adapters = state.adapters(name)
    is_dora = isinstance(state.records[name].template, DoRA)
    found, lost = {}, {}
    for address, adapter in adapters.items():
        inner = adapter.inner if is_dora else adapter
        found[address], lost[address] = _product(
            inner, address, name, rank, energy
        )
    modules = _modules(names, state, adapters, found, is_dora, base)
    module_rank = canonical.rank_of(modules)
    tensors = canonical.tensors_of(modules, module_rank)
    config = canonical.config_of(
        modules, module_rank, use_dora=is_dora, **common
    )
    message = canonical.size_warning(modules, module_rank)
    if message is not None:
        # Numbers that are not finite are an error, which comes first.
        _check_finite(tensors, name)
        warnings.warn(message, AdapterWarning, stacklevel=5)
    return config, tensors, max(lost.values(), default=0.0)


def _path(state, address):
    return state.layers[address].path or state.layers[address].name


def _task_type(model):
    """The task type of transformers' PEFT classes, where it is sure."""
    backbone = getattr(model, "backbone", None)
    names = {cls.__name__ for cls in type(model).__mro__}
    return "CAUSAL_LM" if backbone is not None and "CausalLM" in names else None


def _check_no_experts(state, name):
    experts = [
        address
        for address, adapter in state.adapters(name).items()
        if adapter.site.stack is not None
    ]
    if experts:
        raise ValueError(
            f"The adapter '{name}' is a `DoRA` of the experts of a mixture, "
            f"such as '{experts[0]}', and PEFT has no DoRA of experts. Save it "
            "with `keras_randadapt.save_adapter`, or merge it and export the "
            "model with `keras_randadapt.peft.save_merged`."
        )


def _check_moved(state, name):
    moved = sorted(moving_state.moved_by(state, name))
    if moved:
        raise ValueError(
            f"Training of the adapter '{name}' moved state of the base model, "
            f"such as running means, which PEFT's format can't hold: "
            f"{moved[:5]}. Save it with `save_adapter`, or merge it and use "
            "`save_merged`."
        )


def check_expressible(names, addresses, name):
    """Raises `ValueError` if a site is in no module of transformers.

    Args:
        names: A `NameMap`.
        addresses: The sites' addresses.
        name: The adapter's name.
    """
    outside = [a for a in addresses if a not in names.parts]
    if not outside:
        return
    reasons = [
        f"'{a}' ({names.refused.get(a, 'it is outside the backbone')})"
        for a in outside
    ]
    raise ValueError(
        f"{len(outside)} of {len(addresses)} sites of the adapter '{name}' "
        f"are in no module of transformers' '{names.model_type}': "
        + ", ".join(reasons[:5])
        + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        + ". Adapt other layers, by `exclude` of `inject`."
    )


def _product(adapter, address, name, rank, energy):
    """`((left, right), lost)`: the factors of a site's update."""
    as_it_is = type(adapter) is LoRA and not adapter.depends_on_base
    if as_it_is and rank is None and energy is None:
        # An untrained A is kept too: PEFT may go on training.
        parts = [
            updates.parts_of(one, address, name) for one in lanes.each(adapter)
        ]
        if all(len(one) == 2 for one in parts):
            left, right = map(np.stack, zip(*parts))
            if adapter.site.stack is None:
                (left,), (right,) = left, right
            return (left, right), 0.0
    factors, _, lost = convert.factors_of(
        {address: adapter}, name, rank, energy, verbose=0
    )
    return factors[address], lost[address]


def _modules(names, state, adapters, found, is_dora, base):
    """dict from module to its `Factors`, in the map's order."""
    places = {
        module: [(a, part) for a, part in here]
        for module, here in names.by_module().items()
        if any(address in found for address, _ in here)
    }
    modules = {}
    for module, here in places.items():
        first = here[0][1]
        n_in, n_out = first.dims
        a_blocks, b_blocks = [], []
        for address, part in here:
            if address not in found:
                continue
            left, right = found[address]
            # Arrays of experts have an axis of experts in front.
            *stack, _, rank = left.shape
            a = np.zeros((*stack, rank, n_in))
            a[..., part.inputs] = np.swapaxes(left, -1, -2)
            b = np.zeros((*stack, n_out, rank))
            b[..., part.outputs, :] = np.swapaxes(
                right[..., part.columns], -1, -2
            )
            a_blocks.append(a)
            b_blocks.append(b)
        modules[_named(module, names, base)] = canonical.Factors(
            kind=first.kind,
            weight_shape=first.weight_shape,
            a=np.concatenate(a_blocks, axis=-2),
            b=np.concatenate(b_blocks, axis=-1),
            magnitude=_magnitude(here, state, adapters, n_out)
            if is_dora
            else None,
        )
    return modules


def _magnitude(here, state, adapters, n_out):
    """The magnitudes of a module's outputs."""
    magnitude = np.zeros(n_out)
    for address, part in here:
        if address in adapters:
            values = updates.as_float64(adapters[address].magnitude)
        else:
            # A site of the module that is not adapted keeps its norms.
            layer = state.layers[address]
            kernel = supported.kernel_variable(layer)
            if layer.quantization_mode is not None:
                kernel = quantized.dequantized_kernel(layer)
            view = updates.as_float64(supported.as_view(layer, kernel))
            values = np.sqrt(np.sum(view**2, axis=0))
        magnitude[part.outputs] = values[part.columns]
    return magnitude


def _named(module, names, base):
    """A module's name from the task class or the base class on."""
    if not base or not names.prefix:
        return module
    start = f"{names.prefix}."
    if not module.startswith(start):
        raise ValueError(
            f"'{module}' is outside of the base model '{names.prefix}' of "
            "transformers, so an adapter for the base class can't have it. "
            "Received: base=True"
        )
    return module.removeprefix(start)


def _check_finite(tensors, name):
    wrong = [k for k, one in tensors.items() if not np.all(np.isfinite(one))]
    if wrong:
        raise ValueError(
            f"The adapter '{name}' holds NaN, infinity or a number that is "
            f"too large for float32, in {sorted(wrong)[:5]}: training "
            "diverged, most likely. Lower the learning rate."
        )
