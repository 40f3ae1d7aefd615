#!/usr/bin/env python
"""``python -m fashionclip_tune compare``, from a checkout."""

import sys

from fashionclip_tune.cli.main import main as command


def main() -> None:
    command(["compare", *sys.argv[1:]])


if __name__ == "__main__":
    main()
