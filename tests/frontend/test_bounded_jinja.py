"""Templates that compute or make too much end in a short error, soon, and without having taken much memory."""

from __future__ import annotations

import logging
import time
import tracemalloc

import pytest

from dashinfer_vlm.errors import CheckpointError, InvalidRequestError
from dashinfer_vlm.frontend.messages import Dialogue, Message
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer

HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that choose": "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [[0]] recursive %}{{ loop([i, i]) }}{% endfor %}",
    "a product": "{{ 'x' * 10 ** 9 }}",
    "a product of lists": "{% set a = [0] * 10 ** 10 %}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling with a sign": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",  # noqa: E501
    "doubling by replacement": (
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x.replace('x', n.x) %}{% endfor %}"
    ),
    "doubling by the filter": (
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x | replace('x', n.x) %}{% endfor %}"
    ),
    "a list of lists": "{% set n = namespace(x=['lol']) %}{% for i in range(30) %}{% set n.x = [n.x] * 9 %}{% endfor %}{{ n.x }}",  # noqa: E501
    "JSON of it": "{% set n = namespace(x=['lol']) %}{% for i in range(30) %}{% set n.x = [n.x] * 9 %}{% endfor %}{{ n.x | tojson }}",  # noqa: E501
    "a join": "{{ (range(100000) | list) | join('x' * 100000) }}",
    "a join of the text": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "another one": "{{ '{:999999999}'.format(1) }}",
    "the filter": "{{ '%999999999d' | format(1) }}",
    "a width beside it": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "the same with a sign": "{{ '%*d' % (10 ** 9, 1) }}",
    "padding": "{{ 'x' | center(10 ** 9) }}",
    "padding by a method": "{{ 'x'.ljust(10 ** 9) }}",
    "indentation": "{{ ('\\n' * 60000) | indent(90000) }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "much output": "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    "many texts": "{% set n = namespace(x=[]) %}{% for i in range(1000) %}{% set n.x = n.x + ['x' * 9999999] %}{% endfor %}",  # noqa: E501
    "many padded texts": "{{ range(100000) | map('string') | map('center', 100000) | list | length }}",
    "JSON with indentation": "{{ [1] | tojson(indent=10 ** 9) }}",
}


def hello(times: int = 1) -> Dialogue:
    return Dialogue([Message(role="user", content="hello")] * times)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_shows_at_once_is_refused_at_the_start(tokenizer: Tokenizer, name: str) -> None:
    started_s = time.thread_time()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="the chat template cannot be used") as refused:
        ChatTemplate(HOSTILE[name], tokenizer)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(refused.value)) < 700
    assert time.thread_time() - started_s < 10
    assert most_bytes < 2**30


def test_what_shows_later_is_an_error_for_its_sender_and_no_flood(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for hostile in (HOSTILE["loops"], HOSTILE["recursion"], HOSTILE["a product"], "{{ raise_exception('x' * 9999) }}"):
        template = ChatTemplate(f"{{% if messages | length > 1 %}}{hostile}{{% endif %}}ok", tokenizer)
        with pytest.raises(InvalidRequestError, match="the chat template refuses these messages") as refused:
            template.encode(hello(2))
        assert len(str(refused.value)) < 700
        assert refused.value.param == "messages"
        assert template.encode(hello())
    assert not caplog.text


@pytest.mark.parametrize(
    "failing", ["{{ messages.nothing.more }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ 'x' + 1 }}"]
)
def test_a_template_that_fails_is_an_error_for_the_sender(tokenizer: Tokenizer, failing: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template refuses these messages"):
        ChatTemplate(failing, tokenizer).encode(hello())


def test_a_template_that_wants_other_messages_than_a_greeting_may_start(tokenizer: Tokenizer) -> None:
    source = "{% if messages | length < 2 %}{{ raise_exception('a system message is wanted') }}{% endif %}ok"
    assert ChatTemplate(source, tokenizer).encode(hello(2)) == tokenizer.encode_text("ok")


def test_formats_of_large_numbers_are_no_widths(tokenizer: Tokenizer) -> None:
    source = "{{ '%s %d' % (messages[0].content, 5000000) }} {{ '{}'.format(5000000) }} {{ 5000000 | string }}"
    assert ChatTemplate(source, tokenizer).encode(hello()) == tokenizer.encode_text("hello 5000000 5000000 5000000")


def test_a_nesting_that_cannot_be_parsed_is_said(tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="does not parse"):
        ChatTemplate("{{ " + "(" * 5000 + ")" * 5000 + " }}", tokenizer)


def test_a_conversation_as_long_as_may_be_is_rendered(template: ChatTemplate) -> None:
    assert len(template.encode(Dialogue([Message(role="user", content="word " * 100_000)]))) > 100_000
    assert len(template.encode(hello(2000))) > 8000
