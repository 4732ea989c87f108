"""`AdapterBank.save` and `load`: all tenants in one file."""

import json
import threading

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.adapters import configs
from keras_randadapt.model import file_format
from keras_randadapt.serving import bank_file
from keras_randadapt.serving import table as table_lib
from tests import adapter_files
from tests import zoo

X = zoo.normal(6, 6)
NAMES = ["alice", None, "bob", "bob", "carol", "alice"]


def _model(classes=3, dtype=None, seed=0):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, "tanh", name="query", dtype=dtype)(inputs)
    x = keras.layers.Dense(classes, name="logits", dtype=dtype)(x)
    return zoo.set_weights(keras.Model(inputs, x), seed)


def _tenants(folder, make=lambda: kra.LoRA(2), classes=(3, 2, 3)):
    for seed, (name, count) in enumerate(
        zip(("alice", "bob", "carol"), classes)
    ):
        model = _model(count)
        kra.inject(model, make(), "query", keep_trainable="logits")
        zoo.randomize(model, seed=seed, scale=1.0)
        kernel = model.get_layer("logits").kernel
        kernel.assign((1 + seed) * keras.ops.convert_to_tensor(kernel))
        kra.save_adapter(model, folder / f"{name}.safetensors")


@pytest.fixture
def path(tmp_path):
    """The file of a bank, of which `answers` are the answers."""
    folder = tmp_path / "files"
    folder.mkdir()
    _tenants(folder)
    with kra.serving.AdapterBank(_model(), folder) as bank:
        bank.save(tmp_path / "bank.safetensors")
        np.save(tmp_path / "answers.npy", bank.predict(X, NAMES))
    return tmp_path / "bank.safetensors"


def _answers(path):
    return np.load(path.parent / "answers.npy")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_bank_is_what_it_was(path, lazy):
    model = _model()
    with kra.serving.AdapterBank.load(path, model, lazy=lazy) as bank:
        assert bank.names == ["alice", "bob", "carol"]
        assert [bank.classes(name) for name in bank.names] == [3, 2, 3]
        np.testing.assert_array_equal(bank.predict(X, NAMES), _answers(path))
        bank.add("dora", path.parent / "files/alice.safetensors")
        found = bank.predict(X, ["dora"] * 6)
        np.testing.assert_array_equal(found, bank.predict(X, ["alice"] * 6))
        bank.remove("dora")
        # The same tenants make the same file.
        bank.save(path.parent / "again.safetensors")
    assert kra.sites(model) == {}
    again = (path.parent / "again.safetensors").read_bytes()
    assert again == path.read_bytes()


@pytest.mark.one_backend
class TestLazily:
    def test_a_tenant_is_read_when_it_is_asked_for(self, path):
        bank = kra.serving.AdapterBank.load(path, _model(), lazy=True)
        assert "read     0 tenants" in bank.status()
        bank.predict(X, ["alice", None] * 3)
        assert "read     1 tenants" in bank.status()
        # The place of a tenant that nobody read goes to another one.
        bank.remove("bob")
        bank.add("dora", path.parent / "files/alice.safetensors")
        np.testing.assert_array_equal(
            bank.predict(X, ["dora"] * 6), bank.predict(X, ["alice"] * 6)
        )
        assert "read     2 tenants" in bank.status()
        bank.close()

    def test_the_file_may_be_replaced(self, path):
        with kra.serving.AdapterBank.load(path, _model(), lazy=True) as bank:
            bank.save(path)
            np.testing.assert_array_equal(
                bank.predict(X, NAMES), _answers(path)
            )

    def test_a_damaged_tenant(self, path):
        _flip_byte_of_row(path, 1)
        with kra.serving.AdapterBank.load(path, _model(), lazy=True) as bank:
            found = bank.predict(X[:2], ["alice", "carol"])
            assert np.isfinite(found).all()
            for _ in range(2):
                with pytest.raises(ValueError, match="The tenant 'bob' of"):
                    bank.predict(X, NAMES)
            with pytest.raises(ValueError, match="The tenant 'bob' of"):
                bank.save(path)
            bank.remove("bob")
            bank.save(path)
        with kra.serving.AdapterBank.load(path, _model()) as bank:
            assert bank.names == ["alice", "carol"]

    def test_a_file_cut_short_meanwhile(self, path):
        with kra.serving.AdapterBank.load(path, _model(), lazy=True) as bank:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size - 6)
            bank.predict(X[:2], ["alice", "bob"])
            with pytest.raises(ValueError, match="The tenant 'carol' of"):
                bank.predict(X, NAMES)


