"""The experiments that settle claims: power, resumption, verdicts, designs."""

import csv
import dataclasses
import json
import math
import re

import keras
import keras_hub
import numpy as np
import pytest
from scipy import stats

import keras_randadapt as kra
from benchmarks.claims import __main__ as command_line
from benchmarks.claims import designs
from benchmarks.claims import few_shot
from benchmarks.claims import head
from benchmarks.claims import information
from benchmarks.claims import power
from benchmarks.claims import runs
from benchmarks.claims import teachers
from benchmarks.claims import training
from benchmarks.claims import verdicts

# The harness is the same on every backend, and JAX trains fastest.
pytestmark = pytest.mark.one_backend("jax")


@pytest.mark.parametrize(
    ("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)]
)
def test_pairs_needed_is_that_of_tables(effect, pairs):
    """G*Power's numbers for two-sided paired t-tests at 5 % and 80 %."""
    assert power.pairs_needed(effect, 1.0) == pairs
    assert power.pairs_needed(-effect * 3, 3.0) == pairs


def test_power_is_the_share_of_tests_that_see_a_difference():
    generator = np.random.default_rng(0)
    samples = generator.normal(0.9, 1.5, size=(20_000, 12))
    seen = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.01
    expected = power.power_of_pairs(0.9, 1.5, 12, alpha=0.01)
    assert abs(seen.mean() - expected) < 0.015
    # The chance of a false alarm is alpha.
    assert power.power_of_pairs(1e-9, 1, 12, 0.03) == pytest.approx(0.03)


def test_power_of_a_ratio_is_that_of_the_f_test():
    generator = np.random.default_rng(1)
    ours = generator.normal(size=(20_000, 20)).var(axis=1, ddof=1)
    theirs = 4 * generator.normal(size=(20_000, 20)).var(axis=1, ddof=1)
    low, high = stats.f.ppf([0.025, 0.975], 19, 19)
    seen = (ours / theirs < low) | (ours / theirs > high)
    assert abs(seen.mean() - power.power_of_ratio(0.5, 20)) < 0.015
    assert power.ratio_pairs_needed(0.5) == 19


def test_bad_differences():
    with pytest.raises(ValueError, match="difference=0"):
        power.pairs_needed(0, 1)
    with pytest.raises(ValueError, match="pairs would be needed"):
        power.pairs_needed(1e-6, 1)
    with pytest.raises(ValueError, match="as many of each"):
        power.mean_difference([1, 2], [1])
    with pytest.raises(ValueError, match="does not vary"):
        power.deviation_ratio([1, 1, 1], [1, 2, 4])


def test_interval_of_a_mean_is_that_of_the_t_test():
    generator = np.random.default_rng(2)
    ours, theirs = generator.normal(size=(2, 9))
    interval = power.mean_difference(ours, theirs, alpha=0.02)
    known = stats.ttest_rel(ours, theirs).confidence_interval(0.98)
    assert interval.pairs == 9
    assert (interval.low, interval.high) == pytest.approx(tuple(known))


def test_ends_of_a_ratio_are_where_the_test_refuses():
    """At an end, `x + c y` and `x - c y` correlate with a p-value of alpha."""
    generator = np.random.default_rng(3)
    theirs = generator.normal(size=15)
    ours = 0.4 * theirs + 0.3 * generator.normal(size=15)
    interval = power.deviation_ratio(ours, theirs, alpha=0.1)
    assert interval.low < interval.estimate < interval.high
    for end in (interval.low, interval.high):
        correlation = stats.pearsonr(ours + end * theirs, ours - end * theirs)
        assert correlation.pvalue == pytest.approx(0.1)


# A small design, whose runs are looked up.

SCORES = {0.1: 1.0, 1.0: 2.0, 10.0: 3.0, 100.0: 2.5, 0.01: 0.5}


def _design(tmp_path, **changes):
    design = designs.Design(
        name="small",
        prose={"title": "Small"},
        module="",
        figure="test",
        unit="points",
        factor=1.0,
        tolerance=0.01,
        pairs=4,
        search_seeds=(100, 101),
        widen={"rate": (1e-3, 1e3)},
        settings={"easy": {"size": 3}, "hard": {"size": 4}},
        methods={
            "a": designs.Method("a", {"adapter": "LoRA"}, {"rate": [0.1, 1.0]}),
            "b": designs.Method("b", {}, {}, settings=["hard"]),
        },
        comparisons=[
            designs.Comparison(
                "a beats b", "hard", "a", "b", claimed=1.0, pairs_needed=4
            )
        ],
        shown=[],
    )
    return dataclasses.replace(design, **changes)


class _Function:
    """Runs whose numbers are known, and that can be interrupted."""

    def __init__(self, stop_at=None, scores=SCORES):
        self.calls = []
        self._stop_at = stop_at
        self._scores = scores

    def __call__(self, *, seed, final, data, arguments):
        assert final == (seed < 100)
        if len(self.calls) == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append((seed, dict(arguments)))
        score = self._scores[arguments.get("rate", 1.0)]
        number = score + arguments["size"] + 0.1 * seed
        name = "test" if final else "held_out"
        return {name: np.float64(number), "curve": [seed], "rank": np.int64(3)}


def _run(design, path, function):
    results = runs.Results(path)
    runner = runs.Runner(design, results, function, report=lambda line: None)
    runner.all()
    return results


def _without_clock(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [{**r, "seconds": "", "date": ""} for r in csv.DictReader(file)]


def test_a_best_value_on_the_edge_widens_its_grid(tmp_path):
    design, function = _design(tmp_path), _Function()
    results = _run(design, tmp_path / "small.csv", function)
    searched = {a["rate"] for seed, a in function.calls if seed >= 100}
    assert searched == {0.1, 1.0, 10.0, 100.0}
    assert not verdicts.edges(design, results, "hard", "a")
    final = [c for c in function.calls if c[0] < 100 and "adapter" in c[1]]
    assert [seed for seed, _ in final] == 2 * [0, 1, 2, 3]
    assert {a["rate"] for _, a in final} == {10.0}


def test_limits_end_a_search_and_the_edge_is_named(tmp_path):
    design = _design(tmp_path, widen={"rate": (1e-3, 20.0)})
    results = _run(design, tmp_path / "small.csv", _Function())
    assert verdicts.edges(design, results, "easy", "a") == ["rate"]
    text = verdicts.verdict_table([(design, results)])
    assert "a: rate on the edge of the search" in text


def test_a_diverged_run_is_not_chosen(tmp_path):
    scores = {**SCORES, 1.0: math.nan}
    function = _Function(scores=scores)
    _run(_design(tmp_path), tmp_path / "small.csv", function)
    final = [a for seed, a in function.calls if seed < 100 and "rate" in a]
    assert {a["rate"] for a in final} == {0.1}


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_loses_one_row_at_most(tmp_path, torn):
    design = _design(tmp_path)
    whole = tmp_path / "whole.csv"
    everything = _Function()
    _run(design, whole, everything)
    path = tmp_path / "cut.csv"
    first = _Function(stop_at=9)
    with pytest.raises(KeyboardInterrupt):
        _run(design, path, first)
    assert len(runs.Results(path).rows) == 9
    if torn:
        path.write_bytes(path.read_bytes()[:-20])
        before = path.read_bytes()
        # A reader must not change what another process may be writing.
        assert len(runs.Results(path).rows) == 8
        assert path.read_bytes() == before
    second = _Function()
    _run(design, path, second)
    made = len(first.calls) + len(second.calls)
    assert made == len(everything.calls) + torn
    assert _without_clock(path) == _without_clock(whole)
    third = _Function()
    _run(design, path, third)
    assert not third.calls


@pytest.mark.parametrize("cut", [5, 60])
def test_a_file_cut_in_its_first_lines_is_taken_up(tmp_path, cut):
    path = tmp_path / "small.csv"
    results = _run(_design(tmp_path), path, _Function())
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    again = _run(_design(tmp_path), path, _Function())
    assert len(again.rows) == len(results.rows)
    assert path.read_bytes().startswith(content[: content.index(b"\n")])


def test_bad_columns(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("setting,method\n1,2\n")
    with pytest.raises(ValueError, match="--results"):
        runs.Results(path)


def test_a_row_names_the_code_that_made_it(tmp_path):
    path = tmp_path / "small.csv"
    row = _run(_design(tmp_path), path, _Function()).rows[0]
    assert re.fullmatch(r"unknown|[0-9a-f]{8} [0-9a-f]{8}\+?", row["code"])
    assert row["versions"].startswith(f"keras {keras.__version__}, ")


# Verdicts.


def _comparison(kind, claimed):
    return designs.Comparison("c", "s", "a", "b", kind=kind, claimed=claimed)


@pytest.mark.parametrize(
    ("kind", "claimed", "low", "high", "verdict"),
    [
        ("difference", 2.0, 0.1, 3.0, "reproduced"),
        ("difference", 2.0, 3.0, 4.0, "reproduced"),
        ("difference", 2.0, -0.1, 3.0, "open"),
        ("difference", 2.0, -3.0, 0.9, "refuted"),
        # It is there, but not half as large as the paper says.
        ("difference", 2.0, 0.1, 0.9, "refuted"),
        ("difference", 2.0, math.nan, math.nan, "open"),
        ("equality", 1.0, -0.9, 0.5, "reproduced"),
        ("equality", 1.0, -1.1, 0.5, "open"),
        ("equality", 1.0, -3.0, -1.1, "refuted"),
        ("equality", 1.0, 1.1, 3.0, "refuted"),
        ("deviation", 0.49, 0.3, 0.9, "reproduced"),
        ("deviation", 0.49, 0.3, 1.1, "open"),
        ("deviation", 0.49, 0.8, 0.95, "refuted"),
    ],
)
def test_rules(kind, claimed, low, high, verdict):
    interval = power.Interval((low + high) / 2, low, high, 10)
    one = _comparison(kind, claimed)
    assert verdicts.judge(one, interval, 10) == verdict
    # Fewer pairs than planned, or none.
    assert verdicts.judge(one, interval, 11) == "open"
    assert verdicts.judge(one, None, 10) == "open"


def _results_with(tmp_path, ours, theirs):
    results = runs.Results(tmp_path / "made.csv")
    for method, values in (("a", ours), ("b", theirs)):
        for seed, value in enumerate(values):
            arguments = {"size": 4} | ({"rate": 1.0} if method == "a" else {})
            results.add(
                {
                    **dict.fromkeys(runs.COLUMNS, "1"),
                    "setting": "hard",
                    "method": method,
                    "phase": runs.FINAL,
                    "seed": str(seed),
                    "arguments": json.dumps(arguments),
                    "numbers": json.dumps({"test": value}),
                }
            )
    return runs.Results(results.path)


def test_verdicts_on_made_up_runs(tmp_path):
    design = _design(tmp_path)
    theirs = [10.0, 12.0, 11.0, 14.0]
    results = _results_with(tmp_path, [11.0, 13.1, 12.1, 15.2], theirs)
    line = verdicts.verdict_table([(design, results)]).splitlines()[2]
    # Differences 1, 1.1, 1.1, 1.2: mean 1.1, deviation 0.0816, t = 3.182.
    assert line == (
        "| a beats b (hard) | +1 points | +1.1 (+0.97 to +1.23) | "
        "4 of 4 (needed 4) | **reproduced** |"
    )
    more = dataclasses.replace(design, pairs=5)
    assert "**open**" in verdicts.verdict_table([(more, results)])
    assert "12.85" in verdicts.tables_of(design, results)


def test_primary_comparisons_share_the_level(tmp_path):
    design = _design(tmp_path)
    results = _results_with(tmp_path, [1.0, 3.0, 2.0], [0.0, 1.0, 4.0])
    one = design.comparisons[0]
    two = dataclasses.replace(one, name="again")
    also = dataclasses.replace(one, name="also", primary=False)
    design = dataclasses.replace(design, comparisons=[one, two, also])
    assert design.alpha == 0.025
    wide = verdicts.interval_of(design, results, one)
    narrow = verdicts.interval_of(design, results, also)
    assert wide.low < narrow.low < narrow.high < wide.high
    known = stats.ttest_rel([1, 3, 2], [0, 1, 4]).confidence_interval(0.975)
    assert (wide.low, wide.high) == pytest.approx(tuple(known))


def test_rows_of_an_earlier_choice_do_not_count(tmp_path):
    design = _design(tmp_path)
    path = tmp_path / "small.csv"
    _run(dataclasses.replace(design, widen={"rate": (1, 1)}), path, _Function())
    results = _run(design, path, _Function())
    rows = verdicts.final_rows(design, results, "hard", "a")
    assert {json.loads(row["arguments"])["rate"] for row in rows} == {10.0}
    assert len(rows) == design.pairs


# Designs.


@pytest.mark.parametrize("name", designs.names())
def test_designs_are_complete(name):
    design = designs.load(name)
    primary = [one for one in design.comparisons if one.primary]
    assert primary and design.alpha == 0.05 / len(primary)
    for method in design.methods.values():
        if "adapter" in method.arguments:
            adapter = training.adapter_of(method.arguments, 0)
            assert isinstance(adapter, kra.adapters.Adapter)
    for one in primary:
        enough = one.pairs_needed <= design.pairs
        assert enough or "open" in design.prose["cost"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("claim = ", "claims = ", "lacks the sentences"),
        ("pairs_needed = 4", "pairs_needed = 3", "calculation gives 4"),
        ("first_search_seed = 1000", "first_search_seed = 3", "among the"),
        ("search_seeds = 3", "search_seeds = 1", "two seeds"),
        ("rate = [1e-4, 0.3]", "", "how far 'rate' may go"),
        ("grid = {rate = [3e-3, 1e-2", "grid = {rate = [1e-2, 3e-3", "order"),
        ("claimed = 0.148", "claimed = -0.148", "above 0"),
        ('theirs = "LoRA(4)"', 'theirs = "LoRA(5)"', "not run"),
        ('kind = "equality"', 'kind = "same"', "unknown"),
    ],
)
def test_bad_design(tmp_path, old, new, message):
    text = (designs.FOLDER / "rank.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "rank.toml").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ValueError, match=message):
        designs.load("rank", tmp_path)


def test_bad_name():
    with pytest.raises(ValueError, match="rm_lora"):
        designs.load("nothing")


def test_pages_say_what_the_results_say():
    """`python -m benchmarks.claims verdicts` writes them."""
    for path, content in verdicts.pages().items():
        assert path.read_text(encoding="utf-8") == content, path


# The experiments, cut down.


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(teachers, "EPOCHS", 4)
    monkeypatch.setattr(teachers, "TRAIN", 256)
    monkeypatch.setattr(information, "EPOCHS", 2)
    monkeypatch.setattr(information, "PRETRAINING", 640)
    monkeypatch.setattr(information, "TEST", 500)
    information.world.cache_clear()
    yield
    information.world.cache_clear()


def test_running_a_row_again_gives_its_figure(small, tmp_path, capsys):
    design = designs.load("rank")
    path = tmp_path / "rank.csv"
    runner = runs.Runner(design, runs.Results(path), report=lambda line: None)
    method = design.methods["LoRA(4)"]
    row = runner.run("rank 2", method, {"rate": 0.01}, 0, runs.FINAL)
    assert float(row["figure"]) > 0.1
    assert command_line.main(["rerun", str(path), "--row", "1"]) == 0
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(row["figure"], "9.75"), encoding="utf-8")
    assert command_line.main(["rerun", str(path), "--row", "1"]) == 1
    assert "it was 9.75" in capsys.readouterr().out
    assert command_line.main(["rerun", str(path), "--row", "2"]) == 2


@pytest.mark.slow("It trains at the experiments' own size.")
@pytest.mark.needs_optimizer
@pytest.mark.parametrize("name", ["pac_bayes", "rank"])
def test_a_committed_row_gives_its_figure(name, capsys):
    design = designs.load(name)
    results = runs.Results(design.results)
    rows = [row for row in results.rows if "adapter" in row["arguments"]]
    if not rows or rows[-1]["versions"] != runs.versions():
        pytest.skip(f"{name} has no rows of {runs.versions()}")
    number = results.rows.index(rows[-1]) + 1
    path = str(design.results)
    assert command_line.main(["rerun", path, "--row", str(number)]) == 0


def test_updates_have_the_rank_that_a_teacher_says():
    for rank, decay in ((3, 0.0), (5, 0.5)):
        delta = teachers.update(np.random.default_rng(0), rank, decay)
        values = np.linalg.svd(delta, compute_uv=False)
        assert np.sum(values > 1e-12) == rank
        expected = np.arange(1, rank + 1) ** -decay
        np.testing.assert_allclose(values[:rank] / values[0], expected)
        assert np.linalg.norm(delta) == pytest.approx(1)


def test_noise_changes_as_many_labels_as_it_says():
    labels = np.arange(100, dtype="int32") % 4
    for share in (0.0, 0.2, 0.4):
        noisy = information.with_noise(labels, share, seed=3)
        assert np.sum(noisy != labels) == 100 * share
        assert set(noisy) == {0, 1, 2, 3}


def _information(**more):
    arguments = {"examples": 40, "noise": 0.2, **more}
    return information.run(seed=0, final=True, data=None, arguments=arguments)


RLORA = {
    "adapter": "RLoRA",
    "options": {"rank": 64},
    "rate": 0.1,
    "head_rate": 1e-3,
}


def test_the_network_is_as_it_was_after_a_run(small):
    frozen = _information()
    trained = _information(**RLORA, patience=1)
    assert trained["train"] != frozen["train"]
    assert trained["epochs"] in (1, 2)
    assert _information() == frozen


def test_the_term_is_in_the_training(small):
    trained = _information(**RLORA)
    assert _information(**RLORA, strength=1.0)["test"] != trained["test"]


def test_few_examples_take_turns():
    labels = np.array([0] * 9 + [1] * 3 + [2] * 9)
    chosen = few_shot.few(labels, 4, seed=0)
    assert labels[chosen].tolist() == [0, 1, 2] * 3 + [0, 2]
    assert len(set(chosen)) == len(chosen)
    assert not np.array_equal(chosen, few_shot.few(labels, 4, seed=1))


def _write_questions(folder):
    words = ["card", "cash", "rate", "fee", "app", "top", "pin", "lost"]
    for part, count in (("train", 16), ("test", 4)):
        rows = [
            {"text": f"{words[c]} my {words[(c + i) % 8]} {i}", "label": c}
            for c in range(3)
            for i in range(count)
        ]
        path = folder / f"banking77_{part}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)


def test_rm_lora_on_a_head(small, tmp_path):
    _write_questions(tmp_path)
    x, y, test_x, test_y = head.features(str(tmp_path))
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms, math.sqrt(head.WORDS), rtol=1e-5)
    chosen = head.few(y, 4, seed=0)
    assert len(chosen) == 12 and np.bincount(y[chosen]).tolist() == [4, 4, 4]
    assert not set(chosen) & set(head.held_out_indices(y))
    numbers = head.run(
        seed=0,
        final=True,
        data=str(tmp_path),
        arguments={
            "rank": 2,
            "per_class": 4,
            "epochs": 3,
            "rate": 0.01,
            "orthogonality": 0.1,
            "update_share": 0.5,
        },
    )
    assert len(numbers["curves"]["test"]) == 3
    assert numbers["stopped"] in numbers["curves"]["test"]
    assert numbers["gap"] == numbers["train"] - numbers["test"]
    with pytest.raises(ValueError, match="--data"):
        head.features(None)


def _tiny_minilm(length):
    words = "card cash rate fee app top pin lost my 0 1 2 3 4 5 6 7".split()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=special + words)
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(special + words),
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=length,
        dropout=0.0,
    )
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=length
    )
    return backbone, preprocessor


