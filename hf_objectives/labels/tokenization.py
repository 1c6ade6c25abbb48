"""Tokenise texts with the position of every token, by the fastest backend that agrees with the tokenizer."""

from __future__ import annotations

import itertools
import logging
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_objectives.errors import FormatError, TokenizerError
from hf_objectives.labels.messages import CLOSE, OPEN

logger = logging.getLogger(__name__)

# A fast backend must give the tokenizer's own ids on these before it is trusted: scripts, digits, runs of white space,
# line ends, emoji joined by ZWJ, decomposed accents, control characters.
_PROBE = (
    "Hello, world! It's 3.14159 o'clock; don't  double   space.\n\n\tTabs\r\nand 1,234,567 numbers. x=y+z*2**10",
    "Ünïcödé 日本語テキスト 한국어 العربية עברית हिन्दी ไทย русский ελληνικά 👩‍👩‍👧‍👦🏳️‍🌈 café cafe\u0301 \u200b\ufeff\x00\x7f",
    "def f(a, b):\n    return {'k': [a, b]}  # <html>&amp;</html>\n" * 3,
    "          \n \n  \t\t   ...!!!???---___###@ aAaA CamelCaseWORDS lower_snake 0x1F 1e-9 ½ ² Ⅳ",
    "",
)
# What fastokens encodes is checked in part, which took 3.6 % more time when it was measured.
_CHECKED, _STRIDE = 8192, 7919
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_Positions = list[tuple[int, int]]
_Part = tuple[NDArray, NDArray, NDArray, bool]  # ids, starts, ends and in_bytes of one text, as in `Encoded`


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a batch of texts, end to end, and the position of each token.

    Attributes:
        ids: int32 [total], the ids of all texts.
        offsets: int64 [texts + 1]; text i is `ids[offsets[i]:offsets[i + 1]]`.
        starts, ends: int64 [total], each token's half-open range in its own text.
        in_bytes: bool [texts], whether positions count UTF-8 bytes (else characters).
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    in_bytes: NDArray[np.bool_]