def _content(path):
    """The start of the rows, and the metadata."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"][file_format.BANK_KEY])
    start = 8 + length + header["tenants"]["data_offsets"][0]
    return data, start, header, metadata


def _flip_byte_of_row(path, number):
    data, start, header, _ = _content(path)
    size = 4 * header["tenants"]["shape"][1]
    changed = bytearray(data)
    changed[start + number * size + 5] ^= 1
    path.write_bytes(bytes(changed))


def _edit(path, edit, digest=True, shape=None):
    """Rewrites a file whose metadata `edit` has changed."""
    data, _, header, metadata = _content(path)
    length = int.from_bytes(data[:8], "little")
    edit(metadata)
    if digest:
        start, stop = header["#base"]["data_offsets"]
        base = np.frombuffer(data[8 + length :][start:stop], "<f4")
        base = base.reshape(header["#base"]["shape"])
        metadata["digest"] = file_format.digest({"#base": base}, metadata)
    text = configs.canonical(metadata)
    header["__metadata__"] = {file_format.BANK_KEY: text}
    if shape:
        header["tenants"]["shape"] = shape
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def _swap(metadata):
    names = metadata["names"]
    names[0], names[2] = names[2], names[0]


def _layout(metadata):
    metadata["layout"][0][3] = [3, 4]


def _set(key, value):
    def edit(metadata):
        metadata[key] = value

    return edit


def _set_first(key, value):
    def edit(metadata):
        metadata["first"][key] = value

    return edit


@pytest.mark.one_backend
class TestWhatIsRefused:
    def _refused(self, path, match, model=None, **arguments):
        model = _model() if model is None else model
        before = zoo.snapshot(model)
        with pytest.raises(ValueError, match=match):
            kra.serving.AdapterBank.load(path, model, **arguments)
        assert zoo.snapshot(model).keys() == before.keys()
        assert kra.sites(model) == {}

    def test_damaged_rows(self, path):
        _flip_byte_of_row(path, 2)
        self._refused(path, "The tenant 'carol' of .* is damaged")

    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (_swap, "The tenant 'carol' of .* is damaged"),
            (_layout, "is damaged"),
            (_set("version", 2), "of version 2; this release"),
            (_set("names", ["alice", "bob"]), "a row of numbers for each"),
            (_set("names", ["a", "a", "b"]), "a list of distinct names"),
            (_set("names", ["a", "", "b"]), "a list of distinct names"),
            (_set("classes", [3, 2, True]), "a list of numbers"),
            (_set("classes", [3, 2, None]), "a head of None classes for 'car"),
            (_set("classes", [3, 2, 4]), "a head of 4 classes for 'carol'"),
            (_set("digests", ["0"] * 3), "a list of digests"),
            (_set("more", 3), "does not know"),
            (_set("first", 3), "must be an object"),
            (_set("first", {}), "a list of distinct strings"),
            (_set_first("kept", ["layers/nowhere"]), "lacks 1 of its"),
            (_set_first("kept", 3), "a list of distinct strings"),
            (_set_first("version", 9), "has format version 9"),
            (_set_first("adapter", {"class": "x"}), "can't be made here"),
        ],
    )
    def test_hostile_metadata(self, path, edit, match):
        _edit(path, edit)
        self._refused(path, match)

    def test_changed_metadata(self, path):
        _edit(path, _set("classes", [3, 3, 3]), digest=False)
        self._refused(path, "do not have the digest")

    def test_numbers_that_are_none(self, path):
        data, start, header, metadata = _content(path)
        size = header["tenants"]["shape"][1]
        rows = np.frombuffer(data[start:], "<f4").reshape(3, size).copy()
        rows[2, 0] = np.nan
        path.write_bytes(data[:start] + rows.tobytes())
        digest = bank_file._digest("carol", 3, rows[2])
        _edit(path, _set("digests", [*metadata["digests"][:2], digest]))
        self._refused(path, "'carol' of .* has NaN")

    @pytest.mark.parametrize("length", [0, 7, 100, -1])
    def test_cut_short(self, path, length):
        path.write_bytes(path.read_bytes()[:length])
        self._refused(path, "no bank file, or is damaged or cut short")

    def test_other_files(self, path):
        file = path.parent / "files/alice.safetensors"
        self._refused(file, "is the file of one adapter")
        with pytest.raises(ValueError, match="the file of a bank of many"):
            kra.load_adapter(_model(), path)
        with pytest.raises(FileNotFoundError, match="There is no file"):
            kra.serving.AdapterBank.load(path.parent / "none", _model())

    def test_other_models(self, path):
        self._refused(path, "on other base weights", _model(seed=1))
        self._refused(path, "layout is not", _model(classes=4))
        self._refused(path, "3 tenants. Received: capacity=2", capacity=2)
        model = _model()
        kra.inject(model, kra.LoRA(2), "query")
        with pytest.raises(ValueError, match="has adapters attached"):
            kra.serving.AdapterBank.load(path, model)

    def test_activations(self, path):
        """A head with an activation can't have classes that are absent."""
        model = _model()
        model.get_layer("logits").activation = keras.activations.softmax
        self._refused(path, "has a head of 2 classes", model)

    def test_no_tenant(self, tmp_path):
        with kra.serving.AdapterBank(_model()) as bank:
            with pytest.raises(ValueError, match="no tenant yet"):
                bank.save(tmp_path / "bank.safetensors")


