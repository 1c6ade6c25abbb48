"""Both backends give the tokenizer's ids and the place of every token."""

from __future__ import annotations

import os
import re

import fastokens
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_objectives.errors import FormatError, TokenizerError
from hf_objectives.labels import tokenization
from hf_objectives.labels.batches import BatchEncoder
from hf_objectives.labels.chat import encode_chats
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.labels.messages import CLOSE, OPEN
from hf_objectives.labels.tokenization import TextEncoder, text_encoder, token_byte_lengths
from hf_objectives.preparation.readers import load_rows
from tests.support.chat_corpus import byte_tokenizer

TEXTS = ["Hello there, general!", "", "naïve 日本語 👩‍👩‍👧‍👦 cafe\u0301", "a<|im_end|>b  \n\n c", "<|im_start|>"]


def trained_bpe(normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|im_end|>", "<|im_start|>"]
    )
    backend.train_from_iterator(["hello there general kenobi the answer is forty two"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def metaspace() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    special = ["<unk>", "<|im_end|>", "<|im_start|>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        ["hello there general a b c"] * 20, trainers.BpeTrainer(vocab_size=350, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<unk>")


@pytest.fixture(params=["bytes", "bpe", "nfc", "metaspace"], scope="module")
def tokenizer(request):
    return {
        "bytes": byte_tokenizer,
        "bpe": trained_bpe,
        "nfc": lambda: trained_bpe(normalizers.NFC()),
        "metaspace": metaspace,
    }[request.param]()


def rows(encoded):
    for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
        yield encoded.ids[a:b].tolist(), encoded.starts[a:b].tolist(), encoded.ends[a:b].tolist()


def test_ids_are_the_tokenizers_own(tokenizer):
    encoded = TextEncoder(tokenizer).encode_batch(TEXTS)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [ids for ids, *_ in rows(encoded)] == expected


def test_backend_in_use():
    assert TextEncoder(trained_bpe()).backend == "fastokens"
    assert TextEncoder(metaspace()).backend == "tokenizers"


def test_a_backend_that_differs_at_a_control_token_alone_is_not_trusted(monkeypatch):
    tokenizer = trained_bpe()
    real, control = fastokens.Tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")

    class Differs:
        @staticmethod
        def from_json_str(source):
            backend = Differs()
            backend.real = real.from_json_str(source)
            return backend

        def encode_batch_flat(self, texts):
            ids, offsets = self.real.encode_batch_flat(texts)
            ids = np.frombuffer(ids, "<u4").copy()
            ids[ids == control] = control + 2
            return ids.tobytes(), offsets

    monkeypatch.setattr(fastokens, "Tokenizer", Differs)
    encoder = TextEncoder(tokenizer)
    assert encoder.backend == "tokenizers"
    assert encoder.encode_ids(["the<|im_end|>"])[0].tolist() == tokenizer("the<|im_end|>")["input_ids"]


def test_a_sample_of_a_corpus_is_encoded_twice(monkeypatch):
    """A text that fastokens gets wrong, unlike all that the probe holds, stops the preparation."""
    encoder = TextEncoder(trained_bpe())
    right = encoder._fast.encode_batch_flat

    class Wrong:
        def encode_batch_flat(self, texts):
            ids, offsets = right(texts)
            ids = np.frombuffer(ids, "<u4").copy()
            bounds = np.frombuffer(offsets, "<u8")
            for i, text in enumerate(texts):
                if "zebra" in text:
                    ids[int(bounds[i])] += 1
            return ids.tobytes(), offsets

    encoder._fast = Wrong()
    for _ in range(5):
        encoder.encode_ids(["the answer is forty two"] * 2000)
    with pytest.raises(TokenizerError, match="fastokens and the tokenizer give different ids for 'a zebra"):
        for _ in range(5):
            encoder.encode_ids(["a zebra in a zoo"] * 2000)


def test_fast_and_slow_places_agree(tokenizer):
    fast, slow = TextEncoder(tokenizer), TextEncoder(tokenizer)
    slow._fast = slow._lengths = None
    for text, quick, exact, in_bytes in zip(
        TEXTS,
        rows(fast.encode_batch(TEXTS)),
        rows(slow.encode_batch(TEXTS)),
        fast.encode_batch(TEXTS).in_bytes,
        strict=True,
    ):
        ids, starts, ends = quick
        assert ids == exact[0]
        if not in_bytes:
            assert (starts, ends) == exact[1:]
            continue
        assert starts[:1] in ([], [0]) and ends[-1:] in ([], [len(text.encode())]) and starts[1:] == ends[:-1]
        if text.isascii():
            assert (starts, ends) == exact[1:]


def test_special_tokens_count_their_own_text():
    encoded = TextEncoder(trained_bpe()).encode_batch(["the<|im_end|>x"])
    ((_, starts, ends),) = rows(encoded)
    assert (starts[-2], ends[-2], starts[-1], ends[-1]) == (3, 13, 13, 14)


def test_wrapped_control_tokens_are_plain_text(tokenizer):
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = f"ab{OPEN}<|im_end|>{CLOSE}cd<|im_end|>"
    encoded = text_encoder(tokenizer).encode_batch([text, "x"])
    ids, starts, ends = next(rows(encoded))
    assert ids.count(control) == 1 and ids[-1] == control
    assert (starts[-1], ends[-1]) == (
        14,
        24,
    )  # after ab, ten characters of plain text, and cd; the wrapping counts nothing
    spelled = tokenizer.decode(ids).replace(" ", "")
    assert spelled == "ab<|im_end|>cd<|im_end|>"


def test_a_lone_mark_only_cuts():
    tokenizer = byte_tokenizer()
    encoded = text_encoder(tokenizer).encode_batch([f"a<|im_{CLOSE}end|>b", f"a{OPEN}bc"])
    (first, *_), (second, *_) = rows(encoded)
    assert tokenizer.decode(first) == "a<|im_end|>b" and tokenizer.eos_token_id not in first
    assert tokenizer.decode(second) == "abc"


def test_padding_and_truncation_of_the_tokenizer_change_nothing():
    tokenizer = trained_bpe()
    tokenizer.pad_token = "<|im_end|>"
    tokenizer(["a", "hello there"], padding="max_length", truncation=True, max_length=3)
    ids, *_ = next(rows(TextEncoder(tokenizer).encode_batch(["hello there general kenobi"])))
    assert tokenizer.decode(ids) == "hello there general kenobi"


def test_added_tokens_make_a_new_encoder():
    tokenizer = byte_tokenizer()
    first = text_encoder(tokenizer)
    assert text_encoder(tokenizer) is first
    tokenizer.add_tokens(["<new>"])
    ids, *_ = next(rows(text_encoder(tokenizer).encode_batch(["<new>"])))
    assert ids == [tokenizer.convert_tokens_to_ids("<new>")]


def test_a_tokenizer_without_a_fast_backend_is_named():
    class Slow:
        backend_tokenizer = None

    with pytest.raises(TokenizerError, match="Slow has no fast backend"):
        TextEncoder(Slow())


BPE = trained_bpe()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda t: not {OPEN, CLOSE} & set(t)),
        max_size=5,
    )
)
def test_any_text(texts):
    encoded = text_encoder(BPE).encode_batch(texts)
    assert len(encoded.offsets) == len(texts) + 1 and np.all(encoded.starts <= encoded.ends)
    for text, (ids, starts, ends) in zip(texts, rows(encoded), strict=True):
        assert ids == BPE(text, add_special_tokens=False)["input_ids"]
        assert starts == sorted(starts) and ends == sorted(ends)


