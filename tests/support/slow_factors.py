"""Factors of queries and keys read byte by byte, as their format is documented."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Components: TypeAlias = Sequence[Sequence[Sequence[int]]]


def decoded_slowly(
    tokens: int, components: Components, queries: bytes, keys: bytes, scales: bytes
) -> list[list[list[list[tuple[float, float]]]]]:
    """Block → head → component → token → query and key, from one row's bytes, as the format is documented."""
    numbers = struct.unpack(f"<{len(scales) // 4}f", scales)
    at, scale_at = 0, 0
    blocks = []
    for heads in components:
        found: list[list[list[tuple[float, float]]]] = [[] for _ in heads]
        for half in (False, True):
            for head, counts in enumerate(heads):
                for _ in range(counts[half]):
                    values = []
                    for row in (queries, keys):
                        if not half:
                            part = row[at : at + tokens]
                            values.append([each - 256 if each > 127 else each for each in part])
                            continue
                        part = row[at : at + (tokens + 1) // 2]
                        nibbles = [each % 16 - 8 for each in part] + [each // 16 - 8 for each in part]
                        values.append(nibbles[:tokens])
                    at += (tokens + 1) // 2 if half else tokens
                    scale = numbers[scale_at]
                    scale_at += 1
                    found[head].append([(scale * q, float(k)) for q, k in zip(*values, strict=True)])
        blocks.append(found)
    assert (at, scale_at) == (len(queries), len(numbers))
    return blocks


def logits_slowly(
    tokens: int, components: Components, queries: bytes, keys: bytes, scales: bytes
) -> np.ndarray:
    """Products of queries and keys ``[L, H, T, T]`` in float64, from one row's bytes."""
    blocks = decoded_slowly(tokens, components, queries, keys, scales)
    products = np.zeros((len(blocks), len(blocks[0]), tokens, tokens))
    for block, heads in enumerate(blocks):
        for head, each in enumerate(heads):
            for pairs in each:
                query, key = np.array(pairs).T
                products[block, head] += np.outer(query, key)
    return products
