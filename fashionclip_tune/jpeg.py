"""What a JPEG's header says, without decoding it."""

JPEG_START = b"\xff\xd8\xff"


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header (ITU-T T.81, B.2.2); (0, 0) if there is none in ``data``."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            return width, height
        has_length = not (marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01)
        place += 2 + (data[place + 2] << 8 | data[place + 3]) if has_length else 1 if marker == 0xFF else 2
    return 0, 0
