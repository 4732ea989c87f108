"""Makes a page of the site for each public name: its signature and docstring.

`mkdocs.yml` runs this module as a hook. It reads the package without importing
it. A public name without a docstring or without an example stops the build, and
so does a list of arguments that differs from the signature. The example of a
name is in its docstring, or else in `docs/api_examples.md`.
"""

import pathlib
import re

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

PACKAGE = "keras_randadapt"
ROOT = pathlib.Path(__file__).parents[1]

# Modules whose names are public though the package does not list them.
MORE_MODULES = ["ops.counter"]

# Names that the `__getattr__` of a module gives.
LAZY = {
    "optimizers.learning_rate_groups": (
        f"{PACKAGE}.model.learning_rate_groups.learning_rate_groups"
    )
}

# Types that public functions give and that methods get.
TYPES = {
    "Report": f"{PACKAGE}.model.report.Report",
    "LowRankReport": f"{PACKAGE}.model.low_rank_report.LowRankReport",
    "Site": f"{PACKAGE}.sites.site.Site",
    "Product": f"{PACKAGE}.sites.product.Product",
}

# Constants, whose docstrings Python does not keep.
CONSTANTS = {
    "__version__": "The version of the package.",
    "bases.KINDS": "The names that arguments called `basis` take.",
    "hadamard.HARTLEY_COMPOSITE_LIMIT": (
        "The largest composite order that gets a Hartley core of its own."
    ),
    "hadamard.HARTLEY_CORE_LIMIT": (
        "The largest prime order that gets a Hartley core."
    ),
    "hadamard.PALEY_CORE_LIMIT": "The largest order of a Paley core.",
    "hadamard.PASS_COST": (
        "The cost of one more pass over the data, in multiply-adds an element."
    ),
    "hadamard.WINDOW_CORE_LIMIT": (
        "Two overlapping windows are cheaper than a Hartley core above this."
    ),
}

_EXAMPLE = re.compile(
    r"^## `([\w.]+)`\n+```python\n(.*?)^```", re.DOTALL | re.MULTILINE
)


class PublicName:
    """A public name, such as `optimizers.GaLore`.

    Attributes:
        name: The name after `kra.`.
        target: The griffe object that it means.
        example: The code of its example in `api_examples.md`, or `None`.
    """

    def __init__(self, name, target, example):
        self.name = name
        self.target = target
        self.example = example

    @property
    def page(self):
        return f"api/{self.name.replace('.', '/')}.md"

    @property
    def summary(self):
        """The first sentence of the docstring."""
        if self.name in CONSTANTS:
            return CONSTANTS[self.name]
        text = self.target.docstring.value if self.target.docstring else ""
        return " ".join(text.split("\n\n")[0].split())

    def faults(self):
        """What the page lacks, one sentence each."""
        if not self.summary:
            yield f"`{self.name}` has no docstring."
        elif (
            not self.target.is_module
            and not self.target.is_attribute
            and not re.search(
                r"^Example:$", self.target.docstring.value, re.MULTILINE
            )
            and not self.example
        ):
            yield (
                f"`{self.name}` has no example, neither in its docstring nor "
                "in docs/api_examples.md."
            )
        if self.target.is_function or self.target.is_class:
            yield from self._argument_faults()

    def _argument_faults(self):
        """How `Args:`, where there is one, differs from the signature."""
        documented = {
            argument.name.lstrip("*")
            for section in self._sections()
            if section.kind is griffe.DocstringSectionKind.parameters
            for argument in section.value
        }
        own = {one.name.lstrip("*") for one in self.target.parameters}
        own -= {"self"}
        variadic = {
            one.name.lstrip("*")
            for one in self.target.parameters
            if one.kind
            in (
                griffe.ParameterKind.var_positional,
                griffe.ParameterKind.var_keyword,
            )
        }
        if documented and own - variadic - documented:
            missing = sorted(own - variadic - documented)
            yield f"`{self.name}` does not document its arguments {missing}."
        # Arguments that a method passes on are documented, too.
        if not variadic and documented - own:
            foreign = sorted(documented - own)
            yield f"`{self.name}` documents arguments {foreign} that it lacks."

    def _sections(self):
        if not self.target.docstring:
            return []
        return griffe.parse(
            self.target.docstring, griffe.Parser.google, warnings=False
        )

    def markdown(self, names):
        """The page.

        Args:
            names: list of all public names.
        """
        heading = f"kra.{self.name}"
        if self.name in TYPES:
            heading = self.name
        if self.name in CONSTANTS:
            code = f"{self.target.name} = {self.target.value}"
            return f"# {heading}\n\n```python\n{code}\n```\n\n{self.summary}\n"
        lines = [
            f"::: {self.target.path}",
            "    options:",
            f"      heading: {heading}",
            f"      toc_label: {heading}",
        ]
        if self.target.is_module:
            lines.append("      members: false")
            inside = [
                other
                for other in names
                if other.name.rpartition(".")[0] == self.name
            ]
            if inside:
                lines += ["", *_table(inside, self.page)]
        if self.example:
            lines += ["", "## Example", "", "```python"]
            lines += [self.example.strip(), "```"]
        return "\n".join(lines) + "\n"


