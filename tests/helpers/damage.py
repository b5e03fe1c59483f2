"""Random damage to bytes, the same for the same seed."""

import random
import struct

_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def damaged(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """Change a file in one to four places: bits, numbers, cuts, doubled parts, and parts of another file."""
    body = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(body) + 1)
        # Most of what decides is in the header and the directories, which are short beside the pixels.
        if dice.random() < 0.5:
            at = min(at, dice.randrange(200))
        kind = dice.randrange(6)
        if kind == 0 and at < len(body):
            body[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            size, form = dice.choice([(1, "B"), (2, "H"), (4, "I")])
            word = dice.choice(_WORDS) & (256**size - 1)
            body[at : at + size] = struct.pack(dice.choice("<>") + form, word)
        elif kind == 2:
            del body[at : at + dice.randint(1, 64)]
        elif kind == 3:
            body[at:at] = body[at : at + dice.randint(1, 256)]
        elif kind == 4:
            other = dice.choice(others)
            start = dice.randrange(len(other))
            body[at : at + 64] = other[start : start + 64]
        else:
            body[at : at + 8] = dice.randbytes(8)
    return bytes(body)
