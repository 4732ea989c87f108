"""The quality benchmarks' search, resumption and statistics."""

import experiment
import pytest

pytestmark = pytest.mark.one_backend

SEARCH_SEEDS = (7, 8)


def _method(name, scores, calls, grid=None, **kwargs):
    """A method whose held-out score is looked up by its rate."""

    def train(seed, final, rate):
        assert final == (seed not in SEARCH_SEEDS)
        calls.append((name, seed, rate))
        return {"held_out": scores[rate], "test": rate + seed, "gap": 0.5}

    grid = {"rate": tuple(scores)} if grid is None else grid
    return experiment.Method(name, grid, train, **kwargs)


def _run(tmp_path, methods):
    results = experiment.Results(tmp_path / "runs.csv")
    return experiment.run_all(results, "task", methods, range(3), SEARCH_SEEDS)


def test_the_best_held_out_score_is_chosen(tmp_path):
    calls = []
    scores = {0.1: 0.5, 0.2: 0.9, 0.3: 0.7}
    outcome = _run(tmp_path, [_method("a", scores, calls)])
    chosen, runs = outcome["a"]
    assert chosen == {"rate": 0.2}
    assert [run["test"] for run in runs] == [0.2, 1.2, 2.2]
    searched = [call for call in calls if call[1] in SEARCH_SEEDS]
    assert len(searched) == 6 and len(calls) == 9


def test_a_choice_is_inherited(tmp_path):
    calls = []
    scores = {0.1: 0.5, 0.2: 0.9}
    second = _method("b", scores, calls, like="a")
    outcome = _run(tmp_path, [_method("a", scores, calls), second])
    assert outcome["b"][0] == {"rate": 0.2}
    assert [call for call in calls if call[0] == "b"] == [
        ("b", seed, 0.2) for seed in range(3)
    ]


def test_choices_of_another_setting_are_taken(tmp_path):
    calls = []
    methods = [_method("a", {0.1: 0.5, 0.2: 0.9}, calls)]
    outcome = experiment.run_all(
        experiment.Results(tmp_path / "runs.csv"),
        "fewer examples",
        methods,
        range(3),
        SEARCH_SEEDS,
        choices={"a": {"rate": 0.1}},
    )
    assert outcome["a"][0] == {"rate": 0.1}
    assert calls == [("a", seed, 0.1) for seed in range(3)]


def test_runs_that_were_made_are_not_made_again(tmp_path):
    calls = []
    methods = [_method("a", {0.1: 0.5, 0.2: 0.9}, calls)]
    first = _run(tmp_path, methods)
    count = len(calls)
    assert _run(tmp_path, methods) == first
    assert len(calls) == count
    # Another setting is another run.
    results = experiment.Results(tmp_path / "runs.csv")
    experiment.run_all(results, "other", methods, range(3), SEARCH_SEEDS)
    assert len(calls) == 2 * count


def test_paired_difference():
    # Differences 1, 2, 3: mean 2, deviation 1, t = 4.303 for 2 degrees.
    text = experiment.paired_difference([2, 4, 6], [1, 2, 3], ".2f")
    assert text == "+2.00 (-0.48 to +4.48)"
    assert experiment.paired_difference([2], [1]) == "+1.0"
    with pytest.raises(ValueError):
        experiment.paired_difference([1, 2], [1])


def test_table():
    outcome = {
        "zero shot": ({}, [{"test": 0.5}] * 3),
        "a": (
            {"rate": 0.01},
            [{"test": v, "gap": 0.1} for v in (0.6, 0.7, 0.8)],
        ),
    }
    columns = {"test": ("test, %", ".1f", 100), "gap": ("gap", ".1f", 1)}
    lines = experiment.table(outcome, columns, "a", "test").splitlines()
    assert lines[0] == (
        "| method | chosen | test, % | gap | minus a (95 % interval) |"
    )
    assert lines[2] == "| zero shot | - | 50.0 | - | -20.0 (-44.8 to +4.8) |"
    assert lines[3] == "| a | rate 0.01 | 70.0 ± 10.0 | 0.1 | - |"


def test_publish(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Title\n\ntext\n")
    experiment.publish(page, "a", "first")
    experiment.publish(page, "b", "second")
    experiment.publish(page, "a", "again\n\nin two")
    assert page.read_text() == (
        "# Title\n\ntext\n\n"
        "<!-- a -->\n\nagain\n\nin two\n\n<!-- end of a -->\n\n"
        "<!-- b -->\n\nsecond\n\n<!-- end of b -->\n"
    )
