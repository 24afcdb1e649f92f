"""The CRC-32 of bytes whose parts were checked apart."""

from __future__ import annotations


def joined_crc(before: int, after: int, size: int) -> int:
    """The CRC-32 of bytes whose parts have the CRC-32s `before` and `after`; the second part has `size` bytes.

    >>> import zlib
    >>> joined_crc(zlib.crc32(b"a cat"), zlib.crc32(b" sits"), 5) == zlib.crc32(b"a cat sits")
    True
    """
    power, square = 1 << 31, 1 << 23  # x^0 and x^8, the shift by a byte; the highest bit is the lowest power
    while size:
        if size & 1:
            power = _times(power, square)
        square = _times(square, square)
        size >>= 1
    return _times(power, before) ^ after


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo that of CRC-32."""
    found = 0
    for bit in range(31, -1, -1):
        found ^= b * (a >> bit & 1)
        b = (b >> 1) ^ (0xEDB88320 * (b & 1))
    return found
