import guesthouses
import meanings
import pytest

pytestmark = pytest.mark.one_backend


def write(path, content):
    path.write_text(content, encoding="utf-8-sig")
    return path


def test_attributes_of_a_meaning():
    assert meanings.attributes(
        "name[Bell and Feather], customer rating[5 out of 5],near[a, b]"
    ) == {
        "name": "Bell and Feather",
        "customer rating": "5 out of 5",
        "near": "a, b",
    }


@pytest.mark.parametrize("meaning", ["", "name", "name[a] b", "name[a], [b]"])
def test_other_meanings_are_refused(meaning):
    with pytest.raises(ValueError, match="should look like"):
        meanings.attributes(meaning)


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", 'ref,mr\n"A, a",name[é]\nB,name[b]\n')
    assert meanings.read_csv(path) == [("name[é]", "A, a"), ("name[b]", "B")]
    write(path, "mr,text\nname[a],A\n")
    with pytest.raises(ValueError, match=r"'ref'.*\['mr', 'text'\]"):
        meanings.read_csv(path)
    write(path, "mr,ref\na sentence,A\n")
    with pytest.raises(ValueError, match="Received: 'a sentence'"):
        meanings.read_csv(path)


ROWS = [(f"name[{i // 2}]", f"text {i}") for i in range(40)]


def test_no_meaning_is_trained_and_held_out():
    split = meanings.split(ROWS, train=20, held_out=5)
    assert len(split.train) == 20 and len(split.held_out) == 5
    assert not set(split.held_out) & {meaning for meaning, _ in split.train}
    assert set(split.train) <= set(ROWS)
    for meaning, texts in split.held_out.items():
        assert texts == [text for one, text in ROWS if one == meaning]


def test_seeds_and_the_order_of_rows():
    split = meanings.split(ROWS, 20, 5)
    assert meanings.split(ROWS[::-1], 20, 5).train == split.train
    other = meanings.split(ROWS, 20, 5, seed=1)
    assert other.held_out == split.held_out
    assert other.train != split.train
    assert meanings.split(ROWS, 10, 5).train == split.train[:10]


@pytest.mark.parametrize("train, held_out", [(31, 5), (0, 21)])
def test_too_few_rows(train, held_out):
    with pytest.raises(ValueError, match="40 rows of 20 meanings"):
        meanings.split(ROWS, train, held_out)


def test_the_sample_is_what_its_program_writes(monkeypatch, tmp_path):
    rows = meanings.read_csv(guesthouses.FILE)
    assert rows == guesthouses.generate()
    written = guesthouses.FILE.read_bytes()
    monkeypatch.setattr(guesthouses, "FILE", tmp_path / "again.csv")
    guesthouses.main()
    assert guesthouses.FILE.read_bytes() == written


def test_texts_say_what_they_are_asked_to_say():
    import text_scores

    rows = guesthouses.generate(seed=1, meanings=300, texts=2)
    assert len(set(rows)) == 600
    assert len({meaning for meaning, _ in rows}) == 300
    for meaning, text in rows:
        assert text_scores.mentioned(text, meaning) == 1.0, (meaning, text)
        for name in ("dogs", "breakfast"):
            asked = meanings.attributes(meaning).get(name)
            said = (
                name.rstrip("s") in text
                or name == "breakfast"
                and any(word in text for word in ("morning", "day starts"))
            )
            assert (asked is None) <= (not said), (meaning, text)
            if asked == "no":
                words = ("not", "no breakfast", "own breakfast", "at home")
                assert any(word in text for word in words), (meaning, text)
