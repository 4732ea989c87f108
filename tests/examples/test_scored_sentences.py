import io
import subprocess
import tarfile

import pytest
import scored_sentences

pytestmark = pytest.mark.one_backend

CONTENT = (
    "1\t2.25\tA gorgeous, witty, seductive movie.\r\n"
    "2\t-0.6\tEffective but too tepid clichés\r\n"
    "3\t0.0\tA film.\r\n"
)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def distribution(tmp_path):
    """A source distribution like the real one, of three sentences."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in scored_sentences.CORPORA.values():
            member = f"{scored_sentences.FOLDER}/{name}"
            add(archive, member, CONTENT.encode())
    name = f"{scored_sentences.PACKAGE}-{scored_sentences.VERSION}"
    path = tmp_path / f"{name}.tar.gz"
    with tarfile.open(path, mode="w:gz") as archive:
        add(archive, f"{name}/{scored_sentences.ARCHIVE}", inner.getvalue())
    return path


def test_read_gives_sentences_and_labels(distribution):
    assert scored_sentences.read(distribution) == [
        ("A gorgeous, witty, seductive movie.", 1),
        ("Effective but too tepid clichés", 0),
        ("A film.", 0),
    ]


def test_corpora_and_the_margin(distribution):
    sentences = scored_sentences.read(distribution, "tweets", margin=0.7)
    assert sentences == [("A gorgeous, witty, seductive movie.", 1)]
    with pytest.raises(ValueError, match="films.*Received: corpus='books'"):
        scored_sentences.read(distribution, "books")


def test_parse_names_the_line_that_is_wrong():
    with pytest.raises(ValueError, match="Line 2 .* Received 1: 'oops'"):
        scored_sentences.parse("1\t0.5\tfine\noops\n")


def test_fetch_does_not_download_twice(distribution, monkeypatch, capsys):
    def run(*args, **kwargs):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", run)
    assert scored_sentences.fetch(distribution.parent) == distribution
    assert "(cached)" in capsys.readouterr().out


def test_fetch_puts_the_download_in_place(tmp_path, monkeypatch):
    def run(command, **kwargs):
        destination = command[command.index("--dest") + 1]
        requirements = command[command.index("-r") + 1]
        with open(requirements) as file:
            assert f"--hash=sha256:{scored_sentences.SHA256}" in file.read()
        with open(f"{destination}/vaderSentiment-3.3.2.tar.gz", "w") as file:
            file.write("content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    path = scored_sentences.fetch(tmp_path / "cache")
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]


def test_fetch_repeats_what_pip_said(tmp_path, monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="no network"):
        scored_sentences.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scored_sentences.cache_dir() == tmp_path / "keras_randadapt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scored_sentences.cache_dir() == tmp_path / ".cache/keras_randadapt"
