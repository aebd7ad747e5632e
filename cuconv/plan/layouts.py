"""Arrays from one layout to the other: see cuda/transposed.cu."""

from __future__ import annotations

import math

from .base import MAX_GRID, VECTOR_BYTES, Plan

# Bits of this many bytes; threads of a block that moves them, of two numbers the faster one.
_WORDS = {2: ("uint16", 256), 4: ("uint32", 128), 8: ("uint64", 128)}
# Bytes of a row of a tile: kUnits of cuda/transposed.cu.
_ROW_BYTES = 128


def transposed(matrices: int, rows: int, columns: int, size: int, aligned: bool) -> Plan:
    """The plan of `matrices` matrices (rows, columns) to (columns, rows), of elements of `size` bytes; aligned says
    whether both arrays start at multiples of VECTOR_BYTES."""
    widest = VECTOR_BYTES // size if aligned else 1
    side = _ROW_BYTES // size
    row_tiles, column_tiles = -(-rows // side), -(-columns // side)
    word, threads = _WORDS[size]
    return Plan(
        source="transposed",
        defines=(
            ("T", word),
            ("IN_VECTOR", math.gcd(columns, widest)),
            ("OUT_VECTOR", math.gcd(rows, widest)),
            ("THREADS", threads),
        ),
        grid=(row_tiles * column_tiles, min(matrices, MAX_GRID[1]), 1),
        block=threads,
        shared_bytes=0,
        parameters=(
            ("rows", rows),
            ("columns", columns),
            ("column_tiles", column_tiles),
            ("matrices", matrices),
            ("total_elements", rows * columns),
        ),
    )
