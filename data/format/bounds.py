"""How large the numbers of a cache's documents may be, as types that `edge.parse` checks.

They are far beyond any real cache, and small enough that nothing which is made of them is absurd. What lies
on the disk bounds rows and shards further, see `opening`.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Len, Lt

MOST_ROWS = 2**31
MOST_ROW_BYTES = 2**30
"""Of all views of a row of one column."""

MOST_COLUMNS = 256
MOST_SOURCES = 64

Count = Annotated[int, Ge(0), Lt(MOST_ROWS)]
Rows = Annotated[int, Ge(1), Lt(MOST_ROWS)]
ShardRows = Annotated[int, Ge(1), Le(2**20)]
Side = Annotated[int, Ge(1), Le(2**16)]
"""Of an image in pixels, or of a grid in tokens."""

Axis = Annotated[int, Ge(1), Le(2**24)]
Label = Annotated[int, Ge(-(2**31)), Lt(2**31)]
"""One that int32 holds; whether it is a class's is checked where labels are read."""

Bytes = Annotated[int, Ge(0), Lt(2**53)]
Word = Annotated[str, Len(1, 256)]
Text = Annotated[str, Len(0, 4096)]
Sha256 = Annotated[str, Len(64, 64)]
Number = Annotated[int, Ge(-(2**53)), Le(2**53)] | Annotated[float, Gt(-1e300), Lt(1e300)]
"""An integer stays one, so that what is read is written again as it was, and float64 holds it."""

Positive = Annotated[float, Gt(0), Lt(2**53)]
