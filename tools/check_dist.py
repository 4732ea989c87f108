"""Checks what is in a source distribution and in wheels.

    python tools/check_dist.py dist/*

A wheel without the compiled transforms installs and works, only slower, so
nobody would notice; this fails and says what is missing.
"""

import pathlib
import sys
import tarfile
import zipfile

PACKAGE = "keras_randadapt"
EVERYWHERE = (f"{PACKAGE}/__init__.py", f"{PACKAGE}/py.typed")
SDIST = (
    *EVERYWHERE,
    f"{PACKAGE}/ops/_native.c",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
LIBRARY = f"{PACKAGE}/ops/_native"
LIBRARY_SUFFIXES = (".so", ".pyd")


def check(path: pathlib.Path) -> list[str]:
    """What is wrong with a distribution, as sentences."""
    if path.name.endswith(".tar.gz"):
        return check_sdist(path)
    if path.suffix == ".whl":
        return check_wheel(path)
    return ["it is neither a wheel nor a source distribution"]


def check_sdist(path: pathlib.Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    problems = [f"{name} is missing" for name in SDIST if name not in names]
    problems += [
        f"{name} was compiled here"
        for name in names
        if name.endswith(LIBRARY_SUFFIXES)
    ]
    return problems + strangers(names)


def check_wheel(path: pathlib.Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    problems = [
        f"{name} is missing" for name in EVERYWHERE if name not in names
    ]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        problems.append("LICENSE is missing")
    if not any(
        name.startswith(LIBRARY) and name.endswith(LIBRARY_SUFFIXES)
        for name in names
    ):
        problems.append(
            f"the compiled {LIBRARY} is missing; build with "
            "KERAS_RANDADAPT_REQUIRE_NATIVE=1 to see why"
        )
    if "-cp311-abi3-" not in path.name:
        problems.append("its tag is not cp311-abi3")
    information = path.name.split("-")[:2]
    allowed = (PACKAGE, f"{'-'.join(information)}.dist-info")
    problems += [
        f"{name} does not belong into it"
        for name in names
        if name.split("/")[0] not in allowed
    ]
    return problems + strangers(names)


def strangers(names: list[str]) -> list[str]:
    return [
        f"{name} does not belong into it"
        for name in names
        if "tests" in name.split("/") or "__pycache__" in name
    ]


def main(arguments: list[str]) -> int:
    if not arguments:
        print("No file was named.")
        return 2
    status = 0
    for path in map(pathlib.Path, arguments):
        problems = check(path)
        for problem in problems:
            print(f"{path.name}: {problem}.")
        if not problems:
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, fine.")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
