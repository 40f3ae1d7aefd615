"""The pages that are made of the code are the code's; what the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import override_paths
from tests.support.docs_pages import cli_page, settings_page

ROOT = Path(__file__).parents[1]


def test_the_settings_page_is_what_the_configuration_says() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), "make docs"


def test_the_page_of_flags_is_what_the_parsers_say() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == cli_page(), "make docs"


def test_the_settings_page_has_every_setting() -> None:
    page = settings_page()
    assert [path for path in override_paths() if f"\n| `{path}`" not in page] == []


def test_train_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert "docs/settings.md" in said
    assert [path for path in override_paths() if path not in said.replace(",", " ").split()] == []


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_pages_lead_somewhere() -> None:
    for page in ("cli", "settings", "prepare", "report", "spaces"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "docs" / f"{page}.md").read_text())
        assert [link for link in links if not (ROOT / "docs" / link).exists()] == [], page


def test_commands_in_the_pages_have_flags_that_exist() -> None:
    known = set(re.findall(r"`(--[a-z][a-z-]*)", cli_page()))
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("prepare", "report", "spaces", "t4"))]
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        commands = re.findall(
            r"^ {4}python (?:sweeps/(?:run_sweep|compare)\.py|-m fashionclip_tune) ([^#\n]*)", text, re.MULTILINE
        )
        assert commands
        used = {flag for command in commands for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", command)}
        assert used <= known, page


def test_the_winner_finds_photos_as_the_readme_shows_it(tmp_path: Path) -> None:
    """A toy with random weights at the winner's place; the code is run as it stands."""
    from PIL import Image

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.models.openclip import export_openclip, load_model

    config = ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})
    export_openclip(load_model(config), tmp_path / "results" / "shop" / "best")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 99)).save(tmp_path / "photos" / f"{number}.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["1.", "2.", "3."]
    assert {line.split(" ")[1] for line in lines} == {f"photos/{number}.jpg" for number in range(3)}
