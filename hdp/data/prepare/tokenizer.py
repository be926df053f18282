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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .chat import ChatTemplate, spans2mask
from .chatml import (
    CHATML as CHATML,
)
from .chatml import EOS, IM_END, IM_START, SPECIAL_TOKENS, byte_characters, save_files
from .documents import TEMPLATE, Document, Rejected
from .words import SPLIT, pieces

MIN_BPE_SIZE = 256 + len(SPECIAL_TOKENS)
_PIECE_CHARACTERS, _NUM_PIECES = 1 << 16, 8  # of a long text, encoded at once

Chat = tuple[np.ndarray, np.ndarray]  # (seqlen,) ids and (seqlen,) bool: the assistant's tokens


class Tokenizer(ABC):
    """The tokenizer interface of this package. Must be picklable: workers get copies."""

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    eos_id: int | None
    has_chat_template = True

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever ids may change."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(num_tokens,) integer ids per text, without an EOS."""

    @abstractmethod
    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        """(ids, loss mask) per chat, or why there are none."""

    def encode_completions(self, documents: Sequence[Document]) -> list[Chat | Rejected]:
        """(ids, loss mask) per prompt with its completion, without an EOS.

        A token with a character of the completion has a loss. Raises ValueError if the tokenizer
        does not know which characters a token has.
        """
        raise ValueError(f"tokenizer {self.name} does not support rows with prompt and completion")

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, including special tokens."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers and `load_tokenizer` read."""


class _ChatMLTokenizer(Tokenizer):
    """Chats for the tokenizers built here. Subclasses encode one turn."""

    eos_id: int
    im_start_id: int
    im_end_id: int

    @abstractmethod
    def _encode_turn(self, header: str, body: str) -> Chat:
        """Ids of header + body, and which of them contain a part of the body."""

    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        return [self._encode_chat(chat.messages or []) for chat in chats]

    def encode_completions(self, documents: Sequence[Document]) -> list[Chat | Rejected]:
        return [self._encode_turn(d.prompt or "", d.completion or "") for d in documents]

    def _encode_chat(self, messages: list[dict[str, Any]]) -> Chat | Rejected:
        [line_end] = self.encode_texts(["\n"])
        ids: list[Any] = []
        mask: list[Any] = []
        for i, message in enumerate(messages):
            body = _plain_content(message)
            if body is None:
                detail = f"message {i}: {self.name} supports only text, no images or tool calls"
                return Rejected(reason=TEMPLATE, detail=detail)
            turn_ids, is_body = self._encode_turn(f"{message['role']}\n", body)
            has_loss = message["role"] == "assistant"
            ids += [[self.im_start_id], turn_ids, [self.im_end_id], line_end]
            mask += [[False], is_body & has_loss, [has_loss], np.zeros(len(line_end), bool)]
        return np.concatenate(ids).astype(np.uint32), np.concatenate(mask).astype(bool)


class ByteTokenizer(_ChatMLTokenizer):
    """One token per UTF-8 byte. 0xFD to 0xFF never occur in UTF-8 and act as special tokens."""

    name = "bytes"
    vocab_size = 256
    im_end_id, im_start_id, eos_id = 0xFD, 0xFE, 0xFF

    def fingerprint(self) -> str:
        return "bytes-1"

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
        return "bpe-" + hashlib.sha256(self._json.encode()).hexdigest()

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


