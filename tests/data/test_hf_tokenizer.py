"""Transformers' tokenizers: the ids of tokenizer.json, one BOS, templates with variables, keys."""

from __future__ import annotations

import datetime
import json
import pickle
import subprocess
import sys

import pytest

from hdp.config import TrainConfig
from hdp.data.prepare.cache import open_dataset
from hdp.data.prepare.deadline import Deadlines, RowTimeout
from hdp.data.prepare.documents import Document, Rejected
from hdp.data.prepare.hf_tokenizer import HFTokenizer
from hdp.data.prepare.tokenizer import CHATML, load_tokenizer, train_bpe
from tests.data.odd_templates import LLAMA, QWEN3
from tests.patience import patience

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

CORPUS = ["def plan(seqlens):\n    return [rank for rank in range(8)]\n1234 5678\n" * 20]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer as on the hub: with a BOS, an EOS and a chat template, and not one of ours."""
    path = tmp_path / "model"
    train_bpe(CORPUS, 400).save_pretrained(path)
    edit(path, hdp=None, bos_token="<|im_start|>")
    return path


def edit(path, **entries):
    file = path / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def encode(tokenizer, messages=None):
    [result] = tokenizer.encode_chats([Document(messages=messages or CHAT)])
    return result


# ---- D. ids are those of tokenizer.json ----


def splits_words(path):
    """Give tokenizer.json a pre-tokenizer that classes of transformers do not know."""
    file = path / "tokenizer.json"
    saved = json.loads(file.read_text())
    split = {"type": "Digits", "individual_digits": True}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, saved["pre_tokenizer"]]}
    file.write_text(json.dumps(saved))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_ids_are_those_of_the_file(folder, kind):
    from tokenizers import Tokenizer

    splits_words(folder)
    edit(folder, tokenizer_class=kind)
    tokenizer = load_tokenizer(str(folder))
    text = CORPUS[0] + " \u00e9\u4e2d 12345\r\n\t x"
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode_texts([text])[0].tolist() == file.encode(text).ids
    assert tokenizer.eos_id is not None and tokenizer.hf.chat_template == CHATML
    assert any("tokenizer.json" in note for note in tokenizer.notes()) == ("Fast" not in kind)
    assert pickle.loads(pickle.dumps(tokenizer)).notes() == tokenizer.notes()


# ---- E. all that goes into tokens is in the key ----


def test_fingerprint_covers_all_that_is_rendered(folder):
    def fingerprint(**entries):
        edit(folder, **entries)
        return load_tokenizer(str(folder)).fingerprint()

    seen = {fingerprint()}
    assert fingerprint() in seen
    for entries in (
        {"bos_token": "<|im_end|>"},
        {"eos_token": "<|im_end|>"},
        {"pad_token": "<|im_end|>"},
        {"chat_template": "{{ bos_token }}" + CHATML},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|new|>"]},
    ):
        new = fingerprint(**entries)
        assert new not in seen, entries
        seen.add(new)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.hf.add_bos_token = True
    assert tokenizer.fingerprint() not in seen
    (folder / "extra.jinja").write_text(CHATML + "{{ enable_thinking }}")
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        options = {"chat_template": str(folder / "extra.jinja"), "chat_template_kwargs": kwargs}
        new = load_tokenizer(str(folder), **options).fingerprint()
        assert new not in seen, kwargs
        seen.add(new)


def test_calls_do_not_change_the_fingerprint(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.hf.backend_tokenizer.enable_truncation(8)
    before = tokenizer.fingerprint()
    tokenizer.encode_texts(["text"])
    assert tokenizer.fingerprint() == before


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 7, 9)


def test_the_date_is_fixed(folder, monkeypatch):
    from transformers.utils import chat_template_utils

    edit(folder, chat_template=LLAMA)
    ids = encode(load_tokenizer(str(folder)))[0].tolist()
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tokenizer = load_tokenizer(str(folder))
    assert encode(tokenizer)[0].tolist() == ids
    assert "Today Date: 01 Jan 2025" in tokenizer.decode(ids)
    assert any("2025-01-01" in note for note in tokenizer.notes())


def test_a_date_that_cannot_be_fixed_is_in_the_key(folder, monkeypatch):
    template = "{% set f = '%d %b' %}{{ strftime_now(f) }}" + CHATML
    edit(folder, chat_template=template)
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer.fingerprint()
    assert any("each day" in note for note in tokenizer.notes())

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 7, 9)

    monkeypatch.setattr("hdp.data.prepare.hf_tokenizer.datetime.date", Date)
    assert tokenizer.fingerprint() != before


# ---- K. BOS and EOS ----


def test_one_bos(folder):
    from tokenizers import processors

    tokenizer = load_tokenizer(str(folder))
    bos = tokenizer.hf.bos_token_id
    single = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.hf.backend_tokenizer.post_processor = single
    without, with_bos = tokenizer.encode_texts(["text", "<|im_start|>text"])
    assert without.tolist() == with_bos.tolist() and without.tolist().count(bos) == 1
    tokenizer.hf.chat_template = "{{ bos_token }}" + CHATML
    assert encode(tokenizer)[0].tolist()[:2] == [bos, bos]  # its own, and that of the first turn
    tokenizer.hf.chat_template = CHATML
    assert encode(tokenizer)[0].tolist().count(bos) == 2  # one for each turn, none added
    assert tokenizer.encode_texts([]) == []


def test_no_eos_is_said(folder, tmp_path):
    edit(folder, eos_token=None)
    (tmp_path / "data.jsonl").write_text('{"text": "some text"}\n' * 3)
    dataset = open_dataset(
        str(tmp_path / "data.jsonl"), tokenizer=str(folder), cache_dir=tmp_path / "cache"
    )
    assert str(dataset.report).count("has no EOS") == 1


# ---- template arguments ----


def test_another_template_and_its_variables(folder, tmp_path):
    file = tmp_path / "qwen3.jinja"
    file.write_text(QWEN3)
    plain = load_tokenizer(str(folder), chat_template=str(file))
    ids, mask = encode(plain)
    assert plain.decode(ids[mask]) == "<think>\n\n</think>\n\nYes.<|im_end|>"
    options = {"chat_template": str(file), "chat_template_kwargs": {"enable_thinking": False}}
    quiet = load_tokenizer(str(folder), **options)
    again, mask = encode(quiet)
    assert again.tolist() == ids.tolist()
    assert quiet.decode(again[mask]) == "Yes.<|im_end|>"  # the empty block is in the prompt
    quiet.save_pretrained(tmp_path / "export")
    assert load_tokenizer(str(tmp_path / "export")).hf.chat_template == QWEN3


def test_a_named_template(folder):
    named = [{"name": "default", "template": CHATML}, {"name": "other", "template": "x" + CHATML}]
    edit(folder, chat_template=named)
    tokenizer = load_tokenizer(str(folder), chat_template="other")
    assert tokenizer.decode(encode(tokenizer)[0]).startswith("x<|im_start|>")


def test_wrong_templates_are_one_clear_error(folder, tmp_path):
    for template in ("nope.jinja", "other", str(tmp_path)):
        with pytest.raises(ValueError, match=r"--chat-template .* is neither a file nor"):
            load_tokenizer(str(folder), chat_template=template)
    empty = tmp_path / "empty.jinja"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        load_tokenizer(str(folder), chat_template=str(empty))
    empty.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--chat-template .*empty.jinja: "):
        load_tokenizer(str(folder), chat_template=str(empty))
    empty.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"chat template of .* is not valid"):
        encode(load_tokenizer(str(folder), chat_template=str(empty)))
    for kwargs in ({"enable_thinkin": False}, {"messages": []}, {"tokenize": True}):
        with pytest.raises(ValueError, match="does not read"):
            load_tokenizer(str(folder), chat_template_kwargs=kwargs)
    for name in ("bytes", "bpe:400"):
        with pytest.raises(ValueError, match="need a Hugging Face tokenizer"):
            open_dataset("stdlib", tokenizer=name, chat_template="x.jinja", cache_dir=tmp_path)


def test_flags():
    config = TrainConfig(chat_template_kwargs='{"enable_thinking": false}')
    assert config.template_variables == {"enable_thinking": False}
    for wrong in ("{", "enable_thinking=false", "[1]", "3"):
        with pytest.raises(ValueError, match="--chat-template-kwargs"):
            TrainConfig(chat_template_kwargs=wrong)


# ---- loops without end ----

LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


def test_a_template_without_end_is_stopped(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.hf.chat_template = (
        "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHATML
    )
    tokenizer = HFTokenizer(tokenizer.hf, row_limit_s=0.2)
    chats = [Document(messages=[{"role": "user", "content": "loop"}, CHAT[1]])]
    bad, good = tokenizer.encode_chats([*chats, Document(messages=CHAT)])
    assert isinstance(bad, Rejected) and "does a loop in it end?" in bad.detail
    assert not isinstance(good, Rejected)
    with pytest.raises(ValueError, match="3 chats: the template takes more than"):
        tokenizer.encode_chats(chats * 3)


def test_deadlines_bound_one_row_and_no_other():
    def loop(deadlines: Deadlines) -> None:
        with deadlines.row(0.05):
            while True:
                pass

    done = 0
    with Deadlines() as deadlines:
        for _ in range(3):
            with pytest.raises(RowTimeout):
                loop(deadlines)
            with deadlines.row(60):
                done += 1
    assert done == 3


def test_a_deadline_leaves_nothing_behind_that_stops_a_profiler():
    """A withdrawn exception would: the interpreter looks for it for ever. In a process of its own,
    which can be ended."""
    program = """
import sys
from hdp.data.prepare.deadline import Deadlines, RowTimeout

def overdue(swallow):
    try:
        while True:
            pass
    except RowTimeout:
        if not swallow:
            raise

with Deadlines() as deadlines:
    for swallow in (False, True):
        try:
            with deadlines.row(0.1):
                overdue(swallow)
        except RowTimeout:
            print("timeout")
calls = []
sys.setprofile(lambda frame, event, argument: calls.append(event))
(lambda: None)()
sys.setprofile(None)
print("call" in calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=patience(60)
    )
    assert done.stdout.split() == ["timeout", "True"], done.stderr
