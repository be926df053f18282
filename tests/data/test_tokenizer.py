"""Byte, byte-pair and Hugging Face tokenizers: the same contract, the same chats."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.prepare.documents import Document, Rejected
from hdp.data.prepare.tokenizer import (
    CHATML,
    EOS,
    BpeTokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from tests.data.chat_templates import KINDS, expected

pytest.importorskip("tokenizers")

CORPUS = [
    "def plan(seqlens):\n    return [rank for rank in range(8)]\n" * 20,
    "class Ring:\n\tdef __init__(self, ranks):\n\t\tself.ranks = ranks\n" * 20,
    "user\nassistant\nHello, how are you? \u00c4\u00d6\u00dc 12345 \U0001f600\n" * 20,
]
TEXTS = [*CORPUS, "", "x", "\r\n \t\u00a0\u2028\x00", f"a{EOS}b<|im_end|>", "\ufeffbom", "\x85" * 9]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello? <|im_end|> 1+1"},
    {"role": "assistant", "content": "\n Two \u00e4\U0001f600\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Bye"},
]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe(CORPUS, 320)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(saved):
    pytest.importorskip("transformers")
    from hdp.models.huggingface import load_tokenizer

    return load_tokenizer(saved)


def test_round_trip(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_texts(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(any_text)
def test_any_text_round_trips(text):
    tokenizer = _shared_bpe()
    assert tokenizer.decode(tokenizer.encode_texts([text])[0]) == text
    assert ByteTokenizer().decode(ByteTokenizer().encode_texts([text])[0]) == text


_CACHE: list[BpeTokenizer] = []


def _shared_bpe() -> BpeTokenizer:
    if not _CACHE:
        _CACHE.append(train_bpe(CORPUS, 320))
    return _CACHE[0]


def test_special_tokens_in_a_document_are_plain_text(tokenizer):
    specials = {tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id}
    assert len(specials) == 3
    [ids] = tokenizer.encode_texts([f"a{EOS}b<|im_end|><|im_start|>"])
    assert not specials & set(ids.tolist())
    assert tokenizer.decode([tokenizer.eos_id]) == EOS


def test_byte_tokens_are_bytes():
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer().encode_texts(["a\u00e9"])[0].tolist() == [97, 195, 169]


def test_training_is_deterministic_and_the_result_pickles(bpe):
    again = train_bpe(iter(CORPUS), 320)
    assert again.fingerprint() == bpe.fingerprint() and again.vocab_size == 320
    assert train_bpe(CORPUS[:2], 320).fingerprint() != bpe.fingerprint()
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint() == bpe.fingerprint()
    np.testing.assert_array_equal(copy.encode_texts(CORPUS)[0], bpe.encode_texts(CORPUS)[0])


def test_small_corpora_and_sizes():
    assert train_bpe(["aaaa"], 4096).vocab_size < 4096  # nothing more to merge
    assert train_bpe([], 300).vocab_size == 259
    with pytest.raises(ValueError, match="need 259"):
        train_bpe(CORPUS, 258)


def test_chat_mask(tokenizer):
    [(ids, mask)] = tokenizer.encode_chats([Document(messages=CHAT)])
    kind = KINDS["chatml"]
    text, _ = expected(kind, CHAT)
    assert tokenizer.decode(ids) == text
    learned = tokenizer.decode(ids[mask])
    assert learned.endswith("\n Two \u00e4\U0001f600\n<|im_end|>Bye<|im_end|>")
    assert learned.strip("\n").startswith(" Two")  # a token may include the header's line break


def test_transformers_loads_saved_tokenizers(tokenizer, hf):
    for text, ids in zip(TEXTS, tokenizer.encode_texts(TEXTS), strict=True):
        if EOS not in text:  # transformers parses it as the token
            assert hf(text)["input_ids"] == ids.tolist()
    assert (hf.eos_token, hf.eos_token_id) == (EOS, tokenizer.eos_id)
    assert max(hf.get_vocab().values()) + 1 == tokenizer.vocab_size
    chat = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in CHAT]
    [(ids, mask)] = tokenizer.encode_chats([Document(messages=chat)])
    theirs = hf.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids.tolist()
    assert theirs["assistant_masks"] == mask.astype(int).tolist()
    ours = HFTokenizer(hf).encode_chats([Document(messages=chat)])[0]
    np.testing.assert_array_equal(ours[0], ids)
    np.testing.assert_array_equal(ours[1], mask)


def test_saved_tokenizers_load_without_transformers(tokenizer, saved):
    loaded = load_tokenizer(str(saved))
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_messages_in_parts_and_unsupported_content(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    whole = [{"role": "assistant", "content": "ab"}]
    split = [{"role": "assistant", "content": parts}]
    image = [{"role": "assistant", "content": [{"type": "image"}]}]
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    chats = [Document(messages=m) for m in (whole, split, image, call)]
    first, second, third, fourth = tokenizer.encode_chats(chats)
    np.testing.assert_array_equal(first[0], second[0])
    assert isinstance(third, Rejected) and isinstance(fourth, Rejected)
    assert "tool calls" in fourth.detail


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "phi3", "zephyr"])
def test_hf_chats_match_the_oracle(bpe, tmp_path, name):
    """Token masks of real tokenizers for several kinds of templates."""
    pytest.importorskip("transformers")
    from hdp.models.huggingface import load_tokenizer

    kind = KINDS[name]
    bpe.save_pretrained(tmp_path)
    hf = load_tokenizer(tmp_path)
    hf.add_special_tokens({"eos_token": kind.eos, "additional_special_tokens": list(kind.special)})
    if kind.special[0] in ("<s>", "<|begin_of_text|>"):
        hf.add_special_tokens({"bos_token": kind.special[0]})
    hf.chat_template = kind.template
    chat = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in CHAT]
    tokenizer = pickle.loads(pickle.dumps(HFTokenizer(hf)))
    [(ids, mask)] = tokenizer.encode_chats([Document(messages=chat)])
    text, spans = expected(kind, chat)
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == hf.apply_chat_template(chat, return_dict=True)["input_ids"]
    learned = tokenizer.decode(ids[mask])
    wanted = "".join(text[start:stop] for start, stop in spans)
    assert learned.replace("\n", "").replace(" ", "") == wanted.replace("\n", "").replace(" ", "")
    assert ids[mask].tolist().count(hf.convert_tokens_to_ids(kind.eos)) == (
        0 if name == "phi3" else 2
    )


def test_hf_texts_keep_the_bos_but_not_truncation(bpe, tmp_path):
    """The tokenizer's BOS is kept; saved truncation and padding settings are not."""
    pytest.importorskip("transformers")
    from tokenizers import processors

    from hdp.models.huggingface import load_tokenizer

    bpe.save_pretrained(tmp_path)
    hf = load_tokenizer(tmp_path)
    hf.add_special_tokens({"bos_token": "<s>"})
    bos = hf.convert_tokens_to_ids("<s>")
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    hf.backend_tokenizer.post_processor = template
    hf.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer = HFTokenizer(hf)
    assert tokenizer.vocab_size == 321
    ids = tokenizer.encode_texts([CORPUS[0], "a"])
    assert ids[0].tolist() == [bos, *bpe.encode_texts([CORPUS[0]])[0].tolist()]
    assert len(ids[1]) == 2


def test_hf_without_a_chat_template(hf):
    template, hf.chat_template = hf.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            HFTokenizer(hf).encode_chats([Document(messages=CHAT)])
    finally:
        hf.chat_template = template


def test_hf_template_that_rejects_a_chat(hf):
    template = hf.chat_template
    hf.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
        + CHATML
    )
    try:
        chats = [Document(messages=CHAT), Document(messages=CHAT[1:])]
        rejected, (ids, mask) = HFTokenizer(hf).encode_chats(chats)
    finally:
        hf.chat_template = template
    assert isinstance(rejected, Rejected) and "No system!" in rejected.detail
    assert len(ids) == len(mask) > 0


def test_unknown_tokenizers(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="not a tokenizer trained by hdp"):
        BpeTokenizer('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
