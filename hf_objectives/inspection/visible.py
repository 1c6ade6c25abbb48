"""Text from data for a terminal, which it must not steer."""

from __future__ import annotations

# Control characters are shown as pictures, line ends and tabs as they are.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # C1, bidi


def visible(text: str) -> str:
    """The text with a picture for every control character; its length stays."""
    return text.translate(_PICTURES)
