"""A run's plots and page: drawn from whatever files are there, with the numbers they hold."""

import json
import re

import numpy as np
import pytest
from report_helpers import (
    assert_drawn,
    assert_no_leftovers,
    assert_self_contained,
    make_predictions,
    make_split,
)

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import write_bytes
from rtl_dist.core.text import duration
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.report.evaluation import PICTURES, write_evaluation
from rtl_dist.report.figure import plain
from rtl_dist.report.history import read_history
from rtl_dist.report.html import Page
from rtl_dist.report.lr_finder import draw_range_test, read_range_test
from rtl_dist.report.plots import (
    _label_levels,
    _thin,
    accuracy_figure,
    learning_rate_figure,
    loss_figure,
    throughput_figure,
)
from rtl_dist.report.rates import distinct_rates, falling_stages
from rtl_dist.report.run import draw_run
from rtl_dist.report.summary import headline

PLOTS = ("loss.png", "accuracy.png", "learning_rate.png", "throughput.png")

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def make_rows(multi=False, epochs=(3, 5), steps_per_epoch=8):
    """Rows as training logs them: one a step, with validation at the end of each epoch."""
    rng = np.random.default_rng(1)
    name = "micro_f1" if multi else "top1"
    rows, step = [], 0
    for stage, (label, length) in enumerate(zip(("head", "finetune"), epochs, strict=True)):
        for i in range(length * steps_per_epoch):
            step += 1
            epoch = step / steps_per_epoch
            loss = 1.8 * np.exp(-epoch / 3) + 0.15 + rng.normal() * 0.04
            row = {
                "step": step,
                "epoch": epoch,
                "stage": label,
                "elapsed_s": 0.9 * step,
                "train/loss": loss,
                f"train/{name}": 1 - 0.4 * loss,
                "lr/head": 1e-3 * (1 - i / (length * steps_per_epoch)),
                "speed/images_per_second": 800 - 300 * stage + rng.normal() * 15,
                "speed/data_wait": 0.05 + 0.01 * rng.random(),
            }
            if stage:
                row |= {f"lr/layer{n}": 1e-4 * 0.75 ** (4 - n) * i / 40 for n in (1, 2, 3, 4)}
            if step % steps_per_epoch == 0:
                value = 0.92 - 0.7 * np.exp(-epoch / 2.2)
                row |= {"val/loss": loss + 0.1, f"val/{name}": value, "val/macro_f1": value}
                row[f"gap/{name}"] = row[f"train/{name}"] - value
                if multi:
                    row["val/map"] = value + 0.05
            rows.append(row)
    return rows


def make_range_test(run, name, content=None):
    """``lr_finder/<name>.json`` as a range test leaves it, or other content."""
    rng = np.random.default_rng(2)
    rates = np.geomspace(1e-6, 1.0, 80)
    losses = 2.3 - 1.5 / (1 + (2e-3 / rates)) + (3 * rates) ** 2 + rng.normal(0, 0.05, 80)
    whole = {
        "stage": name,
        "holds_up_to": 0.0123,
        "rates": rates.tolist(),
        "losses": losses.tolist(),
    }
    path = run / "lr_finder" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole if content is None else content))
    return path


def make_run(folder, rows, results=True):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 0\nmodel: {name: resnet50} # <i>\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.11", "world_size": 2}))
    if results:
        evaluated = [r for r in rows if "val/loss" in r][-1]
        (folder / "results.json").write_text(
            json.dumps(
                {
                    "status": "done",
                    "best": {"step": evaluated["step"], "epoch": evaluated["epoch"],
                             "stage": evaluated["stage"], "metric": "val/top1", "value": 0.9},
                    "test": {"top1": 0.87654, "loss": 0.4321, "num_samples": 500},
                    "samples_seen": 123456,
                    "frozen_ok": True,
                    "weights_sha256": "ab" * 32,
                    "dataset_fingerprint": "cd" * 32,
                }
            )
        )  # fmt: skip
    return folder


