"""What `make dist` builds, and that it is complete and installs anywhere."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Where Keras and the backends are.
SITE_PACKAGES = sysconfig.get_path("purelib")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform == "win32" or shutil.which("make") is None,
        reason="needs make",
    ),
    pytest.mark.skipif(
        not any(map(shutil.which, ("cc", "gcc", "clang"))),
        reason="there is no C compiler",
    ),
]


def run(*command, cwd, expected=0, **environment):
    """The output of a command that must end with an exit code or `None`."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if expected is not None:
        assert process.returncode == expected, process.stdout[-5000:]
    else:
        assert process.returncode, process.stdout[-5000:]
    return process.stdout


def checkout(path):
    """A copy, since a build writes into the sources."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("keras_randadapt", "tests", "tools"):
        shutil.copytree(ROOT / name, path / name, ignore=ignored)
    for name in (
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "setup.py",
    ):
        shutil.copy(ROOT / name, path)
    return path


def make_dist(path, **options):
    """`make dist`, in the environment of the tests."""
    return run(
        *("make", "-o", ".venv/.test", "dist", f"RUN={sys.executable}"),
        cwd=path,
        **options,
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make dist` fills."""
    path = checkout(tmp_path_factory.mktemp("checkout"))
    make_dist(path)
    return path / "dist"


def test_a_wheel_and_a_source_distribution(dist):
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    assert len(list(dist.iterdir())) == 2
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len({name.split("/")[0] for name in names}) == 2
    assert not [name for name in names if "test" in name]
    assert "keras_randadapt/ops/_native.abi3.so" in names
    assert "keras_randadapt/py.typed" in names
    assert not [name for name in names if name.endswith(".c")]
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for name in (
        "LICENSE",
        "README.md",
        "keras_randadapt/ops/_native.c",
        "keras_randadapt/py.typed",
        "pyproject.toml",
        "setup.py",
    ):
        assert name in names
    assert not [name for name in names if "test" in name]


def test_a_wheel_in_an_empty_environment_without_a_compiler(dist, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    nothing = {"PATH": str(venv / "bin"), "CC": "false", "PYTHONPATH": ""}
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install"),
        *("--quiet", "--no-deps", "--no-index", wheel),
        cwd=tmp_path,
        **nothing,
    )
    # The packages it needs are not downloaded again. Folders that a .pth file
    # names have no effect by .pth files of theirs, so the installation that
    # is tested otherwise stays out.
    library = next((venv / "lib").glob("python3*/site-packages"))
    (library / "others.pth").write_text(SITE_PACKAGES + "\n")
    script = tmp_path / "check_install.py"
    shutil.copy(ROOT / "tools" / script.name, script)
    output = run(
        python,
        script,
        cwd=tmp_path,
        KERAS_BACKEND=keras.config.backend(),
        KERAS_RANDADAPT_NATIVE="1",
        **nothing,
    )
    assert output.count(str(library / "keras_randadapt")) == 2, output


def test_nothing_is_built_without_a_compiler(tmp_path):
    path = checkout(tmp_path)
    output = make_dist(path, expected=None, CC="false")
    assert "_native" in output
    assert not list(path.glob("dist/*.whl"))


def test_a_wheel_without_the_compiled_transforms_is_refused(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    without = tmp_path / wheel.name
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(without, "w") as target,
    ):
        for name in source.namelist():
            if not name.endswith(".so"):
                target.writestr(name, source.read(name))
    output = run(
        *(sys.executable, ROOT / "tools" / "check_dist.py", without),
        cwd=tmp_path,
        expected=1,
    )
    assert "the compiled keras_randadapt/ops/_native is missing" in output


def test_an_installation_without_a_compiler_goes_on(tmp_path):
    path = checkout(tmp_path)
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index"),
        *("--no-deps", "--no-build-isolation", "--target", path / "installed"),
        path,
        cwd=path,
        CC="false",
    )
    installed = path / "installed" / "keras_randadapt"
    assert (installed / "__init__.py").exists()
    assert not list(installed.glob("ops/_native*"))
