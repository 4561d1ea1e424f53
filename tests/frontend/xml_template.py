"""A chat template in the form of Qwen3.5's: calls of tools as XML, and every answer begins with reasoning."""

from __future__ import annotations

QWEN3_5 = r"""
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}
            {{- part.text if part.type == 'text' else '<|vision_start|><|' ~ part.type ~ '_pad|><|vision_end|>' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = words(messages[0].content)|trim if messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' ~ tool | tojson -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nCall one like this:\n\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n' -}}
    {{- '</function>\n</tool_call>' ~ ('\n\n' ~ system if system else '') ~ '<|im_end|>\n' -}}
{%- elif system -%}
    {{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = words(message.content)|trim -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ content ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n<think>\n' ~ (message.reasoning_content or '') ~ '\n</think>\n\n' ~ content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- ('\n' if not loop.first else '\n\n' if content else '') -}}
            {{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
            {%- for name, value in call.function.arguments | items -%}
                {%- set is_plain = value is string or not (value is mapping or value is sequence) -%}
                {{- '<parameter=' ~ name ~ '>\n' ~ (value | string if is_plain else value | tojson) -}}
                {{- '\n</parameter>\n' -}}
            {%- endfor -%}
            {{- '</function>\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' else '' -}}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' -}}
    {{- '\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '' -}}
{%- endif -%}
"""
