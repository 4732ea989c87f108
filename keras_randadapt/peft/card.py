"""The model card of a PEFT directory."""

import dataclasses
import json

import keras

from keras_randadapt.adapters.base import Adapter
from keras_randadapt.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """The facts that a card tells of an adapter.

    Attributes:
        name: The adapter's name in Keras.
        template: Its template.
        base_model: The name or path of the base model, or `None`.
        model_type: The type of the model in transformers.
        modules: The names of the modules that are adapted.
        sites: The number of sites in Keras.
        form: The method of PEFT that the files have it as.
        rank: The rank in each module, or `None` for a method without ranks.
        bytes: The bytes of the tensors.
        lost: The largest share of a site's energy that the LoRA lacks.
        heads: `(address, path)` of each layer that is kept trainable.
    """

    name: str
    template: Adapter
    base_model: str | None
    model_type: str
    modules: list[str]
    sites: int
    form: str
    rank: int | None
    bytes: int
    lost: float
    heads: list[tuple[str, str]]


def text(about):
    """The card as Markdown, with the metadata that Hugging Face reads."""
    lines = _header(about.base_model, type(about.template).__name__)
    lines += [f"# {about.name}", ""]
    lines += [
        f"This adapter was trained in Keras with keras_randadapt {__version__} "
        "and is in the format of PEFT.",
        "",
    ]
    rows = {
        "base model": about.base_model or "not told",
        "model type in transformers": about.model_type,
        "method": type(about.template).__name__,
        "seed": about.template.seed,
        "sites in Keras": about.sites,
        "modules in transformers": len(about.modules),
        "form in PEFT": about.form,
        "rank in each module": about.rank or "none",
        "size": f"{about.bytes / 1e6:.3g} MB",
        "energy lost at a site, at most": f"{100 * about.lost:.3g} %",
    }
    lines += _table(rows)
    config = {
        "class": keras.saving.get_registered_name(type(about.template)),
        "config": about.template.get_config(),
    }
    lines += ["", "The method's arguments:", "", "```json"]
    lines += [json.dumps(config, indent=2, sort_keys=True, default=str), "```"]
    lines += _listed(about.modules)
    if about.heads:
        lines += [
            "",
            "`heads.safetensors` has layers that were trained along with the "
            "adapter. `keras_randadapt` reads it, and other programs do not:",
            "",
        ]
        lines += [f"- `{path}` (`{address}`)" for address, path in about.heads]
    return "\n".join(lines) + "\n"


def text_of_conversion(title, rows, modules, base_model=None):
    """The card of a directory that was made of another one.

    Args:
        title: string.
        rows: dict of facts.
        modules: The names of the modules that are adapted.
        base_model: The name or path of the base model, or `None`.
    """
    lines = [
        *_header(base_model),
        f"# {_cell(title)}",
        "",
        f"keras_randadapt {__version__} converted this adapter to a LoRA in "
        "the format of PEFT.",
        "",
        *_table(rows),
        *_listed(modules),
    ]
    return "\n".join(lines) + "\n"


def _header(base_model, *tags):
    # JSON is YAML, so nothing that a user gives ends a line or a string.
    header = {
        "library_name": "peft",
        "tags": ["keras", "keras_randadapt", *tags],
    }
    if base_model is not None:
        header["base_model"] = base_model
    lines = (f"{key}: {json.dumps(value)}" for key, value in header.items())
    return ["---", *lines, "---", ""]


def _table(rows):
    lines = (f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return ["| | |", "|---|---|", *lines]


def _listed(modules):
    return ["", "Modules:", "", *(f"- `{module}`" for module in modules)]


def _cell(value):
    return " ".join(str(value).replace("|", "\\|").split())
