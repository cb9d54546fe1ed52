"""``rtl-dist report``: a page is drawn again, or it is said why not."""

import json

from report_helpers import assert_self_contained

from rtl_dist.cli import main


def test_a_page_is_drawn_from_the_rows_alone(tmp_path, capsys):
    row = {"step": 8, "epoch": 1.0, "stage": "head", "elapsed_s": 2.0, "train/loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"drew {tmp_path / 'report.html'}\n"
    assert_self_contained(tmp_path / "report.html")


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
