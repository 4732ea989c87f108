import pytest
import text_data

pytestmark = pytest.mark.one_backend


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_csv_with_number_labels(tmp_path):
    path = write(
        tmp_path / "a.csv", 'label,text\n10,"so, so"\n2,clichés\n10,fine\n'
    )
    examples, names = text_data.read_csv(path)
    assert examples == [("so, so", 1), ("clichés", 0), ("fine", 1)]
    assert names == ["2", "10"]


def test_csv_with_named_columns_and_word_labels(tmp_path):
    path = write(tmp_path / "a.csv", "review,mood\ngreat,good\npoor,bad\n")
    examples, names = text_data.read_csv(path, "review", "mood")
    assert examples == [("great", 1), ("poor", 0)]
    assert names == ["bad", "good"]


def test_csv_finds_a_sentence_column(tmp_path):
    path = write(tmp_path / "a.csv", "sentence,label\na,0\nb,1\n")
    assert text_data.read_csv(path)[0] == [("a", 0), ("b", 1)]


def test_csv_of_a_spreadsheet(tmp_path):
    """Which puts a byte order mark before the first column's name."""
    path = tmp_path / "x.csv"
    path.write_text("text,label\nbad,0\ngood,1\n", encoding="utf-8-sig")
    examples, _ = text_data.read_csv(path)
    assert examples == [("bad", 0), ("good", 1)]


def test_csv_without_the_column_lists_what_there_is(tmp_path):
    path = write(tmp_path / "a.csv", "review,label\na,0\nb,1\n")
    with pytest.raises(ValueError, match=r"\['review', 'label'\].*text_col"):
        text_data.read_csv(path)
    with pytest.raises(ValueError, match="no column 'mood'.*`label_column`"):
        text_data.read_csv(path, "review", "mood")


def test_csv_needs_two_labels(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,0\nb,0\n")
    with pytest.raises(ValueError, match=r"two labels.*\['0'\]"):
        text_data.read_csv(path)


EXAMPLES = [(f"text {i}", i % 3 == 0) for i in range(200)]


def test_split_is_disjoint_and_balanced():
    split = text_data.few_shot_split(EXAMPLES, train=20, validation=30)
    assert [len(part) for part in split] == [20, 30, 30]
    assert sum(label for _, label in split.train) == 10
    texts = [text for part in split for text, _ in part]
    assert len(set(texts)) == len(texts)
    assert set(texts) <= {text for text, _ in EXAMPLES}


def test_split_does_not_depend_on_the_order_or_on_duplicates():
    split = text_data.few_shot_split(EXAMPLES, 20, 30)
    again = text_data.few_shot_split(EXAMPLES[::-1] + EXAMPLES[:5], 20, 30)
    assert split == again


def test_split_depends_on_the_seed():
    split = text_data.few_shot_split(EXAMPLES, 20, 30)
    assert split != text_data.few_shot_split(EXAMPLES, 20, 30, seed=1)


def test_the_size_of_one_part_leaves_the_others():
    split = text_data.few_shot_split(EXAMPLES, 20, 30)
    fewer = text_data.few_shot_split(EXAMPLES, 10, 30)
    assert fewer.validation == split.validation
    assert fewer.tuning == split.tuning
    fewer = text_data.few_shot_split(EXAMPLES, 20, 10)
    assert fewer.validation == split.validation[:10]
    assert fewer.train == split.train


GOLDEN_VALIDATION = ["text 153", "text 28"]
GOLDEN_TRAIN = ["text 156", "text 141", "text 76", "text 139"]


def test_split_is_the_same_everywhere():
    # Golden: a change here changes every number that the examples report.
    split = text_data.few_shot_split(EXAMPLES, 4, 2)
    assert [text for text, _ in split.validation] == GOLDEN_VALIDATION
    assert [text for text, _ in split.train] == GOLDEN_TRAIN


@pytest.mark.parametrize("train, validation", [(180, 10), (20, 100), (1, 10)])
def test_split_of_too_few_examples(train, validation):
    with pytest.raises(ValueError, match="Ask for other numbers"):
        text_data.few_shot_split(EXAMPLES, train, validation)
