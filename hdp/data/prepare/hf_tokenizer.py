"""HFTokenizer: the tokenizer of a model, as transformers loads it, with its chat template."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import Chat, Tokenizer
from .chat import ChatTemplate, spans2mask
from .deadline import Deadlines, RowTimeout
from .documents import TEMPLATE, Document, Rejected

_RENDERING = 2  # a new number when the same chat gives other tokens or another mask
_ROW_LIMIT_S, _CHARACTERS_PER_S = 20.0, 20_000  # time that a template may take for one chat
_MAX_TIMEOUTS = 3
# What the template gets from us, or what would make `apply_chat_template` do something else.
_RESERVED = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "add_generation_prompt"),
        *("continue_final_message", "chat_template", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    )
)
# Templates that print today's date would give other tokens each day.
DATE = datetime.date(2025, 1, 1)
_NOW = re.compile(r"""strftime_now\(\s*(?:"([^"\\{}]*)"|'([^'\\{}]*)')\s*\)""")


class HFTokenizer(Tokenizer):
    """A transformers tokenizer, unmodified.

    Two things differ from calling it directly: text that already starts with the BOS does not get a
    second one, and templates that print today's date print DATE.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        row_limit_s: float = _ROW_LIMIT_S,
    ) -> None:
        """`tokenizer`: the result of `hdp.models.huggingface.load_tokenizer`.

        template_kwargs: variables for the chat template. row_limit_s: how long it may take for a
        short chat; a chat that takes longer is rejected.
        """
        self.hf = tokenizer
        self.name = name or str(getattr(tokenizer, "name_or_path", "") or "hf")
        self.eos_id = tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._template_kwargs = dict(template_kwargs or {})
        self._row_limit_s, self._num_timeouts = row_limit_s, 0
        self.has_chat_template = bool(tokenizer.chat_template)
        self._templates: dict[str, ChatTemplate] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_templates": {}}

    def fingerprint(self) -> str:
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is not None:
            model = json.loads(backend.to_str())
            for setting in ("truncation", "padding"):  # calls change them, and they have no effect
                model.pop(setting, None)
        else:
            model = sorted(self.hf.get_vocab().items())
        state = {
            "model": model,
            "class": type(self.hf).__name__,
            "templates": repr(self.hf.chat_template),
            "template_kwargs": repr(sorted(self._template_kwargs.items())),
            "special_tokens": repr(sorted(self.hf.special_tokens_map.items())),
            "all_special_tokens": sorted(map(str, self.hf.all_special_tokens)),
            "adds": [getattr(self.hf, f"add_{name}_token", None) for name in ("bos", "eos")],
            "eos_id": self.eos_id,
            "rendering": _RENDERING,
            # A date in a format that only rendering shows cannot be fixed.
            "day": str(datetime.date.today()) if self._prints_the_day else "",
        }
        return "hf-" + hashlib.sha256(json.dumps(state, default=str).encode()).hexdigest()

    def notes(self) -> list[str]:
        notes = [getattr(self.hf, "hdp_note", "")]
        if self.eos_id is None:
            notes.append(
                f"tokenizer {self.name} has no EOS: nothing marks where a document ends, and the "
                "model will not learn to stop"
            )
        if self._prints_the_day:
            notes.append("the chat template prints today's date: chats are tokenized anew each day")
        elif "strftime_now(" in _sources(self.hf):
            notes.append(f"the chat template prints today's date: it is {DATE} in all chats")
        return [note for note in notes if note]

    @property
    def _prints_the_day(self) -> bool:
        return "strftime_now(" in _fix_date(_sources(self.hf))

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        encoded = self._call(list(texts), add_special_tokens=True)["input_ids"]
        ids = [self._with_one_bos(*pair) for pair in zip(texts, encoded, strict=True)]
        return [np.array(one, dtype=np.uint32) for one in ids]

    def _with_one_bos(self, text: str, ids: list[int]) -> list[int]:
        """`ids` without the BOS that was added to a text that has one."""
        bos = self.hf.bos_token_id
        has_own = bos is not None and text.lstrip().startswith(str(self.hf.bos_token))
        return ids[1:] if has_own and ids[:2] == [bos, bos] else ids

    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        self._check_chats()
        with Deadlines() as deadlines:
            results: list[Any] = [self._render_in_time(chat, deadlines) for chat in chats]
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
            kept = self._with_one_bos(text, ids)
            results.append((np.array(kept, dtype=np.uint32), mask[len(ids) - len(kept) :]))
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

    def _render_in_time(self, chat: Document, deadlines: Deadlines) -> Any:
        limit_s = self._row_limit_s + len(repr(chat.messages)) / _CHARACTERS_PER_S
        try:
            with deadlines.row(limit_s):
                return self._render(chat)
        except RowTimeout:
            self._num_timeouts += 1
        detail = f"the template takes more than {limit_s:.0f} s: does a loop in it end?"
        if self._num_timeouts >= _MAX_TIMEOUTS:
            raise ValueError(f"chat template of {self.name}, {_MAX_TIMEOUTS} chats: {detail}")
        return Rejected(reason=TEMPLATE, detail=detail)

    def _render(self, chat: Document) -> Any:
        """(text, spans) of a chat, or a Rejected."""
        try:
            template = self.hf.get_chat_template(None, chat.tools)
            if template not in self._templates:
                self._templates[template] = self._chat_template(_fix_date(template))
            return self._templates[template].render_spans(chat.messages or [], chat.tools)
        except Exception as error:  # templates may raise anything
            kind = type(error).__name__
            if kind == "TemplateSyntaxError":
                raise ValueError(f"chat template of {self.name} is not valid: {error}") from error
            return Rejected(reason=TEMPLATE, detail=f"{kind}: {error}")

    def _chat_template(self, template: str) -> ChatTemplate:
        added = self.hf.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}

        def render(messages: Any, **options: Any) -> str:
            return self.hf.apply_chat_template(
                messages, tokenize=False, **self._template_kwargs, **options
            )

        return ChatTemplate(
            render,
            template,
            special_tokens=sorted(special | set(self.hf.all_special_tokens)),
            eos_token=self.hf.eos_token,
        )


def use_template(hf: Any, name: str, template: str | None, kwargs: Mapping[str, Any]) -> None:
    """Give the transformers tokenizer `hf` another chat template, and check variables for it.

    Args:
        name: of the tokenizer, for messages.
        template: a file, or the name of one of the templates that the tokenizer comes with.
        kwargs: variables that the template reads, such as {"enable_thinking": False}.

    Raises ValueError for a template that does not exist and for variables that it does not read.
    """
    if template is not None:
        hf.chat_template = _find_template(hf, name, template)
    source = _sources(hf)
    for key in kwargs:
        if key in _RESERVED or not re.search(rf"\b{re.escape(key)}\b", source):
            raise ValueError(
                f"--chat-template-kwargs: the chat template of {name} does not read {key!r}"
            )


def _sources(hf: Any) -> str:
    """The source of all chat templates of a transformers tokenizer."""
    known = hf.chat_template or ""
    return "\n".join(known.values()) if isinstance(known, dict) else known


def _find_template(hf: Any, name: str, template: str) -> str:
    path = Path(template).expanduser()
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {template}: {error}") from error
        if not source.strip():
            raise ValueError(f"--chat-template {template}: the file is empty")
        return source
    named = hf.chat_template if isinstance(hf.chat_template, dict) else {}
    if template in named:
        return named[template]
    raise ValueError(
        f"--chat-template {template!r} is neither a file nor one of the templates of {name}: "
        f"{', '.join(sorted(named)) or 'it has no named ones'}"
    )


def _fix_date(template: str) -> str:
    """`template` with DATE in the place of today's date."""
    return _NOW.sub(lambda call: json.dumps(DATE.strftime(call[1] or call[2] or "")), template)
