"""What a caller may say about the answer, beyond what the engine samples by."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.truncation import Truncation
from dashinfer_vlm.request import MAX_BAD_WORDS, SamplingParams

Next = Literal["answer", "continuation", "nothing"]
"""Behind a conversation the assistant's turn is opened, the last message goes on, or nothing is added."""

MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_BAD_WORD_CHARS = 1024
_PRIORITIES = 2**63
MAX_TIMEOUT_S = 86_400
_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """How many answers of a prompt, how their tokens are chosen, and where their text ends."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Answers to the same prompt. Answer i is drawn with seed + i, or with a random seed where none is given."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these that is complete."""
    include_stop_str_in_output: bool = False
    """... or right after it; the text of a stop token that is not special is then kept as well."""
    skip_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    """Whether the assistant's turn is opened behind a conversation; None: unless `continue_final_message` says no."""
    continue_final_message: bool = False
    """The answer goes on with a conversation's last message, which is left open."""
    cache_salt: str = ""
    """The prompt's keys and values are shared only with prompts that have the same one."""
    bad_words: tuple[str, ...] = ()
    """Words that no answer has; see `bad_words.bad_word_ids`."""
    truncation: Truncation | None = None
    """What becomes of a prompt that is too long; None: it is refused."""
    priority: int = 0
    """Requests with a lower number come first."""
    timeout_s: float | None = None
    """The answer must be complete by then; None is no limit."""
    ends_with_context: bool = False
    """An answer for whose `max_tokens` the context has no room ends there; otherwise it is refused."""
    max_tokens_name: str = "max_tokens"
    """What the caller calls the bound of an answer's tokens, for error messages."""

    @property
    def next(self) -> Next:
        """What comes behind a conversation."""
        if self.continue_final_message:
            return "continuation"
        return "nothing" if self.add_generation_prompt is False else "answer"

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequestError with the field, its value and the limit."""
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequestError(f"n is {self.n}; it must be from 1 to {MAX_CHOICES}", param="n")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; the limit is {MAX_STOP_STRINGS}", param="stop"
            )
        if not all(self.stop):
            raise InvalidRequestError("stop has an empty string, which would end every answer at once", param="stop")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words has {len(self.bad_words)} words; the limit is {MAX_BAD_WORDS}", param="bad_words"
            )
        longest = max(map(len, self.bad_words), default=1)
        if not all(word.strip() for word in self.bad_words) or longest > MAX_BAD_WORD_CHARS:
            raise InvalidRequestError(
                f"bad_words has an empty word, or one of more than {MAX_BAD_WORD_CHARS} characters", param="bad_words"
            )
        if not -_PRIORITIES <= self.priority < _PRIORITIES:
            raise InvalidRequestError(f"priority is {self.priority}; it must fit 64 bits", param="priority")
        if self.timeout_s is not None:
            check_timeout(self.timeout_s)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are both true, and either excludes the other; "
                "send one of them",
                param="continue_final_message",
            )
        self.sampling.validate(vocab_size, self.max_tokens_name)

    def within(self, room: int) -> GenerationParams:
        """With at most `room` tokens for an answer, where it `ends_with_context`."""
        most = self.sampling.max_tokens
        if not self.ends_with_context or most is None or most <= room:
            return self
        return replace(self, sampling=msgspec.structs.replace(self.sampling, max_tokens=room))

    def of_choice(self, index: int) -> SamplingParams:
        """The engine's parameters of answer `index`: equal but for the seed, so that answers differ, and for the log
        probabilities of the prompt, which are told once."""
        if self.n == 1:
            return self.sampling
        seed = self.sampling.seed
        return msgspec.structs.replace(
            self.sampling,
            seed=secrets.randbits(62) if seed is None else _plus(seed, index),
            prompt_logprobs=self.sampling.prompt_logprobs if index == 0 else None,
        )


def check_timeout(seconds: float, param: str = "timeout") -> None:
    """Raise InvalidRequestError for a time that no answer can have; NaN stands for what was not a number."""
    if not 0 < seconds <= MAX_TIMEOUT_S:  # also false for NaN
        said = "not a number" if math.isnan(seconds) else f"{seconds:g} s"
        raise InvalidRequestError(f"{param} is {said}; it must be above 0 and at most {MAX_TIMEOUT_S} s", param=param)


DEFAULT_PARAMS = GenerationParams()


def _plus(seed: int, index: int) -> int:
    """`seed + index`, wrapped around to 64 signed bits."""
    return (seed + index + _SEEDS) % (2 * _SEEDS) - _SEEDS
