"""One answer on its way: tokens become text, text is read for reasoning, calls of tools and stop strings."""

from __future__ import annotations

import time

from dashinfer_vlm.errors import EngineError, InvalidRequestError
from dashinfer_vlm.frontend.answer_parser import TAGS, AnswerParser
from dashinfer_vlm.frontend.deltas import Delta, EndReason
from dashinfer_vlm.frontend.detokenizer import Detokenizer
from dashinfer_vlm.frontend.observer import AnswerReport
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.pieces import Piece
from dashinfer_vlm.frontend.prompt import Prompt
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import Output, TokenLogprob
from dashinfer_vlm.stages import Span

__all__ = ["Choice"]


class Choice:
    """One answer on its way: engine outputs in, deltas out."""

    def __init__(self, index: int, prompt: Prompt, params: GenerationParams, tokenizer: Tokenizer) -> None:
        """`index` counts through all prompts of the call; each prompt has `params.n` choices."""
        self.index = index
        self.prompt = prompt
        self.sampling = params.of_choice(index % params.n)
        self.cache_salt = params.cache_salt
        self.priority = params.priority
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt but for its first token, where this choice asks for them."""
        self.vector = b""
        """In place of tokens, where the call is for one; see `request.Output.vector`."""
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.end_reason: EndReason | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        """When its latest token came, on `time.perf_counter`'s clock."""
        self._text_s = 0.0
        self._spans: list[Span] = []
        self._keeps_stop = params.include_stop_str_in_output
        self._text = Detokenizer(
            tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
            min_tokens=params.sampling.min_tokens,
            shown=() if prompt.form.is_plain else TAGS,
        )
        self._parser = AnswerParser(prompt.form)
        self._is_begun = False
        self._pieces: list[Piece] = []
        """Read, and not told yet."""

    def feed(self, output: Output) -> Delta | None:
        """The news in `output`, if any; raises EngineError when the engine gave up on the
        sequence, InvalidRequestError when that asks for what cannot be."""
        start_s = time.perf_counter()
        try:
            if output.spans:
                self._spans += output.spans
            return self._feed(output)
        finally:
            self._text_s += time.perf_counter() - start_s

    def report(self, unfinished: str) -> AnswerReport:
        """What came of it, or has so far; `unfinished` is why one ends that has not come to its end."""
        end_s = self.last_token_s or time.perf_counter()
        text = Span("detokenise", end_s - self._text_s, end_s)  # the sum of what its tokens took
        return AnswerReport(
            reason=self.end_reason or unfinished,
            num_tokens=self.num_tokens,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            spans=(*self._spans, text) if self.num_tokens else tuple(self._spans),
        )

    def _feed(self, output: Output) -> Delta | None:
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.vector:
            self.vector = output.vector
        if output.prompt_logprobs:
            self.prompt_logprobs += output.prompt_logprobs
        text, num_used = self._push(output.token_ids)
        reason: EndReason | None = "stop" if self._is_over else None
        end_ids: tuple[int, ...] = ()
        if reason is None and output.finish:
            reason = self._end_reason(output)
            text += self._last_text(output.finish.stop_token)
            end_ids = () if output.finish.stop_token is None else (output.finish.stop_token,)
        if reason is not None:
            is_cut = reason == "length" or self._text.stopped is not None
            self._pieces += self._parser.flush(cut=is_cut)
        if reason == "stop" and self._parser.num_calls and not self._parser.ends_in_call:
            reason = "tool_calls"
        self.end_reason = reason
        if not text and reason is None and not output.token_ids:
            return None
        is_first, self._is_begun = not self._is_begun, True
        return Delta(
            index=self.index,
            text=text,
            pieces=self._take_pieces(),
            token_ids=output.token_ids[:num_used],
            logprobs=output.logprobs[:num_used],
            finish_reason=reason,
            end_ids=end_ids,
            prompt_ids=self.prompt.ids if is_first else (),
            stop=self._text.stopped,
        )

    def _push(self, tokens: tuple[int, ...]) -> tuple[str, int]:
        """Text of `tokens`, and how many of them were used when a stop string or a last call ends it."""
        text = ""
        for num_used, token in enumerate(tokens, 1):
            more = self._text.push(token)
            text += more
            was_thought = self._parser.in_thought
            self._pieces += self._parser.push(more)
            self.num_reasoning_tokens += was_thought or self._parser.in_thought
            self.num_tokens += 1
            if self._is_over:
                return text, num_used
        return text, len(tokens)

    @property
    def _is_over(self) -> bool:
        """Whether what its text says ends it."""
        return self._text.stopped is not None or self._parser.is_over

    def _take_pieces(self) -> tuple[Piece, ...]:
        pieces, self._pieces = tuple(self._pieces), []
        return pieces

    def _last_text(self, stop_token: int | None) -> str:
        text = ""
        if stop_token is not None:
            self.num_tokens += 1
            if self._keeps_stop and stop_token in self.sampling.stop_token_ids:
                text = self._text.push(stop_token)
        text += self._text.flush()
        self._pieces += self._parser.push(text)
        return text

    def _end_reason(self, output: Output) -> EndReason:
        assert output.finish is not None, output
        if output.finish.reason in ("stop", "length"):
            return output.finish.reason
        kind = InvalidRequestError if output.finish.impossible else EngineError
        raise kind(output.finish.message or "the engine gave up on this request")