def _table(names, page):
    depth = page.count("/")
    yield "| name | meaning |"
    yield "| --- | --- |"
    for one in names:
        summary = one.summary.replace("|", "\\|")
        yield f"| [`{one.name}`]({'../' * depth}{one.page}) | {summary} |"


def _resolve(package, path):
    """The object that a path means, at its own place.

    An imported name goes before a module of the same name, as in Python:
    `keras_randadapt.sites` is a function.
    """
    *modules, name = path.split(".")[1:]
    module = package
    for part in modules:
        module = module.members[part]
    imported = module.imports.get(name, path)
    if imported == path:
        return module.members[name]
    return _resolve(package, imported)


def _names_in(module):
    """The public names of a module that has no `__all__`."""
    if module.is_init_module:
        return [
            name
            for name, path in module.imports.items()
            if path.startswith(f"{PACKAGE}.") and not name.startswith("_")
        ]
    return [
        name
        for name, member in module.members.items()
        if not name.startswith("_")
        and not member.is_alias
        and (member.is_function or member.is_class)
    ]


def public_names():
    """list of all `PublicName`, those of a module behind the module.

    Raises:
        PluginError: If one lacks a docstring or an example.
    """
    package = griffe.load(PACKAGE, search_paths=[ROOT])
    text = (ROOT / "docs/api_examples.md").read_text(encoding="utf-8")
    examples = dict(_EXAMPLE.findall(text))
    paths = {}
    for name in sorted(map(str, package.exports), key=str.lower):
        paths[name] = f"{PACKAGE}.{name}"
    for name in [*paths, *MORE_MODULES]:
        path = f"{PACKAGE}.{name}"
        module = _resolve(package, path)
        # The methods are public as `kra.LoRA`.
        if not module.is_module or name == "adapters":
            continue
        paths[name] = path
        inside = module.exports or _names_in(module)
        for one in sorted(map(str, inside), key=str.lower):
            paths[f"{name}.{one}"] = f"{path}.{one}"
    paths.update(LAZY)
    paths.update(TYPES)
    names = [
        PublicName(name, _resolve(package, path), examples.pop(name, None))
        for name, path in paths.items()
    ]
    faults = [fault for name in names for fault in name.faults()]
    faults += [
        f"docs/api_examples.md has `{n}`, no public name." for n in examples
    ]
    if faults:
        raise PluginError("The API is not documented.\n" + "\n".join(faults))
    return names


_names = []


def _navigation(names):
    """The API's part of the navigation: a module's names are a section."""
    top = []
    sections = {}
    for one in names:
        module = one.name.rpartition(".")[0]
        if one.name in TYPES:
            sections.setdefault("Types", []).append({one.name: one.page})
        elif module:
            sections.setdefault(f"kra.{module}", []).append(
                {one.name.rpartition(".")[2]: one.page}
            )
        elif one.target.is_module and one.name != "adapters":
            sections.setdefault(f"kra.{one.name}", []).append(one.page)
        else:
            top.append({one.name: one.page})
    return [
        "api/index.md",
        {"kra": top},
        *({title: pages} for title, pages in sorted(sections.items())),
    ]


def on_config(config):
    _names[:] = public_names()
    config.nav.append({"API": _navigation(_names)})
    return config


def on_files(files, config):
    index = ["# API", "", "`kra` stands for `keras_randadapt`.", ""]
    index += _table(_names, "api/index.md")
    pages = {"api/index.md": "\n".join(index) + "\n"}
    pages.update({one.page: one.markdown(_names) for one in _names})
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


# A public name in running text, such as `kra.inject` or `kra.LoRA(8)`.
_MENTION = re.compile(r"(?<![\[`])`kra\.([A-Za-z_][\w.]*)([^`\n]*)`(?!`)")


def on_page_markdown(markdown, page, config, files):
    """Links public names in text to their pages; an unknown one is fatal."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    pages = {one.name: one.page for one in _names}
    up = "../" * page.file.src_uri.count("/")

    def link(match):
        name, rest = match.groups()
        if name not in pages:
            # An attribute of a class has its place on the page of the class.
            name = name.rpartition(".")[0]
        if name not in pages:
            raise PluginError(
                f"{page.file.src_uri} mentions {match[0]}, no public name."
            )
        return f"[{match[0]}]({up}{pages[name]})"

    return _outside_code(markdown, lambda text: _MENTION.sub(link, text))


_BLOCK = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def _outside_code(markdown, function):
    """Applies a function to a page's text between its blocks of code."""
    parts = re.split(
        r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE
    )
    return "".join(
        part if i % 2 else function(part) for i, part in enumerate(parts)
    )
