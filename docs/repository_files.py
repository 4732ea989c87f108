"""Puts files from outside of `docs/` on the site, and leads links to them.

`mkdocs.yml` runs this module as a hook. A page keeps the links that work in the
repository: `../README.md` in `docs/install.md` is the site's first page. A file
that a page links to is put on the site, and a folder without a README gets a
page that lists its files. A link to nothing stays, and the strict build fails.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
DOCS = "docs/"

#: Pages outside of `docs/` that are in the navigation.
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
]

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def _uri(path):
    """The place on the site of a file of the repository."""
    return path.removeprefix(DOCS)


def _path(uri, files):
    """The place in the repository of a page of the site."""
    file = files.get_file_from_path(uri)
    absolute = file.abs_src_path and pathlib.Path(file.abs_src_path)
    if absolute and absolute.is_relative_to(ROOT):
        return absolute.relative_to(ROOT).as_posix()
    return uri


def _target(link, path):
    """The path that a link on a page means, or `None` outside of the root."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if target.startswith(".."):
        return None
    if (ROOT / target).is_dir():
        return f"{target}/README.md"
    return target


def _links(path):
    for _, link, _ in _LINK.findall((ROOT / path).read_text(encoding="utf-8")):
        target = _target(link, path)
        if target is not None:
            yield target


def _listing(folder):
    """A page that lists the files of a folder."""
    names = sorted(
        one.name
        for one in (ROOT / folder).iterdir()
        if one.is_file() and not one.name.startswith(".")
    )
    lines = [f"# {folder}", "", *(f"- [{name}]({name})" for name in names)]
    return "\n".join(lines) + "\n", [f"{folder}/{name}" for name in names]


def on_files(files, config):
    guides = sorted((ROOT / "guides").glob("*.md"))
    new = [*PAGES, *(one.relative_to(ROOT).as_posix() for one in guides)]
    for file in list(files.documentation_pages()):
        if file.abs_src_path:
            new += _links(_path(file.src_uri, files))
    while new:
        path = new.pop()
        if files.get_file_from_path(_uri(path)):
            continue
        if (ROOT / path).is_file():
            files.append(
                File.generated(
                    config, _uri(path), abs_src_path=str(ROOT / path)
                )
            )
            if path.endswith(".md"):
                new += _links(path)
        elif (ROOT / path).parent.is_dir() and path.endswith("/README.md"):
            content, inside = _listing(posixpath.dirname(path))
            files.append(File.generated(config, path, content=content))
            new += inside
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    path = _path(uri, files)

    def lead(match):
        before, link, after = match.groups()
        target = _target(link, path)
        if target is None or not files.get_file_from_path(_uri(target)):
            return match[0]
        start = posixpath.dirname(uri) or "."
        return f"{before}{posixpath.relpath(_uri(target), start)}{after}"

    return _LINK.sub(lead, markdown)
