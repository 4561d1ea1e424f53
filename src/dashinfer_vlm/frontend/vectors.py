"""What a checkpoint that was published for vectors is asked, and what becomes of the states that it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.errors import CheckpointError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.messages import Dialogue, Message
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.tokenizer_file import TokenizerFile

__all__ = ["NO_VECTORS", "VectorForm", "check_dimensions", "unit_vector"]

_LEAST_LENGTH = 1e-12
"""What shorter vectors are divided by; torch's constant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorForm:
    """How the prompts of one model are written whose last token's state is wanted."""

    is_conversation: bool = False
    """Whether a text is a user's turn in the chat template; otherwise it is plain text."""
    instruction: str = ""
    """The system turn of conversations that have none; where it is empty, what the template says."""
    ending: tuple[int, ...] = ()
    """Ids behind the prompt."""
    why_not: str | None = None
    """Why there are none; None: there are."""

    @classmethod
    def of(cls, config: CheckpointConfig, tokenizer: Tokenizer) -> VectorForm:
        """What the tokenizer's files and the model's family say; raises CheckpointError."""
        if config.why_no_vectors is not None:
            return cls(why_not=config.why_no_vectors)
        ending, prompt = TokenizerFile.read(config.folder).ending, config.family.vector_prompt
        if prompt is None:
            return cls(ending=ending)
        if prompt.end and not ending:
            if prompt.end not in tokenizer.added:
                raise CheckpointError(
                    f"{config.folder}: the tokenizer has no {prompt.end}, which ends what is embedded"
                )
            ending = (tokenizer.added[prompt.end],)
        return cls(is_conversation=True, instruction=prompt.instruction, ending=ending)

    def check(self) -> None:
        """Raise UnsupportedError where there are no vectors."""
        if self.why_not is not None:
            raise UnsupportedError(f"the model answers and does not embed: {self.why_not}")

    def dialogue(self, text: str) -> Dialogue:
        """A text as a user's turn."""
        return self.instructed(Dialogue([Message(role="user", content=text)], param="input"))

    def instructed(self, dialogue: Dialogue) -> Dialogue:
        """`dialogue` with a system turn in front, where this model wants one and there is none."""
        has_one = any(message.role == "system" for message in dialogue.messages)
        if not self.instruction or not dialogue.messages or has_one:
            return dialogue
        return replace(dialogue, messages=[Message(role="system", content=self.instruction), *dialogue.messages])


NO_VECTORS = VectorForm(why_not="it was not opened from a folder that says how")


def unit_vector(state: bytes, dimensions: int | None = None) -> NDArray[np.float32]:
    """`Output.vector`, cut to its first `dimensions` (Matryoshka representations, Kusupati et al. 2022) and made one of
    length 1."""
    vector = np.frombuffer(state, "<f4")[:dimensions].astype(np.float64)
    length = max(float(np.linalg.norm(vector)), _LEAST_LENGTH)
    return (vector / length).astype(np.float32)


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise InvalidRequestError for more than there are, or none."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise InvalidRequestError(
            f"dimensions is {dimensions}; this model's vectors have from 1 to {hidden_size}", param="dimensions"
        )
