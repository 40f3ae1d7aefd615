"""The examples of the docs run, and print what stands below them."""

import re
import subprocess
import sys
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
