"""Inputs as the first versions stored them: what is in a history from then must be read for ever."""

from __future__ import annotations

import base64
import zlib


def pack_first(text: str) -> str:
    """Of frames and of snapshots."""
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()
