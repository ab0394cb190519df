"""What the command lines share: whatever is wrong with what was given is told in one line, and the exit status is 2."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print a usage of many lines; flags must be written out."""

    def __init__(self, program: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=program,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def refuse(program: str, message: str) -> int:
    """Says on standard error, in one line, what is wrong; returns the exit status."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
