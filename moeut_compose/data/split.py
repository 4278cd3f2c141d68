"""Which documents are held out where a source has no validation part of its own."""

from __future__ import annotations

import hashlib


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: a pure function of its text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
