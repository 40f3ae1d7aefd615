"""``python -m benchmarks NAME [FLAGS]``, from the root of the repository; without NAME it says which there are."""

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
BENCHMARKS = {
    "speed": (
        *("loader", "loader_resume", "evaluation_pixels", "training_step", "retrieval_recall", "sweep_overhead"),
        *("memory_estimate", "gpu", "t4_plans", "plan_beside_fact", "token_rows"),
    ),
    "search": ("search_record", "search", "search_real"),
    "resilience": ("kill_sweep", "lose_machine"),
}


def summary(folder: str, name: str) -> str:
    """The first line of what a benchmark says of itself."""
    said = ast.get_docstring(ast.parse((FOLDER / folder / f"{name}.py").read_text()))
    return str(said).partition("\n")[0]


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "--help"
    for folder, names in BENCHMARKS.items():
        if wanted in names:
            sys.argv = [f"python -m benchmarks {wanted}", *sys.argv[2:]]
            importlib.import_module(f"benchmarks.{folder}.{wanted}").main()
            return
    lines = [f"  {name:<18}{summary(folder, name)}" for folder, names in BENCHMARKS.items() for name in names]
    print("usage: python -m benchmarks NAME [FLAGS]", *lines, sep="\n")
    if wanted not in ("-h", "--help"):
        print(f"python -m benchmarks: error: no benchmark is called {wanted}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
