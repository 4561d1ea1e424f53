"""What does not fit the model's context, in the words that client libraries look for.

They recognise "maximum context length is N tokens", and some read the numbers of OpenAI's sentence after it.
"""

from __future__ import annotations

from dashinfer_vlm.errors import ContextLengthError

_LONGER = "start the server with a larger --max-model-len"


def too_long(limit: int, reason: str, param: str | None = None) -> ContextLengthError:
    """`reason` is a sentence about what was sent."""
    return ContextLengthError(f"This model's maximum context length is {limit} tokens. However, {reason}", param=param)


def check_prompt(num_tokens: int, limit: int, param: str, num_unseen: int = 0) -> None:
    """Raise ContextLengthError for a prompt that leaves no room for an answer.

    `num_unseen` of its tokens stand for images and videos whose own numbers of tokens are not known yet.
    """
    if num_tokens < limit:
        return
    if num_unseen:
        reason = (
            f"your {param} have at least {num_tokens} tokens, each of {num_unseen} images and videos counted as one, "
            f"since none has been fetched; shorten the text, or {_LONGER}."
        )
    else:
        reason = f"your {param} resulted in {num_tokens} tokens; shorten the {param}, or {_LONGER}."
    raise too_long(limit, reason, param)


def check_total(num_tokens: int, max_tokens: int | None, limit: int, param: str, max_tokens_name: str) -> None:
    """Raise ContextLengthError unless a prompt of `num_tokens`, media included, and its answer fit.

    `max_tokens_name` is what the caller calls the bound of the answer.
    """
    check_prompt(num_tokens, limit, param)
    if max_tokens is None or num_tokens + max_tokens <= limit:
        return
    reason = (
        f"you requested {num_tokens + max_tokens} tokens ({num_tokens} in the {param}, {max_tokens} in the "
        f"completion); "
        f"lower {max_tokens_name} to at most {limit - num_tokens}, shorten the {param}, or {_LONGER}."
    )
    raise too_long(limit, reason, param)
