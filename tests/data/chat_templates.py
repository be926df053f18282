"""Chat templates like those that models ship, and the expected result of each.

Every template comes with an oracle: a Python function that produces the same text piece by piece,
and for each piece, whether the assistant has to generate it. The templates were written for these
tests; each has the peculiarity that makes its kind hard.
"""

# ruff: noqa: E501  (templates are easier to read without line breaks)
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Messages = list[dict]
Pieces = Iterator[tuple[str, bool]]  # (text, whether the assistant generates it)


@dataclass(frozen=True)
class Kind:
    template: str
    oracle: Callable[[Messages], Pieces]
    special: tuple[str, ...]
    eos: str
    has_system: bool = True


# ChatML with a default system prompt (Qwen2.5).
CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def chatml(messages: Messages) -> Pieces:
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou help.<|im_end|>\n", False
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", False
        yield f"{m['content']}<|im_end|>", m["role"] == "assistant"
        yield "\n", False


# The same without a generation prompt: only the content shows where a turn starts.
NO_PROMPT = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}"""


def no_prompt(messages: Messages) -> Pieces:
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", False
        yield f"{m['content']}<|im_end|>", m["role"] == "assistant"
        yield "\n", False


# Llama 3: a begin-of-text token, trimmed contents, a blank line after the header.
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


def llama3(messages: Messages) -> Pieces:
    yield "<|begin_of_text|>", False
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"


# Llama 3.1: always a system turn, with a date in it.
LLAMA31 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


def llama31(messages: Messages) -> Pieces:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    yield "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False
    yield f"Today Date: 26 Jul 2024\n\n{system}<|eot_id|>", False
    yield from list(llama3(messages))[1:]


# Mistral: the system prompt moves to the last user turn, so a rendered history is not a prefix.
MISTRAL = """\
{%- set ns = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set last_user = messages | selectattr('role', 'equalto', 'user') | list | last -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '[INST] ' + (ns.system if m is sameas last_user else '') + m['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}"""


def mistral(messages: Messages) -> Pieces:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"] + "\n\n", messages[1:]
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    yield "<s>", False
    for i, m in enumerate(messages):
        if m["role"] == "user":
            yield f"[INST] {system if i == last_user else ''}{m['content']}[/INST]", False
        else:
            yield " ", False
            yield f"{m['content']}</s>", True


# Qwen3: drops the reasoning of turns before the last question; the last turn always has a block.
THINK = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' -}}
{%- if m['role'] == 'assistant' -%}
{%- set thought = '' -%}{%- set answer = m['content'] -%}
{%- if '</think>' in answer -%}
{%- set thought = answer.split('</think>')[0].replace('<think>', '') -%}
{%- set answer = answer.split('</think>')[-1] -%}
{%- endif -%}
{%- if loop.index0 > ns.last -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- answer -}}
{%- else -%}{{- m['content'] -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def think(messages: Messages) -> Pieces:
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        yield f"<|im_start|>{m['role']}\n", False
        text = m["content"]
        if m["role"] == "assistant":
            thought, _, answer = text.rpartition("</think>")
            thought = thought.split("</think>")[0].replace("<think>", "")
            text = f"<think>\n{thought}\n</think>\n\n{answer}" if i > last else answer
        yield f"{text}<|im_end|>", m["role"] == "assistant"
        yield "\n", False


# Phi-3: an end-of-text token after the last turn, so a rendered history is not a prefix.
PHI3 = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""


def phi3(messages: Messages) -> Pieces:
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield f"{m['content']}<|end|>", m["role"] == "assistant"
        yield "\n", False
    yield "<|endoftext|>", False


# Zephyr: headers are plain text; only the end of a turn is a special token.
ZEPHYR = """\
{%- for m in messages -%}{{- '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""


def zephyr(messages: Messages) -> Pieces:
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield f"{m['content']}</s>", m["role"] == "assistant"
        yield "\n", False


# Alpaca: no special tokens; an empty line ends a turn.
ALPACA = """\
{%- for m in messages -%}{{- '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### assistant:\\n' -}}{%- endif -%}"""


def alpaca(messages: Messages) -> Pieces:
    for m in messages:
        yield f"### {m['role']}:\n", False
        yield f"{m['content']}\n\n", m["role"] == "assistant"


# Turns without an end: the token after one opens the next and must stay outside the span.
NO_END = """\
{{- bos_token -}}{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def no_end(messages: Messages) -> Pieces:
    yield "<s>", False
    for m in messages:
        yield f"<|{m['role']}|>", False
        yield m["content"], m["role"] == "assistant"


KINDS = {
    "chatml": Kind(CHATML, chatml, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "no_prompt": Kind(NO_PROMPT, no_prompt, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Kind(
        LLAMA3,
        llama3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "llama31": Kind(
        LLAMA31,
        llama31,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "mistral": Kind(MISTRAL, mistral, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
    "think": Kind(THINK, think, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "phi3": Kind(
        PHI3,
        phi3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "zephyr": Kind(ZEPHYR, zephyr, ("<s>", "</s>"), "</s>"),
    "alpaca": Kind(ALPACA, alpaca, ("<s>", "</s>"), "</s>"),
    "no_end": Kind(
        NO_END, no_end, ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"), "</s>"
    ),
}


def expected(kind: Kind, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The oracle's text and spans; adjacent generated pieces belong to different turns.

    A turn without content has no span: there is nothing in it to learn.
    """
    text, spans = "", []
    contents = iter([m["content"] for m in messages if m["role"] == "assistant"])
    for piece, is_generated in kind.oracle(messages):
        if is_generated and next(contents):
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans
