"""Texts that broke readers: too deep, too long, not UTF-8, not what they seem."""

from __future__ import annotations

DEEP = {
    "list": "[" * 3_000 + "]" * 3_000,
    "list_20000": "[" * 20_000 + "]" * 20_000,
    "mapping": '{"a": ' * 3_000 + "1" + "}" * 3_000,
    "digits": "9" * 5_000,
    "moderate": "[" * 150 + "]" * 150,
}
#: JSON that is no manifest, account or state.
DAMAGED = {
    "empty": b"", "cut": b'{"policy": {"preparation_version"', "null": b"null", "list": b"[]",
    "number": b"1e999", "text": b'"x"',
    "deep": DEEP["list_20000"].encode(), "digits": b'{"files": ' + b"9" * 5_000 + b"}", "bytes": b"\xff\xfe\x00",
    "nul": b"\0" * 64, "empty_mapping": b"{}", "surrogate": b'{"\\ud800": "\\ud800"}', "nan": b"NaN",
}  # fmt: skip
