"""JSON with one spelling, for everything whose bytes are hashed or compared."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def canonical_json(values: Mapping[str, Any]) -> bytes:
    """Return JSON with one spelling only, with sorted keys, no spaces and UTF-8."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def canonical_sha256(values: Mapping[str, Any]) -> str:
    """Return the hex sha256 of the canonical JSON of some values."""
    return hashlib.sha256(canonical_json(values)).hexdigest()
