"""A study's journal as a durable folder has it: in pieces, files of their own, since nothing is appended to there."""

import hashlib
from pathlib import Path

from fashionclip_tune.durable import DurableFolder


def piece_name(offset: int, writer: str, piece: bytes) -> str:
    """``journal/OFFSET-WRITER-HASH.jsonl``: where it belongs, whose it is, and by what a torn one is known."""
    return f"journal/{offset:012d}-{writer}-{_digest(piece)}.jsonl"


def read_journal(folder: DurableFolder) -> bytes:
    """The pieces up to the first that is missing or torn.

    Where two machines wrote at the same place, what the later writer says holds, from there on: the other one had not
    noticed yet that it was overtaken.
    """
    pieces = [(*Path(name).stem.split("-", 1), name) for name in folder.sizes("journal")]
    found = [(int(offset), *rest.rpartition("-")[::2], name) for offset, rest, name in pieces]
    found.sort(key=lambda piece: piece[1], reverse=True)
    whole, writer = b"", ""
    for offset, by, digest, name in sorted(found, key=lambda piece: piece[0]):
        if offset == len(whole) and by >= writer and _digest(piece := folder.read(name)) == digest:
            whole, writer = whole + piece, by
    return whole


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
