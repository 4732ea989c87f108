"""`load`: attaches an adapter of PEFT to a model."""

import dataclasses
import os

import keras
import numpy as np

from keras_randadapt.adapters import IA3
from keras_randadapt.adapters import DoRA
from keras_randadapt.model import advice
from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model import distribution
from keras_randadapt.model import low_rank
from keras_randadapt.model import report
from keras_randadapt.model import state as state_lib
from keras_randadapt.peft import directory as directory_lib
from keras_randadapt.peft import experts
from keras_randadapt.peft import family
from keras_randadapt.peft import methods
from keras_randadapt.peft import names as names_lib
from keras_randadapt.peft import options as options_lib
from keras_randadapt.peft import own_adapters
from keras_randadapt.peft import sites
from keras_randadapt.peft import sources
from keras_randadapt.sites import selection
from keras_randadapt.sites import supported
from keras_randadapt.sites.selection import Targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The adapters and values that will be attached and assigned.

    Attributes:
        template: The adapter's template.
        built: dict from address to built adapter, with values but magnitudes.
        magnitudes: dict from address to array, NaN where the base's stays.
        kept: dict from address to the arrays of a kept layer.
    """

    template: object
    built: dict
    magnitudes: dict
    kept: dict


def load(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    name: str = "default",
    heads: bool = True,
    keep_trainable: Targets = None,
) -> report.Report:
    """Attaches an adapter that PEFT or `kra.peft.save` wrote.

    LoRA, with or without rsLoRA and patterns of ranks and alphas, becomes a
    `LoRA`. DoRA, HiRA, IA3, LoHa, LoKr, MiSS and OFT become the adapter of
    that name. SHiRA becomes a `SHiRA` if one of its masks with the file's seed
    has the file's places. AdaLoRA, VeRA and RandLoRA become the `LoRA` that
    computes the same, and so do LoHa, LoKr, MiSS and SHiRA where their own
    form can't. VeRA and RandLoRA need their frozen matrices in the file. OFT
    needs `use_cayley_neumann=False`. LoRA of experts is read from the
    parameters `gate_up_proj` and `down_proj`, in which transformers 5 holds
    them. Ranks that are zero at a site are left out. Layers in
    `modules_to_save` and in `heads.safetensors` are kept trainable and get
    their values. Module names may have the prefix of a task class or not.

    In a model without adapters, the loaded adapter is active. Beside other
    adapters it is attached inactive; see `set_active`.

    Args:
        model: A backbone or task of KerasHub with the weights of the
            adapter's base model, such as `from_preset("hf://...")` gives.
        directory: Path of the directory, with `adapter_config.json` and
            `adapter_model.safetensors`. Pickles are not read.
        name: The adapter's name in the model.
        heads: Whether layers that were trained along with the adapter get
            their values. `False` leaves them out, such as the head of a task
            class that this model does not have.
        keep_trainable: More layers to train along with the adapter, such as a
            new head; see `inject`.

    Returns:
        A `Report` of the adapter.

    Raises:
        TypeError: If `directory` is no path or `heads` no bool.
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged; if the method or an option is not
            known, or has an effect that can't be held, such as trained biases;
            if a module is not in the model, a tensor is missing or has another
            shape; if a number is not finite; or if the name is taken. The
            model is then unchanged.

    Example:

    ```python
    kra.peft.save(classifier, "sentiment-peft")
    kra.eject(classifier)
    print(kra.peft.load(classifier, "sentiment-peft"))
    ```
    """
    checks.check_model(model)
    checks.check_new_name(model, name)
    if not isinstance(heads, bool):
        raise TypeError(
            "`heads` must be a bool: whether layers that were trained along "
            f"with the adapter are loaded. Received: heads={heads!r}"
        )
    distribution.check_scope(model)
    source = sources.read(directory_lib.check_path(directory))
    plan = _planned(model, name, source, heads, keep_trainable)
    advice.warn_of_inference_in_fit(model, plan.template)
    with attach.changing(model) as change:
        attach.attach(
            change,
            attach.Attachment(
                template=plan.template,
                name=name,
                layers=state_lib.layers_of(model),
                kept=list(plan.kept),
                sources={},
                built=plan.built,
            ),
        )
        # Attaching gives magnitudes the norms of the base kernels.
        for address, values in plan.magnitudes.items():
            variable = plan.built[address].magnitude
            base = keras.ops.convert_to_numpy(variable)
            values = np.where(np.isnan(values), base, values)
            change.assign(variable, values.astype("float32"))
        attach.assign_kept(change, name, plan.kept)
    return report.Report(model, name)


def _planned(model, name, source, heads, keep_trainable):
    """Checks a source against a model, and builds what will be attached."""
    path = source.path
    layers = state_lib.layers_of(model)
    names = names_lib.name_map(model)
    updates, others = _updates(source, names)
    views = {a: tuple(supported.view_of(layers[a])) for a in names.parts}
    if source.method == "IA3":
        found = sites.scales(path, names, updates, views)
    elif source.method == "OFT":
        found = {
            address: sites.SiteUpdate()
            for address, parts in names.parts.items()
            if any(part.module in updates for part in parts)
        }
    else:
        found = sites.low_rank_updates(names, updates, views)
    if not heads:
        others = _without_heads(source.config, others)
    kept = {
        **_kept_of_modules(path, others, names, layers),
        **(_kept_of_heads(path, source.heads, layers) if heads else {}),
    }
    chosen = selection.select_kept(layers, keep_trainable)
    kept = {
        **{a: state_lib.kept_layer_values(layers[a]) for a in chosen},
        **{a: one for a, one in kept.items() if not _is_below(a, chosen)},
    }
    checks.check_attachable(model, layers, list(found), list(kept))
    dropout = next(
        (v for key, v in source.options.items() if key.endswith("dropout")),
        0.0,
    )
    place = own_adapters.Place(
        name, layers, source.options, updates, names.parts, found
    )
    own = own_adapters.make(source.method, place)
    if own is not None:
        template, built = own
    elif source.method == "IA3":
        template, built = _ia3(name, found, layers)
    else:
        make = _dora if source.options.get("use_dora") else _lora
        template, built = make(name, found, layers, float(dropout))
    return _Plan(
        template=template,
        built=built,
        magnitudes={
            address: one.magnitude
            for address, one in found.items()
            if one.magnitude is not None
        },
        kept=kept,
    )


def _updates(source, names):
    """The updates of the modules, and the tensors that belong to none."""
    path, method = source.path, source.method
    modules, shared, others = methods.grouped(path, method, source.tensors)
    if not modules:
        raise ValueError(f"'{path}' holds no tensors of a {method} adapter.")
    reader = methods.Reader(path, method, source.options, shared)
    targets = source.options.get("target_parameters") or []
    modules, parameters = experts.named(path, targets, modules)
    places = names.by_module()
    of_experts = experts.Gathered(path, names)
    updates = {}
    for module, roles in modules.items():
        shape = of_experts.shape_of(module)
        if shape is not None:
            of_experts.add(
                module, reader.update(module, roles, shape[::-1], shape)
            )
            continue
        ours = _find(path, names, module)
        if ours in updates:
            raise ValueError(
                f"'{path}' holds the module '{ours}' twice, with and without "
                "the prefix."
            )
        part = places[ours][0][1]
        if (part.kind == "experts") != (module in parameters):
            raise ValueError(
                f"'{path}' has no `target_parameters` that mean '{module}', "
                "which is a parameter in this model and no module."
            )
        if part.kind == "experts":
            updates[ours] = reader.update_of_experts(
                module, roles, part.weight_shape
            )
        else:
            updates[ours] = reader.update(
                module, roles, part.dims, part.weight_shape
            )
    for module, update in of_experts.updates(methods.Update).items():
        if module in updates:
            raise ValueError(
                f"'{path}' adapts the experts of '{module}' twice, together "
                "and one by one."
            )
        updates[module] = update
    lacking = [
        *options_lib.missing_targets(source.config, updates, names),
        *of_experts.missing(source.config.get("target_modules")),
    ]
    if lacking:
        raise ValueError(
            f"'{path}' lacks the tensors of {len(lacking)} modules that its "
            f"config targets: {lacking[:5]}. It is incomplete, or of a model "
            "with fewer layers."
        )
    return updates, others


def _find(path, names, module):
    ours = names.find(module)
    if ours is not None:
        return ours
    near = names.near(module)
    raise ValueError(
        f"'{path}' adapts the module '{module}', and none of that name holds "
        f"a layer of this model, a '{names.model_type}' in transformers."
        + (f" Near are {near}." if near else "")
        + " The adapter is of another architecture or of a larger model, or "
        "the layer can't be adapted exactly: print `kra.peft.name_map(model)`."
    )


def _lora(name, found, layers, dropout):
    scaling = next(iter(found.values())).scaling
    return low_rank.build(
        layers,
        name,
        {a: (one.left, one.right) for a, one in found.items()},
        {a: max(1, one.left.shape[-1]) for a, one in found.items()},
        scaling=scaling,
        dropout=dropout,
    )


def _dora(name, found, layers, dropout):
    scaling = next(iter(found.values())).scaling
    ranks = {a: max(1, one.left.shape[1]) for a, one in found.items()}
    template = DoRA(
        low_rank.template_of(ranks, {"scaling": scaling, "dropout": dropout})
    )
    built = build.build_adapters(template, name, layers, list(found), {})
    low_rank.give(
        {address: adapter.inner for address, adapter in built.items()},
        {a: (one.left, one.right) for a, one in found.items()},
    )
    return template, built


def _ia3(name, found, layers):
    template = IA3(feedforward=[a for a, one in found.items() if one.of_inputs])
    built = build.build_adapters(template, name, layers, list(found), {})
    for address, one in found.items():
        variable = built[address].ia3_l
        if tuple(variable.shape) != one.scale.shape:
            raise ValueError(
                f"'{address}' takes {variable.shape[0]} factors of IA3, and "
                f"the adapter has {len(one.scale)}."
            )
        variable.assign(one.scale.astype("float32"))
    return template, built


def _is_below(address, others):
    """Whether an address is one of others, or of a layer inside."""
    return any(
        address == one or address.startswith(f"{one}/") for one in others
    )


def _without_heads(config, others):
    """The tensors that belong to no module in `modules_to_save`."""
    saved = config.get("modules_to_save")
    saved = [
        f"{one}." for one in (saved if isinstance(saved, list) else []) if one
    ]
    return {
        name: array
        for name, array in others.items()
        if not any(one in name for one in saved)
    }


def _kept_of_modules(path, others, names, layers):
    """dict from address to arrays, of the layers in `modules_to_save`."""
    addresses = {id(layer): address for address, layer in layers.items()}
    known = {}
    for key, places in names.variables.items():
        for full in (key, f"{names.prefix}.{key}"):
            module, _, role = full.rpartition(".")
            renamed = f"{family.renamed(names.model_type, module)}.{role}"
            for one in (full, renamed):
                known[one] = known[one.removeprefix(f"{names.prefix}.")] = (
                    key,
                    places,
                )
    values = {}
    for name, array in others.items():
        key, places = known.get(name, (None, ()))
        if len(places) != 1 or len(places[0][1].keys) != 1:
            raise ValueError(
                f"'{path}' holds the tensor '{name}', which is no adapter's, "
                "and no layer of this model has it alone, so it can't be kept "
                "trainable. If it is a head in `modules_to_save`, "
                "`heads=False` loads the adapter without it."
            )
        ((assigned, origin),) = places
        if array.shape != tuple(origin.shapes[0]):
            raise ValueError(
                f"'{path}' holds '{name}' with the shape {array.shape}, and in "
                f"this model it must be {tuple(origin.shapes[0])}."
            )
        array = array.reshape(-1)[origin.place(key)[1]]
        address = addresses[id(assigned.layer)]
        values.setdefault(address, {})[id(assigned.variable)] = array
    kept = {}
    for address, found in values.items():
        weights = layers[address].weights
        lacking = [w.path for w in weights if id(w) not in found]
        if lacking:
            raise ValueError(
                f"'{path}' holds a part of the layer '{address}' and lacks "
                f"{lacking}."
            )
        kept[address] = [found[id(weight)] for weight in weights]
    return kept


def _kept_of_heads(path, heads, layers):
    """dict from address to arrays, of the layers that Keras kept."""
    values = {}
    for key, array in heads.items():
        address, _, number = key.rpartition("#")
        weights = layers[address].weights if address in layers else []
        if not number.isdecimal() or int(number) >= len(weights):
            raise ValueError(
                f"'{path}' keeps the layer '{address}' in "
                f"'{directory_lib.HEADS}', and this model has no such weight "
                f"({key!r}). Load it into the task that it was trained on, or "
                "leave out all heads, by `heads=False`."
            )
        if array.shape != tuple(weights[int(number)].shape):
            raise ValueError(
                f"'{path}' holds {key!r} in '{directory_lib.HEADS}' with the "
                f"shape {array.shape}, and in this model it must be "
                f"{tuple(weights[int(number)].shape)}."
            )
        values.setdefault(address, {})[int(number)] = array
    for address, found in values.items():
        if len(found) < len(layers[address].weights):
            raise ValueError(
                f"'{path}' holds {len(found)} of the "
                f"{len(layers[address].weights)} weights of '{address}' in "
                f"'{directory_lib.HEADS}'."
            )
    return {a: [one[i] for i in sorted(one)] for a, one in values.items()}
