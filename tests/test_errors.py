"""Commands that messages print run as they are; the words for how a trial ended are those of the files."""

import json
import subprocess
from pathlib import Path

import pytest

from fashionclip_tune.errors import StopReason, command, rung_of, stop_at_rung

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [("doctor", "--help"), ("sweep", "--help"), ("compare", "--help")])
@pytest.mark.parametrize("here", [ROOT, ROOT.parent])
def test_a_printed_command_runs_from_the_folder_that_it_is_printed_in(
    words: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    line = command(*words)
    assert ("sweeps/run_sweep.py" in line) == (words[0] == "sweep")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, "usage: " in done.stdout) == (0, True), done.stderr


def test_words_with_blanks_and_quotes_are_one_word_each() -> None:
    line = command("train", "--data", Path("/my photos/it's"), "--set", "clip_model=tiny-clip")
    echoed = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True, check=True).stdout
    assert echoed.splitlines()[1:] == [
        "-m",
        "fashionclip_tune",
        "train",
        "--data",
        "/my photos/it's",
        "--set",
        "clip_model=tiny-clip",
    ]


def test_a_reason_is_its_word_wherever_it_is_written() -> None:
    assert [str(reason) for reason in StopReason][:2] == ["budget", "diverged"]
    assert f"{StopReason.OUT_OF_MEMORY}" == "out_of_memory" == json.loads(json.dumps(StopReason.OUT_OF_MEMORY))
    assert [rung_of(each) for each in (stop_at_rung(3), "rung_12", StopReason.BUDGET, None)] == [3, 12, None, None]