def test_a_run_is_drawn_whole(tmp_path):
    rows = make_rows()
    run = make_run(tmp_path / "quickstart", rows)
    assert draw_run(run) == run / "report.html"
    for name in PLOTS:
        assert_drawn(run / "plots" / name)
    text = assert_self_contained(run / "report.html")
    for expected in (
        "quickstart",
        "87.65 %",
        "123,456",
        "finetune",
        "done",
        "cd" * 32,
        "&lt;i&gt;",
    ):
        assert expected in text
    best = max(r["val/top1"] for r in rows if "val/top1" in r)
    assert f"{100 * best:.2f} %" in text
    assert_no_leftovers(run)


def test_the_stage_table_has_each_stages_figures(tmp_path):
    rows = make_rows()
    head, finetune = read_history(make_run(tmp_path, rows)).stages
    assert (head.name, head.start, head.end, head.steps) == ("head", 0.0, 3.0, 24)
    assert (finetune.name, finetune.start, finetune.end, finetune.steps) == (
        "finetune",
        3.0,
        8.0,
        40,
    )
    assert head.seconds == pytest.approx(0.9 * 24)
    assert finetune.seconds == pytest.approx(0.9 * 40)
    assert finetune.final == rows[-1]["val/top1"]
    assert finetune.final_loss == rows[-1]["val/loss"]
    assert finetune.gap == pytest.approx(rows[-1]["gap/top1"])
    assert head.best == rows[23]["val/top1"]
    assert head.best_epoch == 3.0


def test_the_final_evaluation_is_part_of_the_runs_page(tmp_path):
    run = make_run(tmp_path / "run", make_rows())
    predictions = make_predictions(40, ("a", "b", "c"))
    metrics = compute_metrics(predictions)
    split = make_split(tmp_path / "data", 40)
    write_evaluation(
        predictions, run / "evaluation" / "test", split=split, metrics=metrics, title="test"
    )
    text = assert_self_contained(draw_run(run))
    assert "Evaluation on test" in text
    assert text.count("data:image/png;base64,") == len(PLOTS) + len(PICTURES)
    assert f"{metrics['macro_f1']:.4f}" in text


