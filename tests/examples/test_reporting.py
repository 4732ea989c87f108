import pytest
import reporting
import training

pytestmark = pytest.mark.one_backend


def test_table_aligns_columns():
    table = reporting.format_table(
        ("method", "count"), [("RLoRA", "9"), ("LoRA", "10,752")]
    )
    assert table.splitlines() == [
        "method   count",
        "------  ------",
        "RLoRA        9",
        "LoRA    10,752",
    ]


def test_bytes_for_people():
    assert reporting.format_bytes(512) == "512 B"
    assert reporting.format_bytes(18_240) == "18.2 kB"
    assert reporting.format_bytes(1_819_864) == "1.8 MB"


def runs():
    measured = dict(loss=[0.7, 0.6], seconds=[9.0, 2.0])
    return [
        training.Run("RLoRA", 10_752, 770, 0, 50_000, [0.6, 0.75], **measured),
        training.Run(
            "LoRA", 445_440, 770, 4_608, 1_819_864, [0.6, 0.7], **measured
        ),
    ]


def test_table_of_runs_gives_the_last_accuracy():
    table = reporting.table(runs())
    row = table.splitlines()[2].split()
    assert row == "RLoRA 75.0% 10,752 0 770 50.0 kB 2.0".split()


def test_plot_writes_a_png(tmp_path):
    path = tmp_path / "curves.png"
    reporting.plot(runs(), "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_first_epoch_is_left_out_of_the_time():
    run = training.Run("a", 1, 1, seconds=[90.0, 3.0, 2.0, 4.0])
    assert run.seconds_per_epoch == 3.0
    run.seconds = [90.0]
    assert run.seconds_per_epoch == 90.0
