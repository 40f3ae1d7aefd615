"""The pages that are made of the code are the code's; what the README shows runs."""

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
