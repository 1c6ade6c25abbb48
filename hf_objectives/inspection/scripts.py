"""Scripts and data inside an HTML page that runs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any


def script_json(content: Any) -> str:
    """JSON that may stand in a `<script>` element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(script: str) -> str:
    """The source of a script as a content security policy allows it: sha256 of what stands between its tags."""
    # A browser hashes line ends as it reads them.
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
