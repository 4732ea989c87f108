"""What the path of an adapter file may be, and how a file is replaced."""

import os
import stat

import keras
import pytest
import safetensors.numpy

import keras_randadapt as kra
from tests import adapter_files
from tests import zoo

pytestmark = pytest.mark.one_backend


def _model():
    model, _, targets = zoo.dense()
    kra.inject(model, kra.LoRA(2), targets)
    return model


@pytest.mark.parametrize(
    "name", ["a.h5", "a.weights.h5", "a.KERAS", "a.npz", "a.pt", "a.json"]
)
def test_endings_of_other_formats_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="has the ending of another format"):
        kra.save_adapter(_model(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a.safetensors", "v1.2", ".hidden"])
def test_other_names_are_taken(name, tmp_path):
    kra.save_adapter(_model(), tmp_path / name)
    kra.load_adapter(_model(), os.fsencode(tmp_path / name))


@pytest.mark.parametrize("verb", [kra.save_adapter, kra.load_adapter])
@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("", ValueError, "must name a file"),
        ("a\0b", ValueError, "must name a file"),
        (b"", ValueError, "must name a file"),
        (7.5, TypeError, "must be a string or a path"),
        (None, TypeError, "must be a string or a path"),
    ],
    ids=repr,
)
def test_what_is_no_path(verb, path, error, match):
    with pytest.raises(error, match=match):
        verb(_model(), path)


def test_the_longest_name(tmp_path):
    path = tmp_path / ("a" * 255)
    kra.save_adapter(_model(), path)
    kra.load_adapter(_model(), path)
    with pytest.raises(OSError, match="too long"):
        kra.save_adapter(_model(), tmp_path / ("a" * 256))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="this system has no pipes"
)
def test_pipes_and_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match="no file can take its place"):
            kra.save_adapter(_model(), tmp_path / name)
    with pytest.raises(ValueError, match="is no regular file"):
        kra.load_adapter(_model(), tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a folder"):
        kra.load_adapter(_model(), tmp_path / "folder")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        kra.save_adapter(_model(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        kra.save_adapter(_model(), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        # The process's mask is what it was.
        assert os.umask(before) == 0o027


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "real.safetensors"
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    kra.save_adapter(_model(), link)
    assert link.is_symlink() and target.is_file()
    kra.load_adapter(_model(), link)
    assert list((tmp_path / "store").iterdir()) == [target]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        kra.save_adapter(_model(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def _edited(tmp_path, edit):
    """A file whose metadata was changed by a function."""
    path = tmp_path / "a.safetensors"
    kra.save_adapter(_model(), path)
    tensors, metadata = adapter_files.read(path)
    text = edit(metadata)
    if text:
        safetensors.numpy.save_file(tensors, path, {"keras_randadapt": text})
    else:
        adapter_files.edit(path, metadata)
    return path


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda m: m.update(more=1), "does not know: .*'more'"),
        (lambda m: m["model"].update(more=1), "does not know: .*'model.more'"),
        (lambda m: "[" * 5000 + "]" * 5000, "damaged"),
        (lambda m: m.update(version=True), "format version True|a number"),
    ],
)
def test_metadata_that_no_release_writes(edit, match, tmp_path):
    path = _edited(tmp_path, edit)
    model = _model()
    before = zoo.snapshot(model)
    with pytest.raises(ValueError, match=match):
        kra.load_adapter(model, path)
    assert before.keys() == zoo.snapshot(model).keys()


_CALLED = []


@keras.saving.register_keras_serializable(package="tests")
class Trap(keras.initializers.Zeros):
    """What a file must not be able to call."""

    def __init__(self, *arguments, **keywords):
        _CALLED.append(arguments)
        super().__init__()


@pytest.mark.parametrize("key", ["a_initializer", "regularizer"])
@pytest.mark.parametrize(
    "value",
    [
        "tests>Trap",
        {"class_name": "Trap", "registered_name": "tests>Trap", "config": {}},
        {
            "module": "keras.initializers",
            "class_name": "Zeros",
            "registered_name": "tests>Trap",
            "config": {},
        },
        {
            "module": "keras.initializers",
            "class_name": "Constant",
            "registered_name": None,
            "config": {
                "value": {
                    "class_name": "Trap",
                    "registered_name": "tests>Trap",
                    "config": {},
                }
            },
        },
        {"class_name": "deserialize", "config": {}},
    ],
    ids=["name", "config", "disguised", "nested", "function"],
)
def test_a_file_makes_keras_call_nothing_else(key, value, tmp_path):
    def edit(metadata):
        metadata["adapter"]["config"][key] = value

    path = _edited(tmp_path, edit)
    del _CALLED[:]
    model, _, _ = zoo.dense()
    with pytest.raises(ValueError, match="can't be made here"):
        kra.load_adapter(model, path)
    assert not _CALLED and kra.sites(model) == {}
