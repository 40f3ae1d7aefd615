"""The ranking in the forms that papers and spreadsheets take."""

import csv
import io
from pathlib import Path

from fashionclip_tune.reporting.tables import ranking_text
from tests.support.sweep_folders import change_sweep, write_sweep


def test_csv_has_the_figures_in_order_and_marks_ties(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one", [60, 150, 148])
    rows = list(csv.DictReader(io.StringIO(ranking_text([folder], "csv"))))
    assert [row["trial"] for row in rows] == ["0001", "0002", "0000"]
    assert [row["R@10"] for row in rows] == ["0.7500", "0.7400", "0.3000"]
    assert (rows[0]["low"], rows[0]["high"], rows[0]["gain"], rows[0]["gain %"]) == ("0.7000", "0.8200", "+0.5000", "+200.00%")
    assert [row["tie"] for row in rows] == ["", "tie", ""]
    assert {row["counted as"] for row in rows} == {"instance among 1,200 photos, 190 texts"}


def test_several_sweeps_have_a_column_for_their_names(tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / "a", [60]), write_sweep(tmp_path / "b|c", [70])]
    lines = ranking_text(folders, "markdown").splitlines()
    assert lines[0].startswith("| sweep | trial | model |")
    assert lines[2].startswith("| a | 0000 | tiny-clip |")
    assert lines[3].startswith("| b\\|c | 0000 | tiny-clip |")
    assert lines[0].endswith("| counted as |")
    assert lines[-1].startswith(
        "recall_at_10: instance among 1,200 photos, 190 texts; R@5: recall_at_5, mean of both directions; "
    )
    assert lines[-1].endswith("; low, high: 95 % interval over products; gain, gain %: over zero-shot")
    change_sweep(folders[1], data_fingerprint="train:bb")
    lines = ranking_text(folders, "markdown").splitlines()
    assert lines[3].endswith("| instance among 1,200 photos, 190 texts (photos bb) |")
    assert lines[-1].endswith("recalls are not comparable: best first within each only")


def test_latex_escapes_what_is_special_to_it(tmp_path: Path) -> None:
    text = ranking_text([write_sweep(tmp_path / "one", [150])], "latex")
    assert text.startswith("% recall_at_10: instance")
    assert r"\begin{tabular}{llllllllllll}" in text
    assert r"+0.5000 & +200.00\% &  \\" in text