class HFTokenizer(Tokenizer):
    """A transformers tokenizer, unmodified."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """`tokenizer`: the result of `hdp.models.huggingface.load_tokenizer`."""
        self.hf = tokenizer
        self.name = name or str(getattr(tokenizer, "name_or_path", "") or "hf")
        self.eos_id = tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.has_chat_template = bool(tokenizer.chat_template)
        self._templates: dict[str, ChatTemplate] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_templates": {}}

    def fingerprint(self) -> str:
        backend = getattr(self.hf, "backend_tokenizer", None)
        model = (
            backend.to_str() if backend is not None else repr(sorted(self.hf.get_vocab().items()))
        )
        state = json.dumps([model, repr(self.hf.chat_template), self.eos_id])
        return "hf-" + hashlib.sha256(state.encode()).hexdigest()

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:  # which transformers does not accept
            return []
        encoded = self._call(list(texts), add_special_tokens=True)
        return [np.array(ids, dtype=np.uint32) for ids in encoded["input_ids"]]

    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        self._check_chats()
        results: list[Any] = [self._render(chat) for chat in chats]
        rendered = [i for i, result in enumerate(results) if not isinstance(result, Rejected)]
        if not rendered:
            return results
        texts = [results[i][0] for i in rendered]
        encoded = self._call(texts, add_special_tokens=False, return_offsets_mapping=True)
        for i, ids, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            results[i] = (
                np.array(ids, dtype=np.uint32),
                spans2mask(np.array(offsets), results[i][1]),
            )
        return results

    def encode_completions(self, documents: Sequence[Document]) -> list[Chat | Rejected]:
        if not documents:
            return []
        self._check_offsets("rows with prompt and completion")
        texts = [(d.prompt or "") + (d.completion or "") for d in documents]
        encoded = self._call(texts, add_special_tokens=True, return_offsets_mapping=True)
        results: list[Chat | Rejected] = []
        for document, text, ids, offsets in zip(
            documents, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            mask = spans2mask(np.array(offsets), [(len(document.prompt or ""), len(text))])
            if ids and ids[-1] == self.eos_id:  # added by the tokenizer, it has no characters
                mask[-1] = True
            results.append((np.array(ids, dtype=np.uint32), mask))
        return results

    def decode(self, ids: Iterable[int]) -> str:
        return self.hf.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def save_pretrained(self, folder: str | Path) -> None:
        self.hf.save_pretrained(str(folder))

    def _check_chats(self) -> None:
        if not self.hf.chat_template:
            raise ValueError(
                f"the data contains chats, but tokenizer {self.name} has no chat template: use an "
                "instruct model's tokenizer, add chat_template.jinja to its folder, or use bpe or "
                "bytes"
            )
        self._check_offsets("chats")

    def _check_offsets(self, what: str) -> None:
        if not self.hf.is_fast:
            raise ValueError(
                f"tokenizer {self.name} does not provide character offsets, which the loss mask of "
                f"{what} requires: use a fast tokenizer (tokenizer.json)"
            )

    def _call(self, texts: list[str], **options: Any) -> Any:
        return self.hf(
            texts,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )

    def _render(self, chat: Document) -> Any:
        try:
            template = self.hf.get_chat_template(None, chat.tools)
            if template not in self._templates:
                self._templates[template] = self._chat_template(template)
            return self._templates[template].render_spans(chat.messages or [], chat.tools)
        except Exception as error:  # templates may raise anything
            return Rejected(reason=TEMPLATE, detail=f"{type(error).__name__}: {error}")

    def _chat_template(self, template: str) -> ChatTemplate:
        added = self.hf.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}

        def render(messages: Any, **options: Any) -> str:
            return self.hf.apply_chat_template(messages, tokenize=False, **options)

        return ChatTemplate(
            render,
            template,
            special_tokens=sorted(special | set(self.hf.all_special_tokens)),
            eos_token=self.hf.eos_token,
        )


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


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer "bytes", one from a folder written by `save_pretrained`, or transformers'."""
    if path == "bytes":
        return ByteTokenizer()
    folder = Path(path).expanduser()
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if config.get("hdp") == "bytes":
        return ByteTokenizer()
    if config.get("hdp") == "bpe":
        return BpeTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    from hdp.models import huggingface

    name = str(folder) if folder.exists() else path
    return HFTokenizer(huggingface.load_tokenizer(name), name)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "byte-pair tokenizers require the package `tokenizers`: pip install 'hdp[hf]', or use "
            "the tokenizer bytes"
        ) from None
    return tokenizers


def _plain_content(message: dict[str, Any]) -> str | None:
    """A message's text; None if the message contains anything else."""
    content = message.get("content", "")
    if message.get("tool_calls"):
        return None
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return None if None in parts else "".join(map(str, parts))
    return content if isinstance(content, str) else None
