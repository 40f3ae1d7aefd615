"""What TensorBoard shows of a sweep, asked of TensorBoard itself over HTTP."""

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.training.history import read_history
from fashionclip_tune.tuning.persistence.hparams import columns, write_hparams

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask(small_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """TensorBoard on the trials of a sweep; what it answers to a request."""
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        small_sweep / "trials",
        "--port",
        "0",
        "--load_fast",
        "false",
    ]
    with open(log, "w") as output:
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

        def request(path: str, body: dict[str, Any] | None = None, **arguments: Any) -> Any:
            url = f"{found.group()}{path}?{urllib.parse.urlencode(arguments)}"
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
                content = answer.read()
                return json.loads(content) if "json" in answer.headers["Content-Type"] else content

        while len(request("data/runs")) < 4:  # it reads the files after it has begun to answer
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield request
    finally:
        server.terminate()
        server.wait()


def rows_of(sweep_dir: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads((sweep_dir / "sweep.json").read_text())["trials"] if row["recall_at_10"] is not None]


def test_runs_are_called_by_number_model_and_loss(ask: Ask, small_sweep: Path) -> None:
    expected = [f"{r['trial_id']}-{r['config']['clip_model']}-{r['config']['loss_function']}" for r in rows_of(small_sweep)]
    assert ask("data/runs") == expected


def test_curves_are_those_of_the_files(ask: Ask, small_sweep: Path) -> None:
    for folder in (small_sweep / "trials").iterdir():
        expected = [(each["examples_seen"], pytest.approx(each["recall_at_10"], abs=1e-6)) for each in read_history(folder)]
        points = ask("data/plugin/scalars/scalars", tag="recall_at_10", run=folder.name)
        assert [(step, value) for _, step, value in points] == expected
        tags = ask("data/plugin/scalars/tags")[folder.name]
        explaining = ("loss", "learning_rate", "logit_scale", "samples_per_second", "images_encoded_per_second", "memory_gb")
        assert {f"train/{name}" for name in explaining} <= set(tags)
        memory = ask("data/plugin/scalars/scalars", tag="train/memory_gb", run=folder.name)
        assert all(0.05 < value < 64 for _, _, value in memory)


def test_pictures_of_the_same_captions_at_every_stage(ask: Ask, small_sweep: Path) -> None:
    for folder in (small_sweep / "trials").iterdir():
        found = ask("data/plugin/images/images", tag="answers", run=folder.name, sample=0)
        assert [each["step"] for each in found] == [row["examples_seen"] for row in read_history(folder)]
        jpeg = ask("data/plugin/images/individualImage?" + found[-1]["query"])
        assert jpeg.startswith(b"\xff\xd8\xff")
        assert len(jpeg) < 100_000


def test_hparams_has_a_column_for_every_setting_in_every_trial(ask: Ask, small_sweep: Path) -> None:
    rows = rows_of(small_sweep)
    settings = {name for row in rows for name in row["config"]}
    assert "augmentation.image_strength" in settings, "a setting that not all trials have"
    experiment = ask("data/plugin/hparams/experiment", body={"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} == settings
    assert [info["name"]["tag"] for info in experiment["metricInfos"]] == ["recall_at_10"]
    wanted = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN"], "colParams": [], "startIndex": 0}
    groups = ask("data/plugin/hparams/session_groups", body={**wanted, "sliceSize": 10})["sessionGroups"]
    by_id = {group["name"]: group for group in groups}
    assert set(by_id) == {row["trial_id"] for row in rows}
    for row in rows:
        group = by_id[row["trial_id"]]
        assert set(group["hparams"]) == settings
        assert group["hparams"]["training.learning_rate"] == row["config"]["training.learning_rate"]
        strength = row["config"].get("augmentation.image_strength")
        assert group["hparams"]["augmentation.image_strength"] == ("none" if strength is None else f"{strength:.6g}")
        (metric,) = group["metricValues"]
        assert metric["value"] == pytest.approx(row["recall_at_10"], abs=1e-6)


def test_a_trial_is_added_to_hparams_once(tmp_path: Path) -> None:
    row = {"trial_id": "0003", "state": "COMPLETE", "duration_s": 2.0, "config": {"training.learning_rate": 1e-3}}
    for _ in range(2):
        write_hparams(tmp_path, row, {"training.learning_rate": True}, DEFAULT_METRIC)
    assert len(list(tmp_path.glob("*.hparams"))) == 1


def test_columns_are_numbers_only_where_every_draw_has_one() -> None:
    drawn = [{"rate": 0.1, "model": "a", "strength": 0.5, "on": True}, {"rate": 1, "model": "b", "on": False}]
    assert columns(drawn) == {"rate": True, "model": False, "strength": False, "on": False}