# PyTorch compiles nothing, which is most of the time here.
@pytest.mark.one_backend("torch")
def test_cached_layers_give_what_the_whole_model_gives(
    small, tmp_path, monkeypatch
):
    _write_questions(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(few_shot.LENGTHS, "banking77", 8)
    monkeypatch.setattr(few_shot, "LAYERS", 2)
    backbone, preprocessor = _tiny_minilm(8)
    monkeypatch.setattr(
        few_shot, "_minilm", lambda length: (backbone, preprocessor)
    )
    few_shot.states_of.cache_clear()
    few_shot._upper.cache_clear()
    arguments = {
        "task": "banking77",
        "first": 1,
        "per_class": 4,
        "epochs": 1,
        "head_rate": 0.01,
        "adapter": "RLoRA",
        "options": {"rank": 8},
        "rate": 0.1,
    }
    folder = str(tmp_path)
    first, again = (
        few_shot.run(seed=0, final=True, data=folder, arguments=arguments)
        for _ in range(2)
    )
    assert first == again and 0 <= first["test"] <= 100

    (states, mask), _ = few_shot.states_of("banking77", 1, folder).test
    upper = few_shot._upper("banking77", 1, 3)
    outputs = upper.predict([states.astype("float32"), mask], verbose=0)
    texts, _ = few_shot.texts_of("banking77", folder).test
    tokens = few_shot.classifier.tokenize(preprocessor, texts)
    whole = backbone.predict(tokens, verbose=0)["sequence_output"]
    kept = tokens["padding_mask"][..., None].astype("float32")
    mean = (whole * kept).sum(axis=1) / kept.sum(axis=1)
    expected = mean @ np.asarray(upper.layers[-1].kernel)
    expected += np.asarray(upper.layers[-1].bias)
    # The states were rounded to 16 bits.
    np.testing.assert_allclose(outputs, expected, atol=0.01)
    few_shot.states_of.cache_clear()
    few_shot._upper.cache_clear()
    with pytest.raises(ValueError, match="--data"):
        few_shot.texts_of("sst2", None)
