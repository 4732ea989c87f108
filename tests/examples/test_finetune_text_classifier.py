import finetune_text_classifier as example
import pytest


def test_quick_decides_what_is_not_given():
    arguments = example.parse_arguments(["--quick"])
    assert (arguments.epochs, arguments.validation_examples) == (8, 400)
    arguments = example.parse_arguments(["--quick", "--epochs", "3"])
    assert (arguments.epochs, arguments.validation_examples) == (3, 400)
    arguments = example.parse_arguments([])
    assert (arguments.epochs, arguments.validation_examples) == (20, 1000)


@pytest.mark.parametrize(
    "backend, second",
    [("jax", "tensorflow"), ("tensorflow", "jax"), ("torch", "tensorflow")],
)
def test_second_backend_is_another_one(backend, second):
    arguments = example.parse_arguments(["--backend", backend])
    assert arguments.second_backend == second


def test_stages_keep_their_times(capsys):
    stages = example.Stages()
    stages.begin("first")
    stages.begin("second")
    stages.end()
    assert list(stages.seconds) == ["first", "second"]
    assert "== first" in capsys.readouterr().out


def test_data_from_a_csv_file(tmp_path, capsys):
    path = tmp_path / "a.csv"
    rows = "".join(
        f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(60)
    )
    path.write_text("text,label\n" + rows)
    arguments = example.parse_arguments(
        ["--data", str(path), "--train-examples", "8"]
        + ["--validation-examples", "10"]
    )
    split, label_names = example.load_data(arguments)
    assert label_names == ["bad", "good"]
    assert [len(part) for part in split] == [8, 10, 10]
    assert "60 examples: 8 to train on, 10" in capsys.readouterr().out
