"""The page about a sweep: read as HTML, and opened in a browser where there is one."""

import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.encode import EncodingSpeed
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import export_openclip
from fashionclip_tune.reporting import sections as report_sections
from fashionclip_tune.reporting.costs import pareto_front
from fashionclip_tune.reporting.gallery import make_gallery
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_view import read_trials, view_sweep
from fashionclip_tune.storage.folder import RemoteFolder, piece_name
from tests.support.pages import SECTIONS, Page
from tests.support.sweep_folders import change_sweep, write_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(small_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the small sweep, beside nothing that it could load."""
    return Path(shutil.move(write_report([small_sweep]), tmp_path_factory.mktemp("page") / "report.html"))


def test_the_page_has_every_section_and_loads_nothing(report: Path) -> None:
    page = Page(report)
    assert page.headings == [*SECTIONS, "Failures", "What the winner finds"]
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert report.stat().st_size < 8e6


def test_the_ranking_has_the_figures_of_sweep_json(report: Path, small_sweep: Path) -> None:
    rows = json.loads((small_sweep / "sweep.json").read_text())["trials"]
    scored = sorted((row for row in rows if row["state"] != "FAIL"), key=lambda row: (-row["recall_at_10"], row["trial_id"]))
    shown = [cells for cells in Page(report).rows if len(cells) == 12][1:]
    assert [cells[1] for cells in shown] == [row["trial_id"] for row in scored]
    assert [cells[5] for cells in shown] == [f"{row['recall_at_10']:.4f}" for row in scored]
    assert [cells[6] for cells in shown] == [f"{r['recall_at_10_low']:.4f} to {r['recall_at_10_high']:.4f}" for r in scored]
    assert shown[0][8] == "best"
    tests = view_sweep(small_sweep).tests
    assert [cells[8] for cells in shown[1:]] == [
        "tie" if test is not None and test.is_tie else "real" for test in (tests[row["trial_id"]] for row in scored[1:])
    ]
    recalls = [cells for cells in Page(report).rows if "instance" in cells]
    assert len(recalls) == 2 * len(scored)
    assert {cells[8] for cells in recalls} == {"20 photos", "20 texts"}


def test_what_failed_stands_there_with_its_reason_as_text(report: Path) -> None:
    assert [
        cell for number, cell in enumerate(next(row for row in Page(report).rows if row[:1] == ["0004"])) if number in (0, 2, 4)
    ] == ["0004", "bad data", "no photo left <at all> to train on"]


def test_the_gallery_shows_the_photo_asked_for_in_a_frame_of_its_own(report: Path) -> None:
    queries = report.read_text().split('<div class="query">')[1:]
    assert len(queries) >= 6
    for query in queries:
        kinds = re.findall(r'<figure class="(\w+)">', query)
        assert kinds[0] == "photo", "what was asked for stands in front"
        rank = int(re.search(r"rank (\d+)", query).group(1))
        if "photo" in kinds[1:]:
            assert kinds[1:].index("photo") + 1 <= 10
        else:
            assert rank >= 10
        jpegs = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", query)]
        assert len(jpegs) == 11
        assert all(jpeg.startswith(b"\xff\xd8\xff") and len(jpeg) < 10_000 for jpeg in jpegs)


def test_rungs_importances_and_trials_come_from_the_journal_which_is_left_alone(small_sweep: Path, tmp_path: Path) -> None:
    journal = small_sweep / "study.journal"
    before = (journal.stat().st_mtime_ns, journal.read_bytes())
    view = view_sweep(small_sweep)
    assert view.rungs == [32]
    assert view.importance is not None
    assert set(view.importance.shares) >= {"clip_model", "loss_function", "learning_rate", "augment_images"}
    assert sum(view.importance.shares.values()) == pytest.approx(1)
    assert (view.importance.examples_seen, view.importance.num_trials) == (32, 4)
    assert (journal.stat().st_mtime_ns, journal.read_bytes()) == before
    assert not list(small_sweep.glob("study.journal.*"))
    torn = tmp_path / "study.journal"
    torn.write_bytes(before[1][:-7])
    assert len(read_trials(torn)) == 5
    assert read_trials(tmp_path / "nothing.journal") == []


def test_a_sweep_without_a_trial_or_weights_or_study_still_has_a_page(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "sweep.json").write_text(json.dumps({"name": "empty", "state": "RUNNING", "best": None, "trials": []}))
    page = Page(write_report([empty]))
    assert page.headings == [*SECTIONS, "What the winner finds"]
    assert "No trial has ended with a result yet" in page.text
    ranks_only = write_sweep(tmp_path / "ranks", [150, 148, 60])
    text = Page(write_report([ranks_only])).text
    assert "Not shown: " in text
    assert "has no such" not in text
    assert "1 tie" in text


def test_the_durable_side_of_a_sweep_has_the_same_page(small_sweep: Path, tmp_path: Path) -> None:
    """As a drive has it: the journal in pieces, of the weights those of the winner only."""
    local, durable = view_sweep(small_sweep), tmp_path / "small"
    shutil.copytree(small_sweep, durable, ignore=shutil.ignore_patterns("checkpoints", "study.journal"))
    journal, offset = (small_sweep / "study.journal").read_bytes(), 0
    for line in journal.splitlines(keepends=True):
        RemoteFolder(durable).put(piece_name(offset, "000001-host", line), line)
        offset += len(line)
    expected = make_gallery(small_sweep, local.best)
    with pytest.raises(UserError, match="is no model"):
        make_gallery(durable, local.best)
    (trial,) = small_sweep.glob(f"trials/{local.best['trial_id']}-*")
    export_openclip(named_model(str(trial), ProjectConfig()).loaded, durable / "best")
    view = view_sweep(durable)
    assert (view.rungs, view.importance) == (local.rungs, local.importance)
    assert make_gallery(durable, view.best) == expected

    page = Page(write_report([durable])).rows
    shutil.copytree(small_sweep, tmp_path / "local" / "small")
    shutil.copytree(durable / "best", tmp_path / "local" / "small" / "best")
    assert page == Page(write_report([tmp_path / "local" / "small"])).rows, "sizes of weights, too"


def test_torn_evaluations_are_left_out_of_the_page_and_named(small_sweep: Path, tmp_path: Path, logged: Sequence[str]) -> None:
    """As a drive may have them after the loss of a machine."""
    folder = shutil.copytree(small_sweep, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = view_sweep(folder)
    (torn,) = folder.glob("trials/0002-*/evaluations/step_00000006.json")
    torn.write_bytes(torn.read_bytes()[:100])
    page = Page(write_report([folder]))
    name = torn.relative_to(folder)
    assert logged[0] == f"small: left out, as torn files: {name}"
    assert logged[0] in page.text
    view = view_sweep(folder)
    assert view.curves == {**whole.curves, "0002": whole.curves["0002"][:-1]}
    recalls = [cells for cells in page.rows if cells[:1] == ["0002"] and "text to image" in cells]
    assert recalls[0][3:6] == ["", "", ""], "not those of the evaluation before"
    assert f"{view.rows[0]['recall_at_10']:.4f}" in page.text


def test_a_report_that_has_less_than_the_one_before_says_what(small_sweep: Path, tmp_path: Path, logged: Sequence[str]) -> None:
    folder = shutil.copytree(small_sweep, tmp_path / "small")
    write_report([folder])
    assert logged == []
    (folder / "study.journal").unlink()
    write_report([folder], gallery=False)
    assert logged == [
        "the report.html that was there had the study of small, the winner's photos of small; this one has not "
        "(small: left out by --no-gallery)"
    ]
    write_report([folder], gallery=False)
    assert len(logged) == 1, "it has as much as that one"
    (folder / "report.html").write_bytes(b"\xff of another program")
    write_report([folder], gallery=False)
    assert len(logged) == 1


def test_a_running_sweep_is_not_disturbed_by_a_gallery(small_sweep: Path, tmp_path: Path) -> None:
    running = tmp_path / "running"
    shutil.copytree(small_sweep, running, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((running / "sweep.json").read_text())
    content["state"] = "RUNNING"
    content["trials"][2] |= {"state": "RUNNING", "stop_reason": None}
    content["trials"][3] |= {"state": "RUNNING", "stop_reason": None, "examples_seen": 0, "recall_at_10": None}
    (running / "sweep.json").write_text(json.dumps(content))
    page = Page(write_report([running]))
    assert "the sweep is running" in page.text
    assert "running: 3 of 5 trials ended" in page.text


def test_quality_stands_against_time_encoding_speed_and_size(report: Path, small_sweep: Path) -> None:
    panels = report.read_text().split('<div class="panels">')[1].split("</section>")[0]
    titles = re.findall(r'"xaxis":\{"gridcolor":"#\w+","zeroline":false,"automargin":true,"title":\{"text":"([^"]+)"', panels)
    assert titles == ["device time, min", "photos encoded a second", "captions encoded a second", "weights file, MB"]
    view = view_sweep(small_sweep)
    for field in EncodingSpeed._fields:
        model = view.rows[0]["config"]["clip_model"]
        own = [row["trial_id"] for row in view.rows if row["config"]["clip_model"] == model]
        speeds = [each[field] for trial_id in own for each in view.curves[trial_id] if field in each]
        assert view.encoding_speed(model, field) == median(speeds)


def test_sweeps_stand_side_by_side_with_the_test_between_their_best(tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / name, right) for name, right in (("ahead", [150]), ("close", [149]), ("weak", [60]))]
    page = Page(write_report(folders))
    behind = {row[0]: row[6] for row in page.rows if len(row) == 8}
    assert behind == {"sweep": "behind", "ahead": "", "close": "0.0050, tie", "weak": "0.4500, real"}
    assert not (folders[1] / "report.html").exists()
    assert "not comparable" not in page.text

    change_sweep(folders[0], data_fingerprint="train:others")
    page = Page(write_report(folders))
    behind = [(row[0], row[6]) for row in page.rows if len(row) == 8 and row[0] != "sweep"]
    assert behind == [("ahead", ""), ("close", ""), ("weak", "0.4450, real")], "the first of its own photos"
    assert "recalls are not comparable" in page.text


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.7), (3.0, 0.6), (4.0, 0.7)]
    assert pareto_front(points) == [(1.0, 0.5), (3.0, 0.7)]
    assert pareto_front(points, more_is_better=True) == [(4.0, 0.7)]


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "sweeps/compare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_compare_writes_the_page_and_prints_the_table(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one", [150, 148, 60])
    torn = folder / "trials" / "0000-tiny-clip-contrastive" / "evaluations" / "step_00000010.json"
    torn.parent.mkdir()
    torn.write_text('{"step": 1')
    done = compare(folder)
    assert done.returncode == 0, done.stderr
    assert f"one: left out, as torn files: {torn.relative_to(folder)}" in done.stdout
    assert "best: trial 0000" in done.stdout
    assert f"report: {folder / 'report.html'}" in done.stdout
    assert (folder / "report.html").is_file()


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


def opened(page: Path, tmp_path: Path) -> tuple[str, list[str], set[str]]:
    """The page as the browser made it, what its console said, and which addresses it asked the network for."""
    net_log = tmp_path / "net.json"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-unsafe-swiftshader",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run", "--virtual-time-budget=10000", "--dump-dom"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net_log}"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [browser(), *flags, page.as_uri()], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # The software renderer's remarks on its own speed are no fault of the page.
    console = [line for line in console if "GL Driver Message" not in line]
    events = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    # What the browser asks for on its own account has no origin.
    of_pages = [each for each in events if each.get("initiator", "not an origin") != "not an origin"]
    asked = {each["url"] for each in of_pages if each["url"].startswith(("http", "ws"))}
    return done.stdout, console, asked


def test_a_browser_opens_the_page_without_an_error_or_a_request(report: Path, tmp_path: Path) -> None:
    dom, console, asked = opened(report, tmp_path)
    assert console == []
    assert asked == set()
    assert dom.count('class="main-svg"') >= 10, "plotly has drawn"
    assert "parcoords" in dom


def test_the_browser_would_tell_of_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/photo.jpg"><script>throw new Error("broken")</script>')
    _, console, asked = opened(page, tmp_path)
    assert any("broken" in line for line in console)
    assert asked == {"http://127.0.0.1:9/photo.jpg"}


def test_the_freed_disk_is_said(small_sweep: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_sweep, tmp_path / "small")
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**content, "freed_bytes": 2_000_000}))
    assert "freed 2 MB" in "".join(report_sections.budget(view_sweep(folder)))


def test_without_javascript_it_is_said_where_the_figures_are_and_they_are_there(report: Path, small_sweep: Path) -> None:
    html, view = report.read_text(), view_sweep(small_sweep)
    body = html.split("<body>")[1]
    said = re.findall(r"<noscript><p class=\"note\">(.*?)</p></noscript>", body)
    # Curves, importances, settings, budget; the four of the costs have one in common.
    assert len(re.findall(r'class="plotly-graph-div"', body)) == 4 + 4
    assert [text.split(" JavaScript.")[0] for text in said] == [*["This plot needs"] * 4, "These plots need"]
    assert view.importance is not None
    for name, share in view.importance.shares.items():
        assert f"{name} {share:.0%}" in said[1]
    assert f"{view.budget_examples:,} examples" in said[3]
    rows = Page(report).rows
    with open(small_sweep / "trials.csv") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(view.content["trials"], table, strict=True):
        assert {name: str(row["config"][name]) for name in row["config"]} == {name: line[name] for name in row["config"]}
        assert line["device_s"] == str(row["device_s"])
    (header,) = (cells for cells in rows if cells[:2] == ["model", "best Recall@10"])
    assert header[2:] == ["photos encoded a second", "captions encoded a second", "weights file, MB"]
    models = {row["config"]["clip_model"] for row in view.rows}
    shown = {cells[0]: cells[2:] for cells in rows[rows.index(header) + 1 :][: len(models)]}
    assert shown.keys() == models
    for model, cells in shown.items():
        assert cells[:2] == [f"{view.encoding_speed(model, field):,.4g}" for field in EncodingSpeed._fields]
