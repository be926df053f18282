"""Tokenizers for text and chats: bytes, byte pairs trained on the data, or Hugging Face's.

    "bytes"          256 ids; three bytes that never occur in UTF-8 serve as special tokens
    "bpe:4096"       byte-level byte pairs, trained once on the data and cached
    path or name     any tokenizer from a folder or the hub, with its chat template

The first two write chats in ChatML and treat special tokens that occur in a document as plain text;
they are saved as files that transformers loads, template included. A Hugging Face tokenizer behaves
as usual: it adds its BOS and parses special tokens that occur in the text.

Only this file imports `tokenizers`; transformers is reached through `hdp.models.huggingface`.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hdp.errors import ChatTemplateError
from hdp.installation import pip_install

from .base import Chat, Tokenizer
from .chat import spans2mask
from .chatml import (
    CHATML as CHATML,
)
from .chatml import EOS, IM_END, IM_START, SPECIAL_TOKENS, byte_characters, save_files
from .documents import TEMPLATE, Document, Rejected
from .hf_tokenizer import HFTokenizer, use_template
from .messages import CALLS, THOUGHT, Messages, normalize
from .words import SPLIT, pieces

MIN_BPE_SIZE = 256 + len(SPECIAL_TOKENS)
_PIECE_CHARACTERS, _NUM_PIECES = 1 << 16, 8  # of a long text, encoded at once


class _ChatMLTokenizer(Tokenizer):
    """Chats for the tokenizers built here. Subclasses encode one turn."""

    eos_id: int
    im_start_id: int
    im_end_id: int

    @abstractmethod
    def _encode_turn(self, header: str, body: str) -> Chat:
        """Ids of header + body, and which of them contain a part of the body."""

    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        return [self._encode_chat(chat) for chat in chats]

    def encode_completions(self, documents: Sequence[Document]) -> list[Chat | Rejected]:
        return [self._encode_turn(d.prompt or "", d.completion or "") for d in documents]

    def _encode_chat(self, chat: Document) -> Chat | Rejected:
        try:
            messages, learns = normalize(chat.messages or [])
            _check_is_text(messages, chat.tools, self.name)
        except ChatTemplateError as error:
            return Rejected(reason=TEMPLATE, detail=str(error))
        [line_end] = self.encode_texts(["\n"])
        ids: list[Any] = []
        mask: list[Any] = []
        for message, has_loss in zip(messages, learns, strict=True):
            header, body = f"{message['role']}\n", message.get("content", "")
            turn_ids, is_body = self._encode_turn(header, body)
            ids += [[self.im_start_id], turn_ids, [self.im_end_id], line_end]
            mask += [[False], is_body & has_loss, [has_loss], np.zeros(len(line_end), bool)]
        return np.concatenate(ids).astype(np.uint32), np.concatenate(mask).astype(bool)


class ByteTokenizer(_ChatMLTokenizer):
    """One token per UTF-8 byte. 0xFD to 0xFF never occur in UTF-8 and act as special tokens."""

    name = "bytes"
    vocab_size = 256
    im_end_id, im_start_id, eos_id = 0xFD, 0xFE, 0xFF

    def fingerprint(self) -> str:
        return "bytes-2"

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def _encode_turn(self, header: str, body: str) -> Chat:
        [ids] = self.encode_texts([header + body])
        return ids, np.arange(len(ids)) >= len(header.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.eos_id: EOS, self.im_start_id: IM_START, self.im_end_id: IM_END}
        parts = [special.get(i, "").encode() or bytes([i]) for i in map(int, ids)]
        return b"".join(parts).decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        library = _tokenizers()
        byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        special = {self.eos_id: EOS, self.im_start_id: IM_START, self.im_end_id: IM_END}
        vocab = {special.get(byte, char): byte for byte, char in enumerate(byte_characters())}
        backend = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = byte_level
        backend.decoder = library.decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        save_files(folder, backend.to_str(), kind="bytes")


class BpeTokenizer(_ChatMLTokenizer):
    """Byte-level byte pairs: any text can be encoded, and decoding restores it exactly."""

    def __init__(self, backend_json: str) -> None:
        """`backend_json`: the contents of a tokenizer.json created by `train_bpe`."""
        self._backend = _tokenizers().Tokenizer.from_str(backend_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # in a document, they are plain text
        vocab = self._backend.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise ValueError(
                f"not a tokenizer trained by hdp: it lacks {missing}; retrain it with bpe:SIZE"
            )
        self.eos_id, self.im_start_id, self.im_end_id = (vocab[token] for token in SPECIAL_TOKENS)
        self._json = backend_json
        self._can_cut = json.dumps(SPLIT) in backend_json  # of another split, cuts are not known
        self.vocab_size = self._backend.get_vocab_size()
        self.name = f"bpe:{self.vocab_size}"

    def __reduce__(self) -> tuple[Any, ...]:
        return BpeTokenizer, (self._json,)

    def fingerprint(self) -> str:
        return "bpe-2-" + hashlib.sha256(self._json.encode()).hexdigest()

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= _PIECE_CHARACTERS]
        encodings = iter(self._backend.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.array(next(encodings).ids, dtype=np.uint32)
            if len(text) <= _PIECE_CHARACTERS
            else self._encode_long(text)
            for text in texts
        ]

    def _encode_long(self, text: str) -> np.ndarray:
        """The ids of a text, a few pieces at a time: encoding takes 170 times its memory."""
        dtype = np.min_scalar_type(self.vocab_size - 1)
        parts, ids = self._pieces(text), [np.zeros(0, dtype=dtype)]
        while group := list(islice(parts, _NUM_PIECES)):
            encodings = self._backend.encode_batch_fast(group, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
        return np.concatenate(ids)

    def _pieces(self, text: str) -> Iterator[str]:
        return pieces(text, _PIECE_CHARACTERS) if self._can_cut else iter([text])

    def _encode_turn(self, header: str, body: str) -> Chat:
        span, start = (len(header), len(header) + len(body)), 0
        ids, mask = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=bool)]
        for piece in self._pieces(header + body):
            encoding = self._backend.encode(piece, add_special_tokens=False)
            ids.append(np.array(encoding.ids, dtype=np.uint32))
            mask.append(spans2mask(np.array(encoding.offsets).reshape(-1, 2) + start, [span]))
            start += len(piece)
        return np.concatenate(ids), np.concatenate(mask)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save_pretrained(self, folder: str | Path) -> None:
        save_files(folder, self._json, kind="bpe")


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> BpeTokenizer:
    """A byte-pair tokenizer with at most `vocab_size` ids; deterministic for the same texts.

    Raises ValueError if vocab_size is too small for all bytes and the special tokens.
    """
    if vocab_size < MIN_BPE_SIZE:
        raise ValueError(
            f"a byte-pair tokenizer of {vocab_size} ids is too small: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens need {MIN_BPE_SIZE}; add some for merges, as in "
            "bpe:4096"
        )
    library = _tokenizers()
    words = library.pre_tokenizers.Split(library.Regex(SPLIT), behavior="isolated")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    parts = (part for text in texts for part in pieces(text, _PIECE_CHARACTERS))
    backend.train_from_iterator(parts, trainer)
    return BpeTokenizer(backend.to_str())


def load_tokenizer(
    path: str,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer "bytes", one from a folder written by `save_pretrained`, or transformers'.

    chat_template and chat_template_kwargs: see `hf_tokenizer.use_template`; only transformers'
    tokenizers take them. Raises ValueError if there is no such tokenizer or template.
    """
    folder = Path(path).expanduser()
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    kind = "bytes" if path == "bytes" else config.get("hdp")
    if kind in ("bytes", "bpe"):
        check_no_template(path, chat_template, chat_template_kwargs)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BpeTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    from hdp.models import huggingface

    name = str(folder) if folder.exists() else path
    hf = huggingface.load_tokenizer(name)
    kwargs = dict(chat_template_kwargs or {})
    use_template(hf, name, chat_template, kwargs)
    return HFTokenizer(hf, name, template_kwargs=kwargs)


def check_no_template(name: str, template: str | None, kwargs: Mapping[str, Any] | None) -> None:
    """Raise ValueError if a chat template is given for a tokenizer that only writes ChatML."""
    if template or kwargs:
        raise ValueError(
            f"tokenizer {name} writes chats in ChatML: --chat-template and --chat-template-kwargs "
            "need a Hugging Face tokenizer"
        )


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"byte-pair tokenizers require the package `tokenizers`: {pip_install('hf')}, or use "
            "--tokenizer bytes"
        ) from None
    return tokenizers


def _check_is_text(messages: Messages, tools: Any, name: str) -> None:
    """Raise ChatTemplateError for what ChatML, as it is written here, cannot say."""
    if tools:
        raise ChatTemplateError(f"{name} supports only text, no tool definitions")
    for i, message in enumerate(messages):
        if CALLS in message or THOUGHT in message:
            raise ChatTemplateError(
                f"message {i}: {name} supports only text, no tool calls and no reasoning"
            )
