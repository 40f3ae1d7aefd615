"""The examples of the docs run, and print what stands below them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
