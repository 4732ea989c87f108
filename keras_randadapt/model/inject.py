"""`inject`: checks its arguments, builds adapters and attaches them."""

import functools
import numbers
import warnings
from typing import Any

import keras

from keras_randadapt import _compat
from keras_randadapt.adapter_warning import AdapterWarning
from keras_randadapt.adapters.base import Adapter
from keras_randadapt.model import advice
from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model import distribution
from keras_randadapt.model import quantize as quantize_lib
from keras_randadapt.model import report as report_lib
from keras_randadapt.model.state import layers_of
from keras_randadapt.sites import linear
from keras_randadapt.sites import selection
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import layer_of
from keras_randadapt.sites.selection import Targets


def inject(
    model: keras.Model,
    adapter: Adapter,
    targets: Targets = None,
    *,
    exclude: Targets = None,
    keep_trainable: Targets = None,
    experts: bool = False,
    quantize: Any = None,
    memory_limit: int | None = None,
    name: str = "default",
) -> report_lib.Report:
    """Attaches an adapter to a model, in place, and freezes the rest.

    From then on `fit`, `predict`, `save` and other methods are Keras's own.
    The adapted model computes the outputs of the base model until it is
    trained. The model may be compiled or trained already. It need not be
    compiled again, and `model.optimizer` is a new optimizer of the same
    config. The same happens whenever the set of trained weights changes.

    The first adapter of a model is active. Further adapters, of other names,
    are attached inactive; `set_active` switches to them.

    Args:
        model: A built Keras model, the outermost one that you will train and
            save.
        adapter: An adapter such as `RLoRA(512)`. It is a template, which stays
            unbuilt and can be injected again.
        targets: The layers to adapt. It may be a name or a list of names, each
            a layer's own name or the end of its path; a `re.Pattern`, which is
            searched for in the path; `"all-linear"`, which means every Dense
            and EinsumDense layer except routers and gates of experts, heads of
            KerasHub tasks and layers in `keep_trainable`; a function of a
            layer that returns a bool; or `None`. A name must mean layers that
            can be adapted. A pattern or a function may mean others: layers
            with a kernel are then left out with a warning, and so is a
            normalization for which a function is true. `None` means the query
            and value projections for most methods, all layers with a bias for
            `BitFit`, outputs of attention and feed-forward networks for
            `Bottleneck`, and keys, values and feed-forward outputs for `IA3`.
        exclude: The targets to leave out: names, a pattern, `"all-linear"` or
            a function. A name may also be that of a layer that contains
            targets.
        keep_trainable: The layers that are trained along with the adapter and
            saved with it, such as a classification head: names, a pattern or
            a function.
        experts: bool. Whether `"all-linear"` also means the kernels of the
            experts of a mixture, which are stacked in variables of three axes.
            Each expert then gets an adapter of its own. Without it they are
            adapted only if `targets` names them or their layer.
        quantize: Optional quantization of the base: `"int8"`, `"int4"`,
            `"float8"`, or a config of `keras.quantizers`, which GPTQ and AWQ
            need. Dense and EinsumDense layers are quantized, and embeddings in
            int8 and int4, whether they are adapted or not. The heads of
            KerasHub tasks, layers in `keep_trainable`, routers and gates of
            experts stay floats. The base stays quantized after `eject`.
        memory_limit: Optional int. The bytes that one call of `generate` or
            `predict` may take for kernels with the adapters folded in, which
            it forms once and multiplies by in each step; 0 forms none. By
            default it is a quarter of the bytes of the base. It is the
            model's: the last `inject` that gives one counts.
        name: The adapter's name: letters, digits, `_` and `-`.

    Returns:
        A `Report`, which is meant to be printed.

    Raises:
        TypeError: If `model` is no Keras model, `adapter` no adapter, or
            `quantize` neither a mode nor a config.
        ValueError: If the model is not built, a target matches nothing or
            only layers that can't be adapted, a name means a layer with a
            kernel that can't be adapted, the method can't take a site's
            shape, the name is taken, `quantize` is given for a model that is
            quantized or adapted already, or the model was built under another
            `tf.distribute` scope. The model is then unchanged.

    Example:

    ```python
    report = kra.inject(
        classifier,
        kra.RLoRA(rank=512, seed=0),
        targets=["query", "value"],
        keep_trainable=["logits"],
    )
    print(report)
    classifier.fit(x, y)
    ```
    """
    checks.check_model(model)
    distribution.check_scope(model)
    checks.check_adapter(adapter)
    checks.check_new_name(model, name)
    layers = layers_of(model)
    kept = selection.select_kept(layers, keep_trainable)
    selected = selection.select_sites(
        layers,
        targets,
        exclude,
        kept,
        adapter.site_kinds,
        adapter.default_targets,
        functools.partial(build.takes, adapter),
        _check_experts(experts, targets),
    )
    chosen, left_out = selected.chosen, selected.left_out
    if adapter.adapts_bias and not adapter.adapts_kernel:
        chosen = _with_bias(layers, chosen, adapter)
        if targets is None:
            advice.warn_of_missed_biases(
                layers, chosen, kept, adapter.site_kinds
            )
    if targets == "all-linear":
        chosen, heads = _without_task_head(model, layers, chosen)
        left_out = [a for a in layers if a in left_out or a in heads]
    checks.check_attachable(model, layers, chosen, kept)
    advice.warn_of_inference_in_fit(model, adapter)
    advice.warn_of_frozen_in_kept(layers, kept)
    left_out = {a: linear.kernel_parameters(layers[a]) for a in left_out}
    advice.warn_of_left_out(model, layers, left_out, targets)
    advice.warn_of_frozen_head(model, layers, chosen, kept)
    adapter = adapter.resolved(layers, chosen)
    checks.check_storable(adapter)
    sources = adapter.sources(layers, chosen)
    built = build.build_adapters(adapter, name, layers, chosen, sources)
    attachment = attach.Attachment(
        template=adapter,
        name=name,
        layers=layers,
        kept=kept,
        sources=sources,
        built=built,
    )
    _check_memory_limit(memory_limit)
    plan = quantize_lib.plan_of(model, layers, quantize, chosen, kept)
    with attach.changing(model) as change:
        if plan is not None:
            quantize_lib.apply(change, plan)
        attach.attach(change, attachment)
        if memory_limit is not None:
            change.set(model._randadapt, "memory_limit", int(memory_limit))
    return report_lib.Report(model, name, left_out)


