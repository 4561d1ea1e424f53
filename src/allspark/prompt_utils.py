"""Prompts in the ChatML form, for text that no chat template has seen."""

from __future__ import annotations

__all__ = ["PromptTemplate"]

_SYSTEM = "You are a helpful assistant."


class PromptTemplate:
    """Prompt forms by name."""

    @staticmethod
    def apply_chatml_template(inputs: str) -> str:
        """A user's one message after the default system message, up to where the answer begins."""
        turns = (("system", _SYSTEM), ("user", inputs))
        told = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        return f"{told}<|im_start|>assistant\n"
