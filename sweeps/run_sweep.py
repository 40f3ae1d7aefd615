#!/usr/bin/env python
"""``python -m fashionclip_tune sweep``, from a checkout."""

import sys

from fashionclip_tune.cli.main import main as command


def main() -> None:
    command(["sweep", *sys.argv[1:]])


if __name__ == "__main__":
    main()
