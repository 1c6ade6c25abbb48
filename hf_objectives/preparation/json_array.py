"""Read the elements of a JSON array some megabytes at a time, without holding the file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from hf_objectives.errors import FileFormatError
from hf_objectives.preparation.files import MAX_RECORD, TOO_LONG
from hf_objectives.types import TOO_DEEP, parse_json

_MARK = re.compile(r"\s*([\[,\]])\s*")  # what stands before an element, or ends the array


def elements(file: IO[bytes], path: str, read_chars: int) -> Iterator[list[Any]]:
    """Yield the elements of a JSON array in lists, `read_chars` characters of the file at a time.

    Raises:
        FileFormatError: the file is not UTF-8, not JSON, not an array, or ends too soon; names `path` and the line.
    """
    decoder, text, line, expected = json.JSONDecoder(), "", 1, "["
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    while True:
        try:
            more = lines.read(max(read_chars, len(text)))  # a long element is read in ever larger steps
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: not UTF-8 ({bad_byte(error)}); convert the file first") from error
        except OSError as error:
            raise FileFormatError(f"{path}: the compressed file is damaged or ends too soon ({error})") from error
        text += more
        values: list[Any] = []
        end, finished = 0, False
        while not finished and (end < len(text) or not more):
            mark = _MARK.match(text, end)
            if mark is None or mark[1] not in expected:
                if more and not text[end:].strip():
                    break
                raise FileFormatError(_not_an_array(path, text, end, line, expected))
            finished = mark[1] == "]" or text[mark.end() : mark.end() + 1] == "]"
            if not finished:
                try:
                    value, after = decoder.raw_decode(text, mark.end())
                except RecursionError as error:
                    raise FileFormatError(f"{path}, line {line + text.count(chr(10), 0, end)}: {TOO_DEEP}") from error
                except ValueError as error:
                    if more and len(text) - end <= MAX_RECORD:
                        break
                    if more:
                        raise FileFormatError(
                            f"{path}, line {line + text.count(chr(10), 0, end)}: {TOO_LONG}"
                        ) from None
                    if not isinstance(error, json.JSONDecodeError):  # over 4,300 digits
                        raise FileFormatError(f"{path}, line {line + text.count(chr(10), 0, end)}: {error}") from error
                    place = f"{path}, line {line + error.lineno - 1}"
                    raise FileFormatError(f"{place}: not valid JSON ({error.msg})") from error
                if after == len(text) and more:
                    break  # a number may go on in what is not read yet
                values.append(value)
                end, expected = after, ",]"
        yield values
        if finished:
            return
        line += text.count("\n", 0, end)
        text = text[end:]


def _not_an_array(path: str, text: str, end: int, line: int, expected: str) -> str:
    """Say why a .json file is not an array of objects."""
    if expected != "[":
        line += text.count("\n", 0, end + len(text[end:]) - len(text[end:].lstrip()))
        return f"{path}, line {line}: not valid JSON (expected a comma or the end of the array)"
    try:
        return f"{path} holds {type(parse_json(text)).__name__}; expected a list of objects"
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):
            return f"{path}: {error}; expected a list of objects"
        return f"{path}, line {error.lineno}: not valid JSON ({error.msg})"


def bad_byte(error: UnicodeDecodeError) -> str:
    """Name the byte that is not UTF-8."""
    return f"byte 0x{error.object[error.start]:02x} at {error.start}"