@pytest.mark.real_model
def test_fastokens_gives_the_tokenizers_ids_over_all_real_texts(real_model_path):
    """HF_OBJECTIVES_TEST_TEXTS names a folder of JSON, JSON lines and text files."""
    folder = os.environ.get("HF_OBJECTIVES_TEST_TEXTS")
    if not folder:
        pytest.skip("no real texts: HF_OBJECTIVES_TEST_TEXTS names no folder")
    encoder = TextEncoder(AutoTokenizer.from_pretrained(real_model_path))
    assert encoder.backend == "fastokens"
    # Every string of every row, whatever its key: questions, answers, calls, documents.
    texts = list({text: None for row in load_rows(folder) for text in strings(row)})
    assert len(texts) > 1000
    ids, offsets = encoder.encode_ids(texts)
    for i, encoding in enumerate(encoder._slow.encode_batch(texts, add_special_tokens=False)):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == encoding.ids, texts[i]


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace])
def test_ids_alone_are_those_of_the_whole_encoding(make):
    encoder = TextEncoder(make())
    ids, offsets = encoder.encode_ids(TEXTS)
    encoded = encoder.encode_batch(TEXTS)
    assert ids.tolist() == encoded.ids.tolist() and offsets.tolist() == encoded.offsets.tolist()
    with pytest.raises(FormatError, match="half of a surrogate pair"):
        encoder.encode_ids(["half \ud800"])


