"""The figures that the package's layout keeps to; ``make layout`` prints them."""

import statistics
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fashionclip_tune"
NOT_COUNTED = ("__init__.py", "__main__.py")
MOST_LINES, SMALL_LINES, MOST_SMALL, MOST_MODULES = 320, 40, 5, 20


def lines_of_modules() -> dict[Path, int]:
    """Lines of each module, by its path in the package; spaces are files that users copy."""
    modules = (path for path in PACKAGE.rglob("*.py") if path.name not in NOT_COUNTED and path.parent.name != "spaces")
    return {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in sorted(modules)}


def modules_of_rooms() -> dict[str, int]:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name not in ("__pycache__", "spaces", "configs")]
    counts = {str(path.relative_to(PACKAGE)): len(list(path.glob("*.py"))) - 1 for path in sorted(folders)}
    return {room: count for room, count in counts.items() if count > 0}


def test_a_module_is_one_reading() -> None:
    assert {path: lines for path, lines in lines_of_modules().items() if lines > MOST_LINES} == {}
    assert 120 <= statistics.median(lines_of_modules().values()) <= 220


def test_few_modules_are_scraps() -> None:
    assert len([path for path, lines in lines_of_modules().items() if lines < SMALL_LINES]) <= MOST_SMALL


def test_a_room_is_not_crowded() -> None:
    assert {room: count for room, count in modules_of_rooms().items() if count > MOST_MODULES} == {}


if __name__ == "__main__":
    lines = lines_of_modules()
    small = [str(path) for path, count in lines.items() if count < SMALL_LINES]
    print(f"{len(lines)} modules, {sum(lines.values()):,} lines, median {statistics.median(lines.values()):g}")
    print(f"longest: {', '.join(f'{path} {count}' for path, count in sorted(lines.items(), key=lambda each: -each[1])[:5])}")
    print(f"under {SMALL_LINES} lines: {', '.join(small) or 'none'}")
    print(f"modules a room: {', '.join(f'{room} {count}' for room, count in modules_of_rooms().items())}")
