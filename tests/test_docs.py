"""The examples of the docs run, and print what stands below them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fashionclip_tune.config.project import ProjectConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, printed, id=f"{path.name}-{number}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for number, (code, printed) in enumerate(
        re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", path.read_text(), re.DOTALL)
    )
]


def test_there_is_an_example() -> None:
    assert [example.id for example in EXAMPLES] == ["evaluation.md-0"]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_prints_what_stands_below_it(code: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (printed, 0), done.stderr


def messages() -> Iterator[str]:
    """All texts of the package, with a gap where a value is put in."""
    for path in (ROOT / "fashionclip_tune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_message_of_the_troubleshooting_page_is_one_that_the_package_has() -> None:
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    known = list(messages())
    unknown = [
        text
        for text in quoted
        if not any(
            re.search(".*?".join(re.escape(part.strip()) for part in text.split("...")), message, re.DOTALL)
            for message in known
        )
    ]
    assert unknown == []


PAGE = (ROOT / "docs" / "how-it-works.md").read_text()
ROOMS = {path.name for path in (ROOT / "fashionclip_tune").iterdir() if path.is_dir() and (path / "__init__.py").exists()}


def source_of(module: str) -> Path | None:
    """Of ``tuning.study.study``, a file; of ``cli/``, a folder."""
    path = ROOT / "fashionclip_tune" / module.rstrip("/").replace(".", "/")
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path if path.is_dir() else None


def test_each_module_of_the_page_on_how_it_works_is_there() -> None:
    words = {
        word
        for word in re.findall(r"`([a-z_./]+)`", PAGE)
        if re.split(r"[./]", word)[0] in ROOMS and not re.search(r"\.(py|json|npz|csv)$", word)
    }
    words -= ProjectConfig().to_dict().keys()
    assert len(words) > 50
    assert {word for word in words if source_of(word) is None} == set()


def test_what_the_table_of_changes_names_is_where_it_says() -> None:
    (table,) = re.findall(r"\| to change \| where \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    checked = 0
    for row in table.splitlines():
        for module, names in re.findall(r"`([a-z_.]+)`: ((?:`[\w.]+`(?:, (?=`[A-Z_a-z]+\w*`(?!:)))?)+)", row):
            path = source_of(module)
            assert path is not None, module
            for name in re.findall(r"`([\w.]+)`", names):
                assert re.search(rf"\b{name.rpartition('.')[2]}\b", path.read_text()), f"{name} in {module}"
                checked += 1
    assert checked > 12
