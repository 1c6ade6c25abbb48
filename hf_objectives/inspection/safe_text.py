"""Show text from data without letting it act: in a terminal, and inside an HTML page that runs one script."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

# Control characters become pictures. Line ends and tabs stay.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # C1, bidi


def visible(text: str) -> str:
    """Replace every control character by a picture of it; the length of the text stays."""
    return text.translate(_PICTURES)


def script_json(content: Any) -> str:
    """Write JSON that may stand in a `<script>` element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(script: str) -> str:
    """The hash by which a content security policy allows a script: sha256 of what stands between its tags."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")  # a browser hashes line ends as it reads them
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