@pytest.mark.one_backend
def test_absent_classes_in_another_dtype(path):
    """They have the lowest number of the dtype of the model that loads."""
    model = _model(dtype="float16")
    with kra.serving.AdapterBank.load(path, model) as bank:
        found = bank.predict(X, NAMES)
    lowest = np.finfo("float16").min
    assert found.dtype == "float16" and np.isfinite(found).all()
    np.testing.assert_array_equal(found[[2, 3], 2], lowest)


@pytest.mark.one_backend
def test_files_of_the_first_version(tmp_path):
    _tenants(tmp_path)
    for name in ("alice", "bob", "carol"):
        adapter_files.as_version_1(tmp_path / f"{name}.safetensors")
    with pytest.warns(kra.AdapterWarning, match="no fingerprint"):
        bank = kra.serving.AdapterBank(_model(), tmp_path)
    expected = bank.predict(X, NAMES)
    bank.save(tmp_path / "of_banks")
    with pytest.warns(kra.AdapterWarning, match="no fingerprint"):
        other = kra.serving.AdapterBank.load(tmp_path / "of_banks", _model())
    np.testing.assert_array_equal(other.predict(X, NAMES), expected)


@pytest.mark.one_backend
class TestAtomic:
    def test_a_file_is_never_half_written(self, path, monkeypatch):
        before = path.read_bytes()
        monkeypatch.setattr(bank_file, "_AT_ONCE", 1)
        rows, calls = table_lib.Kept.rows, []

        def failing(self, names):
            calls.append(names)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return rows(self, names)

        with kra.serving.AdapterBank.load(path, _model()) as bank:
            monkeypatch.setattr(table_lib.Kept, "rows", failing)
            with pytest.raises(KeyboardInterrupt):
                bank.save(path)
        assert path.read_bytes() == before
        names = {one.name for one in path.parent.iterdir()}
        assert names == {"bank.safetensors", "answers.npy", "files"}

    def test_rows_stay_while_they_are_kept(self, monkeypatch):
        monkeypatch.setattr(table_lib, "_SPARE", 0)
        table = table_lib.Table(2, np.zeros(3))
        for i, name in enumerate(("a", "b")):
            table.add(name, np.full(3, i + 1.0), None)
        adding = threading.Thread(
            target=table.add, args=("c", np.full(3, 9.0), None)
        )
        with table.kept() as kept:
            table.remove("b")
            # There is no place for it yet, so it waits.
            adding.start()
            adding.join(0.05)
            assert adding.is_alive() and "c" not in table
            assert kept.rows(["a", "b", ""])[:, 0].tolist() == [1, 2, 0]
        adding.join()
        with table.kept() as kept:
            assert kept.rows(["c"])[0, 0] == 9 and table.names == ["a", "c"]

    def test_places_are_free_when_the_requests_of_their_time_have_ended(
        self, monkeypatch
    ):
        """Others may go on: there need be no moment without a request."""
        monkeypatch.setattr(table_lib, "_SPARE", 0)
        table = table_lib.Table(1, np.zeros(3))
        table.add("a", np.ones(3), None)
        first = table.kept()
        first.__enter__()
        table.remove("a")
        with table.kept():
            first.__exit__(None, None, None)
            table.add("b", np.full(3, 2.0), None)
            assert table.names == ["b"]
