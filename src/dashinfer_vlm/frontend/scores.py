"""How pairs of a query and a document are written for a checkpoint that scores them, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.messages import Dialogue, Message, Part, TextPart
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.family import ScorePrompt

__all__ = ["NO_SCORES", "Pair", "ScoreForm", "check_side", "score_of"]


class Pair(NamedTuple):
    """What a score is of; both hold something."""

    query: Sequence[Part]
    document: Sequence[Part]
    where: str
    """The document's place in what the caller has sent."""


_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_TEMPLATE = (
    f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
    "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}"
)
_ENDING = "<|im_end|>\n<|im_start|>assistant\n{}{{{{ '' }}}}"
"""With what the assistant's turn begins with, and nothing: a template's very last break would be cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreForm:
    """How the prompts of one model are written whose last token tells the score. The chat template has no part in it:
    folders have those of answers, of pairs in roles of their own, or both."""

    template: ChatTemplate | None = None
    """Writes a user's turn up to its end, which is behind the `ending`."""
    ending: tuple[int, ...] = ()
    """Ids behind the document, which are never cut off."""
    prompt: ScorePrompt | None = None
    why_not: str | None = None
    """Why there are no scores; None: there are."""

    @classmethod
    def of(cls, config: CheckpointConfig, tokenizer: Tokenizer) -> ScoreForm:
        """What the folder's files and the model's family say."""
        prompt = config.family.score_prompt
        if config.text.scoring is None:
            return cls(why_not="its folder has no modules.json with a LogitScore of two tokens behind the model")
        if prompt is None:
            return cls(why_not=f"nobody has said how a {config.architecture} is asked")
        return cls.by(prompt, tokenizer)

    @classmethod
    def by(cls, prompt: ScorePrompt, tokenizer: Tokenizer) -> ScoreForm:
        """Of a model that is asked by `prompt`."""
        ending = ChatTemplate(_ENDING.format(prompt.opening), tokenizer).encode(Dialogue([]))
        return cls(template=ChatTemplate(_TEMPLATE, tokenizer), ending=tuple(ending), prompt=prompt)

    def check(self) -> None:
        """Raise UnsupportedError where there are no scores."""
        if self.why_not is not None:
            raise UnsupportedError(f"the model scores no pairs: {self.why_not}")

    def dialogue(self, pair: Pair, instruction: str | None) -> Dialogue:
        """What `template` makes a prompt of; None: the publisher's own instruction."""
        assert self.prompt is not None, "check() comes first"
        opening = f"<Instruct>: {instruction or self.prompt.instruction}{self.prompt.query}"
        parts = (TextPart(opening), *pair.query, TextPart(self.prompt.document), *pair.document)
        return Dialogue([Message(role="user", content=parts)], param=pair.where)


NO_SCORES = ScoreForm(why_not="it was not opened from a folder that says how")


def check_side(side: Sequence[Part], where: str) -> None:
    """Raise InvalidRequestError for a query or a document of nothing; `where` names it."""
    if not any(not isinstance(part, TextPart) or part.text for part in side):
        raise InvalidRequestError(f"{where} is empty", param=where)


def score_of(state: bytes) -> float:
    """`Output.vector` of a pair, the logit of yes against no, as the probability of yes."""
    (logit,) = np.frombuffer(state, "<f4").tolist()
    return 0.5 + 0.5 * math.tanh(0.5 * logit)