class TextEncoder:
    """Encodes texts exactly as `tokenizer(text, add_special_tokens=False)` does, with the position of every token.

    Where the tokenizer is a byte-level BPE, positions follow from the byte length of each id, and `fastokens` does the work
    if it is installed and gives the tokenizer's ids on a probe. `tokenizers` does it otherwise, a batch on all cores.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.

    Raises:
        TokenizerError: the tokenizer has no such backend (a pure Python tokenizer gives no positions).
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(
                f"{type(tokenizer).__name__} has no fast backend, which gives the position of tokens in the text; "
                "load it with AutoTokenizer (use_fast=True) or convert it to tokenizer.json"
            )
        # A copy: padding and truncation are state of the shared backend, and other callers set them.
        self._slow = Tokenizer.from_str(backend.to_str())
        self._slow.no_padding()
        self._slow.no_truncation()
        self._added: dict[str, int] = dict(tokenizer.added_tokens_encoder)
        self._checked, self._unchecked = 0, 0.0  # texts that were checked, and characters that may be
        byte_level = type(self._slow.decoder).__name__ == "ByteLevel"
        self._fast = _load_fastokens(self._slow, list(self._added)) if byte_level else None
        self._unknown = _unknown_bytes(self._slow)
        self._lengths = token_byte_lengths(tokenizer, special="text") if byte_level else None

    @property
    def backend(self) -> str:
        """Name of the backend in use, "fastokens" or "tokenizers"."""
        return "tokenizers" if self._fast is None else "fastokens"

    def check(self, text: str) -> None:
        """Check that the tokenizer has tokens for every character of a text.

        Raises:
            FormatError: half of a surrogate pair, or a byte that the vocabulary lacks (often a control character), which
                `tokenizer(text)` leaves out silently.
        """
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise FormatError(f"half of a surrogate pair, {found!r}, is no character; expected valid Unicode") from None
        if self._unknown is not None and (unknown := self._unknown.search(encoded)):
            position = len(encoded[: unknown.start()].decode(errors="ignore"))
            around = text[max(0, position - 20) : position + 20]
            raise FormatError(
                f"the tokenizer has no token for {text[position]!r} (byte {unknown[0].hex()}) in {around!r} and would leave "
                "it out; expected text without it"
            )

    def encode_ids(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts without positions: ids end to end, int32 [total], and offsets of the texts, int64 [texts + 1].

        Raises:
            FormatError: see `check`.
        """
        if self._fast is not None:
            return self._encode_flat(texts)
        self._check_all(texts)
        rows = [encoding.ids for encoding in self._slow.encode_batch_fast(list(texts), add_special_tokens=False)]
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(sizes.sum()))
        return ids, np.concatenate(([0], np.cumsum(sizes)))

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; control tokens that are wrapped (see messages.py) are read as plain text.

        Raises:
            FormatError: see `check`.
            TokenizerError: fastokens gives other ids than the tokenizer for a text of the sample that is encoded twice.
        """
        if self._lengths is None:
            self._check_all(texts)
            return _join(self._encode_each(texts))
        ids, offsets = self.encode_ids(texts)
        total = np.concatenate(([0], np.cumsum(self._lengths[ids])))
        sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], np.int64)
        # Byte lengths add up to the text unless the tokenizer normalises it or an added token swallows white space. Such
        # texts, and those with wrapped tokens, are encoded again with the backend's own positions.
        redo = total[offsets[1:]] - total[offsets[:-1]] != sizes
        redo |= np.fromiter((OPEN in text or CLOSE in text for text in texts), bool, len(texts))
        base = np.repeat(total[offsets[:-1]], np.diff(offsets))
        encoded = Encoded(ids, offsets, total[:-1] - base, total[1:] - base, np.ones(len(texts), bool))
        if not redo.any():
            return encoded
        again = iter(self._encode_each([text for text, redone in zip(texts, redo, strict=True) if redone]))
        return _join(
            [
                next(again) if redone else (encoded.ids[a:b], encoded.starts[a:b], encoded.ends[a:b], True)
                for redone, a, b in zip(redo, offsets[:-1], offsets[1:], strict=True)
            ]
        )

    def _check_all(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.check(text)

    def _encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids and offsets by fastokens, whose own error for a character without a token does not say where it is."""
        fast: Any = self._fast
        try:
            ids, offsets = fast.encode_batch_flat(list(texts))
        except ValueError:
            self._check_all(texts)
            raise
        flat, bounds = np.frombuffer(ids, "<i4"), np.frombuffer(offsets, "<i8")  # unsigned, but far below 2^31
        self._check_sample(texts, flat, bounds)
        return flat, bounds

    def _check_sample(self, texts: Sequence[str], ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
        """Encode again, by the tokenizer's own backend, one character of `_CHECKED` in whole texts; see `encode_batch`."""
        self._unchecked += sum(map(len, texts)) / _CHECKED
        for _ in range(len(texts)):
            self._checked += 1
            i = self._checked * _STRIDE % len(texts)
            if len(texts[i]) > self._unchecked:
                return
            self._unchecked -= len(texts[i])
            if (
                ids[offsets[i] : offsets[i + 1]].tolist()
                != self._slow.encode_batch_fast([texts[i]], add_special_tokens=False)[0].ids
            ):
                raise TokenizerError(
                    f"fastokens and the tokenizer give different ids for {texts[i][:80]!r}; uninstall fastokens to encode "
                    "with the tokenizer itself"
                )

    def _encode_each(self, texts: Sequence[str]) -> list[_Part]:
        """Encode texts with positions in characters; the wrapping of control tokens is not counted."""
        loose = [text for text in texts if OPEN not in text and CLOSE not in text]
        encodings = iter(self._slow.encode_batch(loose, add_special_tokens=False))
        parts = []
        for text in texts:
            if OPEN in text or CLOSE in text:
                parts.append(self._encode_wrapped(text))
                continue
            encoding = next(encodings)
            positions = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            parts.append((np.asarray(encoding.ids, np.int32), positions[:, 0], positions[:, 1], False))
        return parts

    def _encode_wrapped(self, text: str) -> _Part:
        ids: list[int] = []
        spans: _Positions = []
        begin = 0
        for piece, plain in _pieces(text):
            piece_ids, positions_in_piece = self._plain(piece) if plain else self._continued(piece, begin > 0)
            ids += piece_ids
            spans += [(begin + start, begin + end) for start, end in positions_in_piece]
            begin += len(piece)
        positions = np.asarray(spans, np.int64).reshape(-1, 2)
        return np.asarray(ids, np.int32), positions[:, 0], positions[:, 1], False

    def _continued(self, piece: str, inside: bool) -> tuple[list[int], _Positions]:
        """Encode a piece from inside a text: after a newline, so that no word-start prefix is added, then without it."""
        if inside:
            encoding = self._slow.encode("\n" + piece, add_special_tokens=False)
            newline = self._slow.encode("\n", add_special_tokens=False).ids
            if encoding.ids[: len(newline)] == newline:
                kept = encoding.offsets[len(newline) :]
                return encoding.ids[len(newline) :], [(max(start - 1, 0), end - 1) for start, end in kept]
        encoding = self._slow.encode(piece, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _plain(self, token: str) -> tuple[list[int], _Positions]:
        """Encode a control token as plain text: by the model alone, without the table of added tokens."""
        newline, ids = self._model_ids("\n"), self._model_ids("\n" + token)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else self._model_ids(token)
        inside = {i for text, i in self._added.items() if text in token and len(text) > 1}
        if not inside.isdisjoint(ids) and len(token) > 1:
            # A vocabulary that holds the token as a word of its own: cut it in two, since no half is a control token.
            ids = self._model_ids(token[:1]) + self._model_ids(token[1:])
        if not inside.isdisjoint(ids):
            raise TokenizerError(
                f"the tokenizer turns the plain text {token!r} into a control token; expected one that can spell it"
            )
        return ids, [(0, len(token))] * len(ids)

    def _model_ids(self, text: str) -> list[int]:
        if self._slow.normalizer is not None:
            text = self._slow.normalizer.normalize_str(text)
        words = [text]
        if self._slow.pre_tokenizer is not None:
            words = [word for word, _ in self._slow.pre_tokenizer.pre_tokenize_str(text)]
        return [piece.id for word in words for piece in self._slow.model.tokenize(word)]


def _unknown_bytes(backend: Tokenizer) -> re.Pattern[bytes] | None:
    """A pattern for the bytes that a byte-level vocabulary cannot spell; None where it can, or has an unknown token."""
    if "ByteLevel" not in str(backend.pre_tokenizer) or getattr(backend.model, "unk_token", None):
        return None
    wrapping = (OPEN + CLOSE).encode()  # never reaches the model
    missing = bytes(
        byte
        for byte, letter in bytes_to_unicode().items()
        if backend.model.token_to_id(letter) is None and byte not in wrapping
    )
    return re.compile(b"[" + re.escape(missing) + b"]") if missing else None


def _pieces(text: str) -> list[tuple[str, bool]]:
    """Cut a text at OPEN and CLOSE into pieces, each with whether it is read as plain text."""
    pieces: list[tuple[str, bool]] = []
    for i, part in enumerate(text.split(OPEN)):
        plain, closed, rest = part.partition(CLOSE) if i else ("", "", part)
        if i and not closed:  # an OPEN whose CLOSE the template cut off
            plain, rest = "", part
        pieces.append((plain, True))
        pieces += [(loose, False) for loose in rest.split(CLOSE)]
    return [(piece, plain) for piece, plain in pieces if piece]


def _join(parts: Sequence[_Part]) -> Encoded:
    none = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), False  # np.concatenate needs one array
    ids, starts, ends, in_bytes = zip(none, *parts, strict=True)
    offsets = np.cumsum([len(row) for row in ids])
    joined = np.concatenate(ids), offsets, np.concatenate(starts), np.concatenate(ends)
    return Encoded(*joined, np.array(in_bytes[1:], bool))


def _load_fastokens(slow: Tokenizer, added: Sequence[str]) -> Any | None:
    """A fastokens tokenizer that gives the ids of `slow`, a byte-level BPE, on the probe, or None."""
    try:
        import fastokens
    except ImportError:
        logger.info("fastokens is not installed; encoding with tokenizers (pip install fastokens)")
        return None
    # Some tokenizers diverge only where a control token is written, alone, in a word, or beside another.
    written = added[:256]
    probe = (*_PROBE, "".join(written), "".join(f" a{token}b {token}\n" for token in written))
    try:
        fast = fastokens.Tokenizer.from_json_str(slow.to_str())
        flat, offsets = fast.encode_batch_flat(list(probe))
    except Exception as error:  # foreign code on a foreign file: whatever it raises, the tokenizer's own backend works
        logger.warning("fastokens cannot load this tokenizer (%s); encoding with tokenizers", error)
        return None
    ids, bounds = np.frombuffer(flat, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
    for text, begin, end in zip(probe, bounds[:-1], bounds[1:], strict=True):
        if ids[begin:end].tolist() != slow.encode(text, add_special_tokens=False).ids:
            logger.warning("fastokens disagrees with this tokenizer on %r; encoding with tokenizers", text[:40])
            return None
    logger.info("encoding with fastokens")
    return fast


_encoders: weakref.WeakKeyDictionary[Any, tuple[int, TextEncoder]] = weakref.WeakKeyDictionary()


def text_encoder(tokenizer: Any) -> TextEncoder:
    """The TextEncoder of a tokenizer, made once, and again after tokens were added to it."""
    size, encoder = _encoders.get(tokenizer, (-1, None))
    if encoder is None or size != len(tokenizer):
        encoder = TextEncoder(tokenizer)
        _encoders[tokenizer] = len(tokenizer), encoder
    return encoder


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the tokenizer's highest id, added tokens included; `len` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_byte_lengths(tokenizer: Any, *, special: Literal["zero", "text"] = "zero") -> NDArray[np.int64]:
    """How many bytes of UTF-8 text each token id stands for.

    A byte-level BPE spells bytes in the GPT-2 alphabet, one character each. Other vocabularies spell text, with `▁` for a
    space and `<0x0A>` for a single byte.

    Args:
        tokenizer: a fast transformers tokenizer.
        special: bytes of a special token: "zero", it stands for no text (bits per byte), or "text", those of its own name
            (positions in a rendered conversation).

    Returns:
        int64 [vocabulary], 0 for ids that the tokenizer does not use.
    """
    lengths = np.zeros(vocabulary_size(tokenizer), np.int64)
    backend = tokenizer.backend_tokenizer
    byte_level = "ByteLevel" in f"{backend.decoder} {backend.pre_tokenizer}"  # alone, or in a sequence
    alphabet = set(bytes_to_unicode().values())
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            lengths[i] = 0 if added[i].special and special == "zero" else len(added[i].content.encode())
        elif byte_level and alphabet.issuperset(token):
            lengths[i] = len(token)
        elif _BYTE_FALLBACK.fullmatch(token):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("▁", " ").encode())
    return lengths