def _check_memory_limit(memory_limit):
    if memory_limit is None:
        return
    if isinstance(memory_limit, bool) or not isinstance(
        memory_limit, numbers.Integral
    ):
        raise TypeError(
            "`memory_limit` must be an int, a number of bytes. "
            f"Received: memory_limit={memory_limit!r}"
        )
    if memory_limit < 0:
        raise ValueError(
            "`memory_limit` must be at least 0; 0 forms no kernels. "
            f"Received: memory_limit={memory_limit}"
        )


def _check_experts(experts, targets):
    if not isinstance(experts, bool):
        raise TypeError(
            '`experts` must be a bool: whether `"all-linear"` means the '
            f"kernels of experts too. Received: experts={experts!r}"
        )
    if experts and not (isinstance(targets, str) and targets == "all-linear"):
        raise ValueError(
            '`experts=True` belongs to `targets="all-linear"`. With other '
            "targets name the experts' layer in them, such as "
            f'`targets=["query", "experts"]`. Received: targets={targets!r}'
        )
    return experts


def _with_bias(layers, chosen, adapter):
    """The chosen layers that have a bias; it warns of the others.

    A layer of another kind than the method adapts is refused later.
    """
    without = [
        address
        for address in chosen
        if supported.bias_variable(layers[address]) is None
        and build.takes(adapter, layers[address])
    ]
    if len(without) == len(chosen):
        raise ValueError(
            f"None of the {len(chosen)} layers that `targets` matched has a "
            "bias to train."
        )
    # A layer's bias belongs to one of its kernels.
    biased = {id(layer_of(layers[a])) for a in chosen if a not in without}
    told = [a for a in without if id(layer_of(layers[a])) not in biased]
    if told:
        warnings.warn(
            f"{len(told)} of the {len(chosen)} layers that `targets` "
            "matched have no bias and are left out: "
            f"{layers.named(told[:5])}",
            AdapterWarning,
            stacklevel=3,
        )
    return [a for a in chosen if a not in without]


def _without_task_head(model, layers, chosen):
    """The chosen layers without the heads of KerasHub tasks, and the heads."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model):
        return chosen, []
    inside = {id(layer) for layer in _compat.flatten_layers(backbone)}
    inner = [a for a in chosen if id(layer_of(layers[a])) in inside] or chosen
    return inner, [a for a in chosen if a not in inner]
