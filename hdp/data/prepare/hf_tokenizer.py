"""HFTokenizer: the tokenizer of a model, as transformers loads it, with its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import Chat, Tokenizer
from .chat import ChatTemplate, spans2mask
from .documents import TEMPLATE, Document, Rejected


class HFTokenizer(Tokenizer):
    """A transformers tokenizer, unmodified."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """`tokenizer`: the result of `hdp.models.huggingface.load_tokenizer`."""
        self.hf = tokenizer
        self.name = name or str(getattr(tokenizer, "name_or_path", "") or "hf")
        self.eos_id = tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
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
        if not self.hf.is_fast:
            raise ValueError(
                f"tokenizer {self.name} does not provide character offsets, which the loss mask of "
                "chats requires: use a fast tokenizer (tokenizer.json)"
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