def test_a_running_multi_label_run_with_a_half_written_line(tmp_path):
    rows = make_rows(multi=True)
    run = make_run(tmp_path, rows, results=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 65, "epoch": 8.1, "train/lo')
    (run / "environment.json").unlink()
    text = assert_self_contained(draw_run(run))
    assert "running" in text
    assert "mean average precision" in text
    best = max(row.get("val/map", 0) for row in rows)
    assert f"{100 * best:.2f} %" in text
    assert f"{100 * rows[-1]['gap/micro_f1']:+.2f}" in text
    assert "could not be read" not in text
    assert read_history(run).rows[-1]["step"] == 64


def test_damaged_lines_and_losses_that_are_not_numbers_are_told(tmp_path):
    rows = make_rows()
    rows[10]["train/loss"] = float("nan")
    run = make_run(tmp_path, rows)
    lines = (run / "metrics.jsonl").read_text().split("\n")
    lines[4] = lines[4][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text = draw_run(run).read_text(encoding="utf-8")
    assert "could not be read: 5" in text
    assert "first at step 11" in text


def test_steps_not_taken_and_smaller_microbatches_are_told(tmp_path):
    rows = make_rows()
    run = make_run(tmp_path, rows)
    text = draw_run(run).read_text(encoding="utf-8")
    assert "not taken" not in text
    assert "smaller" not in text
    results = json.loads((run / "results.json").read_text())
    halvings = [{"from_step": 7, "micro": 2}, {"from_step": 9, "micro": 1}]
    results |= {"skipped_steps": 3, "microbatch_halvings": halvings}
    (run / "results.json").write_text(json.dumps(results))
    text = draw_run(run).read_text(encoding="utf-8")
    assert "3 steps were not taken" in text
    assert "2 from step 7, 1 from step 9." in text
    (run / "results.json").unlink()  # still running
    rows[-1]["train/skipped_steps"] = 1
    assert "1 step was not taken" in draw_run(make_run(tmp_path, rows, results=False)).read_text()
    (run / "results.json").write_text(json.dumps({"microbatch_halvings": [1, {}], "x": 2}))
    assert_self_contained(draw_run(run))


@pytest.mark.parametrize("content", [
    [], {}, {"stage": "x", "holds_up_to": 0.1}, {"stage": "x", "holds_up_to": 0.1, "rates": [1, 2], "losses": [1]},
    {"stage": "x", "holds_up_to": 0.1, "rates": [1.0], "losses": [float("nan")]},
    {"stage": "x", "holds_up_to": 0.1, "rates": [0.0], "losses": [1.0]},
    {"stage": "x", "holds_up_to": 0.1, "rates": 1, "losses": 2},
])  # fmt: skip
def test_a_range_test_that_does_not_say_what_it_should_is_damaged(tmp_path, content):
    assert read_range_test(make_range_test(tmp_path, "x", content)) is None


@pytest.mark.parametrize("points", [[], [(1e-6, 2.0)], [(1e-6, 2.0), (1e-5, 1e12)]])
def test_a_range_test_that_ended_at_once_still_draws(tmp_path, points):
    rates, losses = [rate for rate, _ in points], [loss for _, loss in points]
    content = {
        "stage": "x",
        "holds_up_to": 1e-6 if points else None,
        "rates": rates,
        "losses": losses,
    }
    test = read_range_test(make_range_test(tmp_path, "x", content))
    assert test.holds_up_to == content["holds_up_to"]
    assert_drawn(draw_range_test(test, tmp_path))


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    rows = make_rows()
    again = [row | {"elapsed_s": row["elapsed_s"] + 500} for row in rows[19:]]
    history = read_history(make_run(tmp_path, rows[:30] + again))
    assert [row["step"] for row in history.rows] == [row["step"] for row in rows]
    assert history.rows[25]["elapsed_s"] > 500


@pytest.mark.parametrize("row", [
    {"step": 1, "epoch": 0.1, "stage": "head", "elapsed_s": 2.0, "train/loss": 2.3},
    {"step": 9, "epoch": 1.0, "stage": "head", "elapsed_s": 2.0, "val/top1": 0.5, "val/loss": 1.0},
    {"step": 0, "epoch": 0.0},
])  # fmt: skip
def test_a_single_row_still_draws(tmp_path, row):
    run = make_run(tmp_path, [row], results=False)
    assert_self_contained(draw_run(run))
    for name in PLOTS:
        assert_drawn(run / "plots" / name)


def test_missing_and_empty_metrics_are_the_users_to_cure(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing.*run\.dir"):
        draw_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ep')
    with pytest.raises(UserError, match="no whole row yet"):
        draw_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_drawing_twice_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path, make_rows())
    first = draw_run(run).read_bytes()
    assert draw_run(run).read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    write_bytes(target, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert_no_leftovers(tmp_path)


def test_small_pieces():
    assert [duration(s) for s in (3.2, 187, 7500)] == ["3 s", "3 min 07 s", "2 h 05 min"]
    assert plain("_a\n$b$", 9) == r" _a \$b\$"
    assert plain("x" * 50, 5) == "xxxx…"
    x, y = _thin(np.arange(10_001.0), np.ones(10_001))
    assert len(x) == 1500
    assert (y == 1).all()
    assert (np.diff(x) > 0).all()
    assert _label_levels([0.0, 0.01, 0.5], [8, 8, 8]) == [1, 0, 0]
    page = Page("<&>")
    page.table(("a", "b"), [(None, 0.123456), ("<x>", 2)])
    assert "&lt;&amp;&gt;" in page.render()
    assert "0.1235" in page.render()
    assert "<x>" not in page.render()


def test_a_columns_figures_stand_below_each_other_and_have_its_name():
    """On a phone there is no header."""
    page = Page("t")
    page.table(("F1", "time"), [(0.9, "9 s"), (0.12345, "1 min 14 s"), (None, "1 h 05 min")])
    cells = re.findall(r'<td class=number data-name="(\w+)">([^<]*)<', page.render())
    assert [text for name, text in cells if name == "F1"] == ["0.9000", "0.1235", "–"]
    assert [text for name, text in cells if name == "time"] == ["9 s", "1 min 14 s", "1 h 05 min"]


def test_plots_are_turned_dark_and_photographs_are_not():
    page = Page("t")
    page.picture(b"", "a plot")
    page.picture(b"", "a photograph", is_photo=True)
    text = page.render()
    assert '<img class=plot alt="a plot"' in text
    assert '<img class=photo alt="a photograph"' in text


def test_five_classes_have_no_top_five():
    known = {"top1": 0.5, "top5": 1.0, "num_samples": 9}
    assert [name for _, name, _ in headline(known | {"num_classes": 5})] == ["top-1 accuracy"]
    assert len(headline(known | {"num_classes": 6})) == 2
    assert len(headline(known)) == 2  # of an older evaluation


def test_groups_with_equal_rates_share_a_curve_that_breaks_between_stages(tmp_path):
    rows = [row | {"lr/stem": row["lr/head"]} for row in make_rows()]
    history = read_history(make_run(tmp_path, rows))
    labels = [label for label, _, _ in distinct_rates(history, ())]
    assert labels[:2] == ["head and 1 more", "layer1"]
    epochs, rates = lines_of(learning_rate_figure(history))["head and 1 more"].get_data()
    assert np.isnan(rates).sum() == 1
    assert epochs[np.flatnonzero(np.isnan(rates))[0]] > 3.0


STAGES = "data: {path: d}\nstages: [{name: a, steps: 4, lr: 1}, {name: b, steps: 4, lr: 1}]\n"


@pytest.mark.parametrize(
    ("optim", "falling"),
    [
        ("{schedule: plateau}", {"a", "b"}),
        ("{schedule: step, step_size: 1}", {"a", "b"}),
        ("{}", ()),
    ],
)
def test_the_rate_falls_at_the_row_before_where_the_schedule_has_it_fall(tmp_path, optim, falling):
    """A line from row to row would show a rate that no step had."""
    (tmp_path / "config.yaml").write_text(f"{STAGES}optim: {optim}\n")
    assert falling_stages(tmp_path) == set(falling)
    values = [("a", 0.5), ("a", 1.0), ("a", 1.0), ("a", 0.1), ("b", 0.05), ("b", 0.005)]
    rows = [
        {"step": 2 * n, "epoch": n / 2, "stage": stage, "lr/head": rate}
        for n, (stage, rate) in enumerate(values, start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    history = read_history(tmp_path)
    (line,) = learning_rate_figure(history, falling_stages(tmp_path)).axes[0].get_lines()[:1]
    x, y = (np.asarray(values)[~np.isnan(line.get_ydata())].tolist() for values in line.get_data())
    if falling:
        assert x == [0.5, 1.0, 1.5, 1.5, 2.0, 2.5, 2.5, 3.0]
        assert y == [0.5, 1.0, 1.0, 0.1, 0.1, 0.05, 0.005, 0.005]
    else:
        assert (x, y) == ([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [rate for _, rate in values])


def test_no_stage_falls_where_no_config_says_so(tmp_path):
    assert falling_stages(tmp_path) == set()


def lines_of(figure):
    """The curves by what the legend calls them; those it leaves out by matplotlib's own names."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def pieces_of(line):
    """The epochs of each piece of a line that is drawn unbroken."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    pieces = np.split(x, np.flatnonzero(np.isnan(y)))
    return [piece[0 if number == 0 else 1 :].tolist() for number, piece in enumerate(pieces)]


@pytest.mark.parametrize("draw", [loss_figure, lambda history: accuracy_figure(history, None)])
def test_training_lines_break_between_stages(tmp_path, draw):
    lines = lines_of(draw(read_history(make_run(tmp_path, make_rows()))))
    assert pieces_of(lines["training"]) == [[1, 2, 3], [4, 5, 6, 7, 8]]
    head, finetune = pieces_of(lines["training, in between"])
    assert (head[0], head[-1]) == (1 / 8, 3 - 1 / 8)
    assert (finetune[0], finetune[-1]) == (3 + 1 / 8, 8 - 1 / 8)
    assert not np.isnan(lines["validation"].get_ydata()).any()


def test_a_long_run_is_thinned_within_its_stages(tmp_path):
    rows = make_rows(epochs=(3, 6), steps_per_epoch=401)
    for row in rows:
        row["train/loss"] = 1.0 if row["stage"] == "head" else 3.0
    line = lines_of(loss_figure(read_history(make_run(tmp_path, rows))))["training, in between"]
    values = np.asarray(line.get_ydata())
    assert len(values) < 1600
    assert set(values[~np.isnan(values)]) == {1.0, 3.0}
    assert len(pieces_of(line)) == 2


def test_a_stage_of_one_evaluation_is_a_dot(tmp_path):
    lines = lines_of(loss_figure(read_history(make_run(tmp_path, make_rows(epochs=(1, 5))))))
    assert pieces_of(lines["training"]) == [[1], [2, 3, 4, 5, 6]]
    assert lines["training"].get_marker() == "."
    assert lines["training"].get_markevery() == [True] + 6 * [False]


@pytest.mark.parametrize("points", [0, 1, 2])
def test_the_legend_is_silent_about_fewer_than_two_points(tmp_path, points):
    rows = make_rows()
    between = [row["step"] for row in rows if "val/loss" not in row][:points]
    kept = [row for row in rows if "val/loss" in row or row["step"] in between]
    axes = loss_figure(read_history(make_run(tmp_path, kept))).axes[0]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert ("training, in between" in shown) == (points == 2)
    assert {"training", "validation"} <= set(shown)


SOLVED = {"stage": "solved", "train/loss": 0.5, "train/top1": 0.99, "val/loss": 0.4,
          "val/top1": 0.95, "gap/top1": 0.04, "elapsed_s": 4.0}  # fmt: skip


def test_a_solved_head_is_a_point_of_its_own(tmp_path):
    """Though it has the epoch and the step at which the stage before it ended."""
    rows = make_rows()
    after = 1 + next(n for n, row in enumerate(rows) if row["step"] == 24)
    run = make_run(tmp_path, [*rows[:after], SOLVED | {"step": 24, "epoch": 3.0}, *rows[after:]])
    best = {"step": 24, "epoch": 3.0, "stage": "solved", "metric": "val/top1", "value": 0.95}
    (run / "results.json").write_text(json.dumps({"status": "done", "best": best}))
    history = read_history(run)
    assert [(stage.name, stage.steps) for stage in history.stages] == [
        ("head", 24),
        ("solved", 0),
        ("finetune", 40),
    ]
    for draw in (loss_figure, lambda history: accuracy_figure(history, None)):
        line = lines_of(draw(history))["training"]
        assert pieces_of(line) == [[1, 2, 3], [3], [4, 5, 6, 7, 8]]
    assert len(pieces_of(lines_of(learning_rate_figure(history))["head"])) == 2
    text = draw_run(run).read_text()
    assert "<b>95.00 %</b>best validation" in text
    assert "stage solved, epoch 3" in text
    assert "solved takes no steps" in text


def test_a_run_of_a_solved_head_alone_is_drawn_whole(tmp_path):
    run = make_run(tmp_path, [SOLVED | {"step": 0, "epoch": 0.0}])
    assert "solved takes no steps" in draw_run(run).read_text()
    for name in PLOTS:
        assert_drawn(run / "plots" / name)
    history = read_history(run)
    for draw in (learning_rate_figure, throughput_figure):
        figure = draw(history)
        assert figure.axes[0].get_xlim() == (-0.01, 1.02)
        assert figure.axes[0].texts[0].get_text() == "no steps were taken"


def test_of_equal_metrics_the_lower_loss_is_best(tmp_path):
    rows = make_rows()
    found = {1.0: (0.5, 0.9), 2.0: (0.7, 0.8), 3.0: (0.7, 0.6), 4.0: (0.8, 0.5), 5.0: (0.8, 0.4),
             6.0: (0.8, 0.4), 7.0: (0.8, 0.6), 8.0: (0.6, 0.1)}  # fmt: skip
    for row in rows:
        if row["epoch"] in found:
            row["val/top1"], row["val/loss"] = found[row["epoch"]]
    history = read_history(make_run(tmp_path, rows))
    assert [(s.best_epoch, s.best) for s in history.stages] == [(3.0, 0.7), (5.0, 0.8)]
    assert history.best() == (5.0, 0.8)
