"""What an answer to a dialogue is held to by grammar: calls where they are asked for, and reasoning before all else."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dashinfer_vlm.engine.grammars.calls import CallForm, Calls
from dashinfer_vlm.frontend.answer_parser import CALL, CALL_END, THINK, THINK_END, AnswerForm
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.tools import ANY_OBJECT, Tool
from dashinfer_vlm.request import Grammar

__all__ = ["constrained"]


def constrained(
    params: GenerationParams, dialogue: Dialogue, form: AnswerForm, marks: Collection[str]
) -> tuple[GenerationParams, AnswerForm]:
    """`params` with the grammar that answers of this `form` follow, and the form of answers that follow it.

    `marks` are the special tokens that text may hold. Where an answer may call tools, what it must be otherwise holds
    for answers that call none.
    """
    grammar = params.sampling.grammar
    if dialogue.callable_names and (grammar is not None or form.sure):
        form = replace(form, sure=True)
        content = None if dialogue.choice.must_call else grammar
        grammar = _calls(dialogue, marks, content, xml=form.schemas is not None)
    if grammar is None:
        return params, form
    if form.may_think:
        grammar = msgspec.structs.replace(grammar, thought=("" if form.begins_in_thought else THINK, THINK_END))
    return replace(params, sampling=msgspec.structs.replace(params.sampling, grammar=grammar)), form


def _calls(dialogue: Dialogue, marks: Collection[str], content: Grammar | None, *, xml: bool) -> Grammar:
    names, choice, form = set(dialogue.callable_names), dialogue.choice, _xml_form if xml else _json_form
    calls = Calls(
        begin=CALL,
        end=CALL_END,
        forms=[form(tool, choice.must_call or tool.strict) for tool in dialogue.tools if tool.name in names],
        parallel=choice.parallel,
        free=not choice.must_call and content is None,
        marks=sorted(marks),
        content=content,
    )
    return Grammar("calls", msgspec.json.encode(calls).decode(), "tools" if content is None else content.param)


def _json_form(tool: Tool, keeps_schema: bool) -> CallForm:
    """A call as models whose calls are JSON were trained to write it."""
    schema = _of_object(tool.parameters if keeps_schema else ANY_OBJECT)
    return CallForm(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ', schema, "}\n")


def _xml_form(tool: Tool, keeps_schema: bool) -> CallForm:
    schema = tool.parameters if keeps_schema else ANY_OBJECT
    return CallForm(f"\n<function={tool.name}>\n", dict(schema), "</function>\n", xml=True)


def _of_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are an object, also where their schema does not say so; one that says another type cannot be kept."""
    others = schema.get("allOf", [])
    if schema.get("type") == "object" or not isinstance(others, list):
        return dict(schema)
    return {**schema, "allOf": [*others, ANY_OBJECT]}
