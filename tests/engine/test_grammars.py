"""Structured output in the engine: what is drawn follows the grammar, whatever else goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.grammars.compiler import Compiler
from dashinfer_vlm.engine.grammars.forms import compile_for
from dashinfer_vlm.engine.grammars.trial import Trial
from dashinfer_vlm.engine.host.loop import EngineLoop
from dashinfer_vlm.engine.host.wire import Command
from dashinfer_vlm.engine.shaping import token_words
from dashinfer_vlm.errors import InvalidRequestError, OverloadedError, UnsupportedError
from dashinfer_vlm.request import Grammar, GrammarKind, Output, Request, SamplingParams
from tests.conftest import ROOT, CheckpointMaker
from tests.engine.host.test_loop import ScriptedChannel
from tests.engine.late_runner import LateRunner
from tests.engine.scripted_model import EOS, VOCAB, ScriptedModel

LETTERS = [chr(code) for code in range(33, 33 + VOCAB - 7)]
"""Tokens 0 to 93, one printable character each; then blank, end of line, two words that grammars force; then
specials."""
WORDS = [*LETTERS, " ", "\n", '{"', '":', "true"]
SPECIAL = "<|special|>"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
PERSON = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99999}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def vocabulary() -> str:
    alphabet = {" ": "\u0120", "\n": "\u010a"}
    vocab = {"".join(alphabet.get(c, c) for c in word): id for id, word in enumerate(WORDS)}
    added = [{"id": EOS - 1, "content": SPECIAL}, {"id": EOS, "content": "<|end|>"}]
    same = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bpe = {"type": "BPE", "vocab": vocab, "merges": [["{", '"'], ['"', ":"]]}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{**row, **same} for row in added],
            "normalizer": None,
            "pre_tokenizer": bytes_,
            "post_processor": None,
            "decoder": bytes_,
            "model": bpe,
        }
    )


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler(vocabulary, VOCAB, (EOS,))
    yield compiler
    compiler.close()


class Run:
    """An engine over the scripted model, and what it said."""

    def __init__(self, compiler: Compiler, *, late: bool = False, num_blocks: int = 128, **config: Any) -> None:
        self.model = ScriptedModel()
        self.engine = Engine(
            self.model,
            self.model.kv(num_blocks),
            EngineConfig(model="", **config),
            compiler,
        )
        if late:
            self.engine.runner = LateRunner(self.model, self.engine.runner.kv, self.engine.stage.cache)
        self._ids = count()
        self._said: dict[str, tuple[list[int], Output]] = {}

    def add(self, grammar: Grammar | None, *, prompt: list[int] | None = None, **params: Any) -> str:
        id = str(next(self._ids))
        fields = {"max_tokens": 200, "temperature": 2.0, "seed": int(id), **params}
        sampling = SamplingParams(grammar=grammar, **fields)
        self.engine.add(Request(id=id, prompt_ids=prompt or [1, 2, 3], params=sampling))
        return id

    def finish(self) -> dict[str, tuple[list[int], Output]]:
        while self.engine.has_work():
            self.step()
        self.engine.scheduler.check_integrity()
        return self._said

    def step(self) -> None:
        for output in self.engine.step():
            tokens, _ = self._said.get(output.request_id, ([], output))
            self._said[output.request_id] = ([*tokens, *output.token_ids], output)


def text(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def reason(output: Output) -> str:
    assert output.finish is not None
    return output.finish.reason


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def check_person(tokens: list[int]) -> None:
    person = json.loads(text(tokens))
    assert set(person) == {"n", "ok"}
    assert isinstance(person["n"], int)
    assert isinstance(person["ok"], bool)


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_follows_each_its_own_grammar(compiler: Compiler, late: bool) -> None:
    run = Run(compiler, late=late)
    pattern = r"[a-c]{2,4}-\d{3}"
    kinds: list[tuple[GrammarKind, str]] = [
        ("json_schema", json.dumps(PERSON)),
        ("regex", pattern),
        ("choice", '["red", "green \\"x\\""]'),
        ("grammar", 'root ::= "(" root ")" | "x"'),
        ("grammar", 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'),
    ]
    for kind, source in kinds * 4:
        run.add(Grammar(kind, source))
    free = run.add(None, max_tokens=30, temperature=0.0)
    said = run.finish()
    assert {reason(last) for id, (_, last) in said.items() if id != free} == {"stop"}
    answers = [tokens for id, (tokens, _) in said.items() if id != free]
    answers = [said[str(id)][0] for id in range(len(kinds) * 4)]
    for tokens in answers[::5]:
        check_person(tokens)
    assert all(re.fullmatch(pattern, text(tokens)) for tokens in answers[1::5])
    assert {text(tokens) for tokens in answers[2::5]} <= {"red", 'green "x"'}
    assert all(re.fullmatch(r"\(*x\)*", text(tokens)) for tokens in answers[3::5])
    assert all(re.fullmatch(r"a\d\d", text(tokens)) for tokens in answers[4::5])
    assert len({text(tokens) for tokens in answers}) > 8, "nearly nothing was left to chance"
    alone = Run(compiler, late=late)
    alone.add(None, max_tokens=30, temperature=0.0)
    assert said[free][0] == alone.finish()["0"][0], "a neighbour's grammar changed an answer"


def test_an_answer_without_a_grammar_has_no_mask(compiler: Compiler) -> None:
    run = Run(compiler)
    begin = run.engine.runner.masks.begin  # type: ignore[attr-defined]
    assert begin([])() is None


def test_no_special_token_is_inside_and_the_end_comes_only_when_the_grammar_allows_it(compiler: Compiler) -> None:
    bias = {EOS: 100.0, EOS - 1: 100.0}
    run = Run(compiler)
    for _ in range(8):
        run.add(Grammar("regex", "[ -~]{3,9}"), logit_bias=bias)
    for tokens, last in run.finish().values():
        assert len(text(tokens)) == 3, "the end is the likeliest as soon as it is allowed"
        assert last.finish is not None
        assert last.finish.stop_token == EOS


def test_ignoring_the_end_goes_on_while_something_may_follow(compiler: Compiler) -> None:
    run = Run(compiler)
    run.add(Grammar("regex", "[a-z]{3,9}"), ignore_eos=True, logit_bias={EOS: 100.0})
    run.add(Grammar("regex", "[a-z]{3,9}"), min_tokens=50)
    run.add(Grammar("regex", "[a-z]+"), min_tokens=20, logit_bias={EOS: 100.0})
    stop = WORDS.index("!")
    run.add(Grammar("regex", "[a-z]{3,}"), ignore_eos=True, stop_token_ids=(stop,), logit_bias={stop: 100.0})
    said = run.finish()
    assert [len(text(said[id][0])) for id in "0123"] == [9, 9, 20, 3]
    assert {reason(last) for _, last in said.values()} == {"stop"}
    last = said["3"][1]
    assert last.finish is not None
    assert last.finish.stop_token == stop, "what ends an answer may come where the grammar may end"


def test_a_stop_sequence_and_the_limit_end_an_answer_as_usual(compiler: Compiler) -> None:
    run = Run(compiler)
    run.add(Grammar("regex", "abcdef"), stop_sequences=((WORDS.index("c"), WORDS.index("d")),))
    run.add(Grammar("regex", "abcdef"), max_tokens=2)
    said = run.finish()
    assert [(text(said[id][0]), reason(said[id][1])) for id in "01"] == [("abcd", "stop"), ("ab", "length")]


def test_no_token_is_chosen_that_is_not_listed(compiler: Compiler) -> None:
    listed = tuple(WORDS.index(letter) for letter in "~cab")
    run = Run(compiler, speculative_config=NGRAM)
    for _ in range(4):
        run.add(None, allowed_token_ids=listed, max_tokens=60)
        run.add(Grammar("regex", "[a-z]{5}"), allowed_token_ids=(*listed, EOS))
        run.add(None, allowed_token_ids=(*listed, EOS), logit_bias={EOS: 100.0})
    said = run.finish()
    free, formed, ended = ([said[str(id)] for id in range(kind, 12, 3)] for kind in range(3))
    assert {token for tokens, _ in free for token in tokens} == set(listed)
    assert {reason(last) for _, last in free} == {"length"}
    assert all(re.fullmatch("[abc]{5}", text(tokens)) for tokens, _ in formed)
    assert {(len(tokens), reason(last)) for tokens, last in ended} == {(0, "stop")}


@pytest.mark.parametrize("ids", [[0], [31], [32, 5, 63], [96, 100], list(range(101))])
def test_the_bits_of_tokens(ids: list[int]) -> None:
    bits = np.unpackbits(token_words(ids).view(np.uint8), bitorder="little")
    assert bits.nonzero()[0].tolist() == sorted(ids)


def test_logprobs_are_those_before_the_mask(compiler: Compiler) -> None:
    run = Run(compiler)
    run.add(Grammar("choice", '["x"]'), logprobs=1, temperature=0.0)
    run.add(None, logprobs=1, temperature=0.0, max_tokens=1)
    outputs = [output for output in run.engine.step() if output.logprobs]
    forced, free = outputs[0].logprobs[0], outputs[1].logprobs[0]
    assert WORDS[forced.token_id] == "x"
    assert forced.top == free.top


def test_guesses_that_the_grammar_forbids_are_not_computed(compiler: Compiler) -> None:
    pattern = "(ab){3}(ac){3}"
    alone, guessing = Run(compiler), Run(compiler, speculative_config=NGRAM)
    for run in (alone, guessing):
        for _ in range(6):
            run.add(Grammar("regex", pattern), temperature=0.5)
            run.add(schema(PERSON))
    said = guessing.finish()
    assert [text(said[str(id)][0]) for id in range(0, 12, 2)] == ["abababacacac"] * 6
    assert {id: tokens for id, (tokens, _) in said.items()} == {id: t for id, (t, _) in alone.finish().items()}
    stats = guessing.engine.stats()
    assert stats.num_accepted_draft_tokens_total > 0
    assert guessing.model.num_calls < alone.model.num_calls


def test_a_preempted_answer_goes_on_where_it_was(compiler: Compiler) -> None:
    crowded, roomy = Run(compiler, num_blocks=20, max_model_len=80), Run(compiler, max_model_len=80)
    for run in (crowded, roomy):
        for _ in range(6):
            run.add(Grammar("regex", "[a-z]{20,30}0"), max_tokens=60)
    said = crowded.finish()
    assert crowded.engine.stats().num_preemptions_total > 0
    assert {id: tokens for id, (tokens, _) in said.items()} == {id: t for id, (t, _) in roomy.finish().items()}
    assert all(re.fullmatch("[a-z]{20,30}0", text(tokens)) for tokens, _ in said.values())


REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", '{"type": "array", "uniqueItems": true}', 'Unimplemented keys: ["uniqueItems"]'),
    ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
    ("json_schema", "{", "EOF while parsing"),
    ("json_schema", '{"$ref": "#"}', "nothing satisfies it"),
    ("json_schema", '{"$ref": "http://localhost:9/schema"}', "does not fetch"),
    ("json_schema", '{"items":' * 130 + "{}" + "}" * 130, "nested too deep; objects and arrays may be 120 levels deep"),
    ("json_schema", '{"const": 9007199254740993}', "9007199254740993 in const"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "a(", "unclosed group"),
    ("choice", '["a", 1]', "Expected `str`"),
    ("choice", "[]", "there are none"),
    ("grammar", "start: x", "unknown name"),
    ("grammar", f'start: "a" {SPECIAL}', "special tokens"),
    ("grammar", 'start: "a" <[99]>', "special tokens"),
    ("grammar", "root ::= " + "(" * 5000, "recursion"),
]


@pytest.mark.parametrize(("kind", "source", "why"), REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    compiler: Compiler, kind: GrammarKind, source: str, why: str
) -> None:
    engine = Run(compiler).engine
    params = SamplingParams(grammar=Grammar(kind, source, "guided_thing"))
    with pytest.raises(UnsupportedError, match=re.escape(why)) as refusal:
        engine.add(Request(id="1", prompt_ids=[1], params=params))
    assert refusal.value.param == "guided_thing"
    assert "backtrace" not in str(refusal.value)
    assert "<state>" not in str(refusal.value)
    assert not engine.has_work()


def test_a_grammar_of_a_large_size_is_refused_before_it_is_looked_at(compiler: Compiler) -> None:
    params = SamplingParams(grammar=Grammar("regex", "a" * 200_000))
    with pytest.raises(InvalidRequestError, match="the limit is 131072"):
        Run(compiler).engine.prepare(Request(id="1", prompt_ids=[1], params=params))


def test_an_engine_without_a_tokenizer_refuses() -> None:
    model = ScriptedModel()
    engine = Engine(model, model.kv(128), EngineConfig(model=""))
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        engine.add(Request(id="1", prompt_ids=[1], params=SamplingParams(grammar=Grammar("regex", "a"))))


def test_a_tokenizer_that_cannot_be_used_refuses_grammars_and_nothing_else() -> None:
    compiler = Compiler(lambda: "{}", VOCAB, (EOS,))
    run = Run(compiler)
    with pytest.raises(UnsupportedError, match="tokenizer cannot be used"):
        run.add(Grammar("regex", "a"))
    run.add(None, max_tokens=3)
    assert len(run.finish()) == 1
    compiler.close()


def chain(length: int) -> Grammar:
    """References so deep that the library's stack overflows."""
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return schema({"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}})


def test_a_grammar_that_overflows_the_stack_costs_its_sender_alone(compiler: Compiler) -> None:
    run = Run(compiler)
    run.add(schema(PERSON))
    run.step()
    with pytest.raises(UnsupportedError, match="deeper recursion than is allowed"):
        run.add(chain(2000))
    run.add(Grammar("choice", '["x"]'))
    said = run.finish()
    check_person(said["0"][0])
    assert text(said["2"][0]) == "x"


def test_a_trial_process_that_was_killed_is_started_again() -> None:
    trial = Trial()
    assert trial.problem(Grammar("regex", "a")) is None
    assert trial._process is not None
    trial._process.kill()
    trial._process.wait()
    assert trial.problem(Grammar("regex", "b")) is None
    trial.close()


def test_a_trial_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.grammars.trial.WALL_S", 0.1)
    trial = Trial()
    trial.command = (sys.executable, "-c", "import time; time.sleep(60)")
    assert "takes more than 3 s" in (trial.problem(Grammar("regex", "a")) or "")
    assert trial._process is None


def test_equal_grammars_are_compiled_once_and_the_oldest_are_forgotten(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.grammars.compiler.MAX_KEPT", 2)
    first = compiler.prepare(Grammar("regex", "once"))
    assert compiler.prepare(Grammar("regex", "once", "guided_regex")) is first
    for name in ("two", "three"):
        compiler.prepare(Grammar("regex", name))
    assert compiler.prepare(Grammar("regex", "once")) is not first


def test_a_request_is_added_with_what_was_prepared_for_it_though_others_have_pushed_it_out(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop would wait for it in the middle of everybody's steps."""
    monkeypatch.setattr("dashinfer_vlm.engine.grammars.compiler.MAX_KEPT", 1)
    compiled = []

    def counted(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
        compiled.append(grammar.text)
        return compile_for(tokenizer, grammar)

    monkeypatch.setattr("dashinfer_vlm.engine.grammars.compiler.compile_for", counted)
    texts = [f"pushed{i}" for i in range(4)]
    params = [SamplingParams(grammar=Grammar("regex", text), max_tokens=9) for text in texts]
    asked: list[Command] = [Request(id=p.grammar.text, prompt_ids=[1], params=p) for p in params if p.grammar]
    channel = ScriptedChannel(asked)
    EngineLoop(Run(compiler).engine, channel).run()
    assert channel.endings() == dict.fromkeys(texts, "stop")
    assert sorted(text for text in compiled if text in texts) == texts


def test_a_failure_that_is_not_the_grammars_is_not_kept(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    start, left = Trial._start, [BlockingIOError("no process")]

    def failing(trial: Trial) -> subprocess.Popen[bytes]:
        if left:
            raise left.pop()
        return start(trial)

    monkeypatch.setattr(Trial, "_start", failing)
    fresh = Compiler(vocabulary, VOCAB, (EOS,))
    with pytest.raises(BlockingIOError):
        fresh.matcher(Grammar("regex", "later"))
    assert fresh.matcher(Grammar("regex", "later"))
    fresh.close()


def test_grammars_that_wait_are_bounded_and_one_that_nobody_wants_makes_room() -> None:
    go = threading.Event()

    def wait() -> str:
        go.wait()
        return vocabulary()

    compiler = Compiler(wait, VOCAB, (EOS,), max_waiting=3)
    try:
        first, *_, last = (compiler.prepare(Grammar("regex", letter)) for letter in "abc")
        assert compiler.prepare(Grammar("regex", "a")) is first, "one that waits already takes no more room"
        with pytest.raises(OverloadedError, match="3 grammars wait to be compiled, the limit is 3"):
            compiler.prepare(Grammar("regex", "d"))
        assert last.cancel()
        fourth = compiler.prepare(Grammar("regex", "d"))
        with pytest.raises(OverloadedError):
            compiler.prepare(Grammar("regex", "c"))
        go.set()
        assert compiler.matcher(Grammar("regex", "d"))
        assert fourth.done()
        assert compiler.matcher(Grammar("regex", "c")), "what was cancelled is compiled for who comes later"
    finally:
        go.set()
        compiler.close()


def test_two_answers_to_one_grammar_do_not_disturb_each_other(compiler: Compiler) -> None:
    grammar = Grammar("regex", "ab")
    first, second = compiler.matcher(grammar), compiler.matcher(grammar)
    first.accept(WORDS.index("a"))
    assert first.num_allowed([WORDS.index("b")]) == 1
    assert second.num_allowed([WORDS.index("b")]) == 0


def test_a_grammar_travels_in_a_message() -> None:
    params = SamplingParams(grammar=Grammar("regex", "a", "guided_regex"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_tool_that_measures_masks_runs(checkpoint: CheckpointMaker) -> None:
    tool = ROOT / "tools" / "grammars.py"
    command = [sys.executable, str(tool), str(checkpoint()), "--rows", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r", 2 rows: median \d", done.stdout)) == 2