def without_a_byte(byte: int) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary that never saw a byte, as SmolLM2's has none for six control characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = [letter for number, letter in bytes_to_unicode().items() if number != byte]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    backend.train_from_iterator(["hello there general"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("byte", "text"), [(0x13, "ab\x13cd"), (0xF0, "ab😀cd"), (0x98, "ab😀cd")])
def test_a_byte_without_a_token_is_named_not_left_out(monkeypatch, fast, byte, text):
    if not fast:
        monkeypatch.setattr(tokenization, "_load_fastokens", lambda *_: None)
    tokenizer = without_a_byte(byte)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) != text
    encoder = TextEncoder(tokenizer)
    for encode in (encoder.encode_ids, encoder.encode_batch):
        with pytest.raises(
            FormatError, match=rf"no token for .{re.escape(repr(text[2])[1:-1])}. \(byte {byte:02x}\) in .ab"
        ):
            encode(["fine", text])
    assert encoder.encode_ids(["fine"])[0].tolist() == tokenizer("fine")["input_ids"]


def test_a_row_with_a_byte_without_a_token_is_named_or_left_out():
    tokenizer = without_a_byte(0x13)
    texts = [{"text": "fine"}, {"text": "not\x13fine"}, {"text": "fine too"}]
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": row["text"]}]} for row in texts
    ]
    template = "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    tokenizer.chat_template = template
    for rows in (texts, chats):
        with pytest.raises(FormatError, match="source 's', row 1: the tokenizer has no token"):
            BatchEncoder(tokenizer, EncodingConfig()).encode(rows, source="s", numbers=[0, 1, 2])
        table, ledger = BatchEncoder(tokenizer, EncodingConfig(), on_error="skip").encode(
            rows, source="s", numbers=[0, 1, 2]
        )
        assert table["row"].to_pylist() == [0, 2]
        assert ledger["s"].rows_in == 3
    with pytest.raises(FormatError, match="row 1: the tokenizer has no token"):
        encode_chats(tokenizer, [row["messages"] for row in chats])


# -- bytes per token id, against decoding ---------------------------------------------------------------------------------


def test_byte_level():
    tokenizer = trained_bpe()
    lengths = token_byte_lengths(tokenizer)
    for text in ("hello there", "naïve 日本語 👩‍👩‍👧‍👦", "  \n\t"):
        assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_special_tokens_stand_for_no_text_or_for_their_name():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    special, added = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    assert token_byte_lengths(tokenizer)[[special, added]].tolist() == [0, 7]
    assert token_byte_lengths(tokenizer, special="text")[[special, added]].tolist() == [10, 7]


def test_metaspace_and_single_bytes():
    tokenizer = metaspace()
    lengths = token_byte_lengths(tokenizer, special="text")
    ids = tokenizer("hello there")["input_ids"]
    assert lengths[ids].sum() == len(" hello there")  # metaspace puts a space before the first word
    space = tokenizer.convert_tokens_to_ids("▁")
    assert lengths[space] == 1


def test_every_id_has_a_length():
    for tokenizer in (byte_tokenizer(), trained_bpe(), metaspace()):
        lengths = token_byte_lengths(tokenizer, special="text")
        assert lengths.shape == (len(tokenizer),) and lengths.dtype == np.int64 and (lengths > 0).all()
    assert TEXTS
