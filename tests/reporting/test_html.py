"""Whose words a page shows is not known: none of them is HTML."""

import json
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.reporting.gallery import Gallery, Query, Shown
from fashionclip_tune.reporting.html import answers
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_files import read_sweep
from tests.support.pages import SCRIPT, SECTIONS, Page
from tests.support.waiting_sweeps import make_waiting_sweep

START = {"label": "a", "architecture": "b", "image_size": 48, "context_length": 32, "weights": "c", "licence": "d"}
REFIT = {"times": 2, "examples_seen": 64, "metrics": {"recall_at_10": 0.4, "recall_at_5": 0.3, "protocol": "instance"}}
EXTRA = {"space": "a", "created": "b", "versions": {"torch": "c"}, "starts": {"tiny-clip": START}, "refit": REFIT}


def foreign(value: Any, kept: tuple[str, ...], name: str = "") -> Any:
    """With a script in place of every string, but for those of some names."""
    if isinstance(value, dict):
        return {key: foreign(each, kept, key) for key, each in value.items()}
    if isinstance(value, list):
        return [foreign(each, kept, name) for each in value]
    return SCRIPT if isinstance(value, str) and name not in kept else value


@pytest.mark.parametrize("kept", [(), ("state",), ("state", "trial_id"), ("state", "stop_reason")])
def test_no_string_of_a_sweep_is_html_in_its_page(tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = make_waiting_sweep(tmp_path / "finished")
    sweep = {**read_sweep(folder), **EXTRA}
    for row in sweep["trials"]:
        row.update({"untouched_recall_at_10": 0.9, "gain": -0.5, "relative_gain": -0.5})
    sweep["trials"].append({**sweep["trials"][-1], "state": "FAIL", "message": "e"})
    if "trial_id" not in kept:
        (folder / "trials" / SCRIPT).parent.mkdir()
        next(folder.glob("trials/0000-*")).rename(folder / "trials" / f"{SCRIPT}-tiny-clip")
    for path in folder.glob("trials/**/step_*.json"):
        path.write_text(json.dumps(foreign(json.loads(path.read_text()), kept)))
    (folder / "best").mkdir()
    (folder / "sweep.json").write_text(json.dumps(foreign(sweep, kept)))
    report = write_report([folder, folder], gallery=False)
    assert SCRIPT not in report.read_text()
    page = Page(report)
    assert page.headings.count("Ranking") == 2
    assert set(SECTIONS) <= set(page.headings)
    assert SCRIPT in page.text


def test_no_string_of_a_gallery_is_html() -> None:
    photo = Shown(b"", True, True)
    query = (Query(SCRIPT, photo, 1, (photo,)),)
    assert SCRIPT not in "".join(answers(Gallery(SCRIPT, 1, query, query, query)))
