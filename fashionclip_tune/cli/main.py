"""``python -m fashionclip_tune COMMAND``: prepare, synthesize, pretrain, train, evaluate, export, probe, doctor.

Sweeps are started by ``sweeps/run_sweep.py``.
"""

from collections.abc import Sequence

from fashionclip_tune.cli.doctor import add_doctor
from fashionclip_tune.cli.evaluate import add_evaluate
from fashionclip_tune.cli.export import add_export
from fashionclip_tune.cli.flags import Parser, user_errors
from fashionclip_tune.cli.prepare import add_prepare
from fashionclip_tune.cli.probe import add_probe
from fashionclip_tune.cli.synthetic import add_pretrain, add_synthesize
from fashionclip_tune.cli.train import add_train


def command_parser() -> Parser:
    parser = Parser(prog="python -m fashionclip_tune", description="Fine-tune OpenCLIP models on photos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_prepare, add_synthesize, add_pretrain, add_train, add_evaluate, add_export, add_probe, add_doctor):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = command_parser().parse_args(arguments)
    with user_errors():
        parsed.run(parsed)
