"""The elements of a JSON array, some megabytes at a time, without holding the file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from hf_objectives.errors import FileFormatError


def elements(file: IO[bytes], path: str, read_chars: int) -> Iterator[list[Any]]:
    """The elements of a JSON array.

    Args:
        file: the open file.
        path: its name, for errors.
        read_chars: characters read at a time.

    Raises:
        FileFormatError: not UTF-8, not JSON, no array, or a compressed file that ends too soon; names the line.
    """
    decoder, text, line = json.JSONDecoder(), "", 1
    opened = finished = False
    lines = io.TextIOWrapper(file, encoding="utf-8")
    while not finished:
        try:
            # An element longer than this is read in ever larger steps, not over and over.
            more = lines.read(max(read_chars, len(text)))
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: not UTF-8 ({bad_byte(error)}); convert the file first") from error
        except OSError as error:
            raise FileFormatError(f"{path}: the compressed file is damaged or ends too soon ({error})") from error
        text += more
        at = _WHITE.match(text, 0).end()  # type: ignore[union-attr]
        if not opened and text[at : at + 1] != "[":
            raise FileFormatError(_no_array(path, text[at:]))
        at, opened = at + (not opened), True
        values: list[Any] = []
        while True:
            begin = _WHITE.match(text, at).end()  # type: ignore[union-attr]
            if text[begin : begin + 1] == "]":
                finished = True
                break
            try:
                value, end = decoder.raw_decode(text, begin)
            except json.JSONDecodeError as error:
                if more:
                    break
                raise FileFormatError(
                    f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg})"
                ) from error
            after = _WHITE.match(text, end).end()  # type: ignore[union-attr]
            if after == len(text) and more:
                break  # a number may go on in what is not read yet
            if text[after : after + 1] not in (",", "]"):
                line += text.count("\n", 0, after)
                raise FileFormatError(f"{path}, line {line}: not valid JSON (expected a comma or the end of the array)")
            values.append(value)
            at = after + (text[after] == ",")
        line += text.count("\n", 0, at)
        text = text[at:]
        yield values


_WHITE = re.compile(r"[ \t\r\n]*")


def _no_array(path: str, text: str) -> str:
    """Why a file under the name of JSON is no array of objects."""
    try:
        found = type(json.loads(text)).__name__
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: not valid JSON ({error.msg})"
    return f"{path} holds {found}; expected a list of objects"


def bad_byte(error: UnicodeDecodeError) -> str:
    """Which byte is no UTF-8, in words."""
    return f"byte 0x{error.object[error.start]:02x} at {error.start}"
