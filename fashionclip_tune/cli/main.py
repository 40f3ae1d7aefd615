"""``fashionclip-tune COMMAND``, or ``python -m fashionclip_tune COMMAND``."""

from collections.abc import Sequence

import fashionclip_tune
from fashionclip_tune.cli.compare import add_compare
from fashionclip_tune.cli.doctor import add_doctor
from fashionclip_tune.cli.evaluate import add_evaluate
from fashionclip_tune.cli.export import add_export
from fashionclip_tune.cli.flags import Parser, user_errors
from fashionclip_tune.cli.prepare import add_prepare
from fashionclip_tune.cli.probe import add_probe
from fashionclip_tune.cli.search import add_search
from fashionclip_tune.cli.sweep import add_sweep
from fashionclip_tune.cli.synthetic import add_pretrain, add_synthesize
from fashionclip_tune.cli.train import add_train

_COMMANDS = (
    add_sweep,
    add_compare,
    add_prepare,
    add_synthesize,
    add_pretrain,
    add_train,
    add_evaluate,
    add_search,
    add_export,
    add_probe,
    add_doctor,
)


def command_parser() -> Parser:
    parser = Parser(prog="python -m fashionclip_tune", description="Fine-tune OpenCLIP models on photos.")
    parser.add_argument("--version", action="version", version=f"fashionclip-tune {fashionclip_tune.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = command_parser().parse_args(arguments)
    with user_errors():
        parsed.run(parsed)
