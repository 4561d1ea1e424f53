"""llama-index: structured output by its function-calling program, and chat with a picture."""

from __future__ import annotations

import pytest
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike

from conftest import MODEL, Seen

pytestmark = pytest.mark.clients


@pytest.fixture
def llm(url: str) -> OpenAILike:
    return OpenAILike(
        model=MODEL,
        api_base=url,
        api_key="EMPTY",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=1000,
        max_retries=0,
    )


def test_a_structured_prediction_is_an_object(llm: OpenAILike) -> None:
    program = {"tool_choice": "required"}
    assert isinstance(llm.structured_predict(Seen, PromptTemplate("What is on it?"), llm_kwargs=program), Seen)


def test_a_picture_is_taken(llm: OpenAILike, png: bytes) -> None:
    message = ChatMessage(role="user", blocks=[TextBlock(text="What is on it?"), ImageBlock(image=png)])
    assert llm.chat([message], max_tokens=8).message.content


def test_text_is_streamed(llm: OpenAILike) -> None:
    chunks = list(llm.stream_chat([ChatMessage(role="user", content="hi")], max_tokens=8))
    assert chunks[-1].message.content
