"""RoPE by span: every row is rotated by its position in its whole sequence.

The model asks its rotary module for a length and hands it back to get frequencies 0, 1, .. of that
many rows. Rows here are zigzag chunks of sequences, so `SpanRotary` stands in: its "length" is the
spans of positions that the rows have. What comes out are packed frequencies, one per row, that
Megatron applies as they are where cu_seqlens is [0, rows] and the CP group has one rank.
"""

from __future__ import annotations

from typing import Any

import torch

from .microbatch import Rows

_Spans = tuple[tuple[int, int], ...]


class SpanRotary(torch.nn.Module):
    """Stands where a RotaryEmbedding stood; it has no state, so checkpoints do not change."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self._latest: tuple[_Spans, Any] | None = None  # each MLA layer asks for the same

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> Any:
        """The spans of a microbatch of ours, else the length that the original gives."""
        rows = getattr(packed_seq_params, "rows", None)
        if isinstance(rows, Rows):
            return rows.spans
        return self.rotary.get_rotary_seq_len(
            inference_context,
            transformer,
            transformer_input,
            transformer_config,
            packed_seq_params,
            **others,
        )

    def forward(self, length: int | _Spans, *args: Any, **kwargs: Any) -> Any:
        """Frequencies (rows, 1, 1, dim) of spans; with YaRN, (frequencies, concentration)."""
        if not isinstance(length, tuple):
            return self.rotary(length, *args, **kwargs)
        if self._latest is None or self._latest[0] != length:
            self._latest = (length, self._of_spans(length))
        return self._latest[1]

    def _of_spans(self, spans: _Spans) -> Any:
        parts = [self.rotary.get_emb(stop - start, start) for start, stop in spans]
        if isinstance(parts[0], tuple):
            return torch.cat([emb for emb, _ in parts]), parts[0][1]
        return torch.cat(parts)


def use_span_rotary(model: torch.nn.Module) -> None:
    """Put SpanRotary around each rotary module of a model, once; MLA layers have their own."""
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_pos_emb", None)
        if isinstance(rotary, torch.nn.Module) and not isinstance(rotary, SpanRotary):
            module.rotary_pos_emb = SpanRotary(rotary)
