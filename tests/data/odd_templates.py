"""Ten chat templates of different habits, written for these tests after those that models ship."""

# ruff: noqa: E501  (templates are easier to read without line breaks)
from __future__ import annotations

_PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

# A default system prompt; any role, text only.
CHATML = (
    """\
{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}"""
    + _PROMPT
)

# Today's date in a system turn that is always there, trimmed contents, a role of its own for tools.
LLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{%- if tools %}{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n' }}{%- endfor %}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + (m.content or '') }}
{%- for call in m.tool_calls %}{{- '{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + '}' }}{%- endfor %}{{- '<|eom_id|>' }}
{%- elif m.role == 'tool' or m.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# The system prompt goes into the first user turn; roles must alternate; calls are a JSON list.
MISTRAL = """\
{%- set ns = namespace(system='', turn='user') -%}
{%- if messages[0]['role'] == 'system' -%}{%- set ns.system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}{%- endif -%}
{{- bos_token -}}
{%- if tools -%}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- if ns.turn != 'user' -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}{%- set ns.turn = 'assistant' -%}
{{- '[INST] ' + ns.system + m['content'] + '[/INST]' -}}{%- set ns.system = '' -%}
{%- elif m['role'] == 'assistant' and m.tool_calls -%}
{{- '[TOOL_CALLS][' -}}{%- for call in m.tool_calls -%}{{- call.function | tojson -}}{{- ', ' if not loop.last else '' -}}{%- endfor -%}{{- ']' + eos_token -}}
{%- elif m['role'] == 'tool' -%}{{- '[TOOL_RESULTS]' + ({'content': m.content} | tojson) + '[/TOOL_RESULTS]' -}}
{%- elif m['role'] == 'assistant' -%}{%- set ns.turn = 'user' -%}{{- ' ' + m['content'] + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant roles') -}}{%- endif -%}
{%- endfor -%}"""

# The assistant is called model, contents are trimmed, a system prompt is refused.
GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# Leaves out the reasoning of turns before the last question; tool answers become a user turn.
QWEN3 = """\
{%- if tools -%}{{- '<|im_start|>system\\n' -}}{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
{{- '<tools>' -}}{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}{{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set ns2 = namespace(thought='', content=m.content or '') -%}
{%- if m.reasoning_content is string -%}{%- set ns2.thought = m.reasoning_content -%}
{%- elif '</think>' in ns2.content -%}
{%- set ns2.thought = ns2.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set ns2.content = ns2.content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or ns2.thought) -%}{{- '<think>\\n' + ns2.thought.strip('\\n') + '\\n</think>\\n\\n' + ns2.content.lstrip('\\n') -}}{%- else -%}{{- ns2.content -}}{%- endif -%}
{%- for call in m.tool_calls or [] -%}{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}{{- '}\\n</tool_call>' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"""

# Tools and calls as JSON between tags; arguments are printed as the JSON text that they came in.
HERMES = (
    """\
{{- bos_token -}}
{%- if tools -%}{{- '<|im_start|>system\\n<tools>' -}}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{{- '</tools><|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{{- '<|im_start|>assistant\\n' -}}{%- if m.content -%}{{- m.content + '\\n' -}}{%- endif -%}
{%- for call in m.tool_calls -%}{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments + '}</tool_call>' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}{{- '<|im_start|>tool\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}"""
    + _PROMPT
)

# No header for the system prompt; all reasoning is dropped; calls in tags that are special tokens.
DEEPSEEK = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- elif m.role == 'assistant' and m.tool_calls -%}{{- '<|Assistant|>' + (m.content or '') + '<|calls|>' -}}
{%- for call in m.tool_calls -%}{{- '<|call|>' + call.function.name + '\\n' -}}{{- call.function.arguments | tojson -}}{{- '<|/call|>' -}}{%- endfor -%}{{- '<|/calls|>' + eos_token -}}
{%- elif m.role == 'assistant' -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token -}}
{%- elif m.role == 'tool' -%}{{- '<|output|>' + m.content + '<|/output|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>' -}}{%- endif -%}"""

# No special tokens at all.
PLAIN = """\
{%- for m in messages -%}
{{- {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[m.role] + ': ' + m.content + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"""

# Marks what is generated; contents are lists of parts.
GENERATION = (
    """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{%- for part in m.content -%}{{- part.text -}}{%- endfor -%}{{- '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{%- for part in m.content -%}{{- part.text -}}{%- endfor -%}{{- '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}
{%- endfor -%}"""
    + _PROMPT
)

# Says nothing about messages with a role that it does not know.
SILENT = (
    """\
{%- for m in messages -%}
{%- if m.role in ('system', 'user', 'assistant') -%}{{- '<|im_start|>' + m.role + '\\n' -}}{{- m.content -}}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}"""
    + _PROMPT
)

TEMPLATES = {
    "ChatML": CHATML,
    "Llama": LLAMA,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Qwen3": QWEN3,
    "Hermes": HERMES,
    "DeepSeek": DEEPSEEK,
    "plain": PLAIN,
    "generation": GENERATION,
    "silent": SILENT,
}
SPECIAL_TOKENS = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "<start_of_turn>", "<end_of_turn>"),
    *("<|User|>", "<|Assistant|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|/call|>"),
]
EOS = {"Mistral": "</s>", "DeepSeek": "</s>"}  # <|im_end|> for the others
