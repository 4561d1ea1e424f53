"""`POST /v1/rerank` and `POST /v1/score`: how well documents answer a query, in the forms of Jina, Cohere and vLLM."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field, Tag
from starlette.responses import Response

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.answers import collect_vectors
from dashinfer_vlm.frontend.conversation import Content, ContentReader, ProcessorBody
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Part, TextPart
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.parts import ImageBody, PartBody, TextBody, VideoBody
from dashinfer_vlm.frontend.schema import Body, Whole, by_shape, no_effect, only
from dashinfer_vlm.frontend.scores import Pair, check_side, score_of
from dashinfer_vlm.frontend.truncation import Truncation
from dashinfer_vlm.server.body import read_body, unless_gone
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import GENERATING, Operation
from dashinfer_vlm.server.embeddings import EmbeddingUsage
from dashinfer_vlm.server.respond import admitted
from dashinfer_vlm.server.sampling import PromptBody
from dashinfer_vlm.server.status import json_response

RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Jina's, Cohere's and vLLM's."""
SCORE_PATHS = ("/v1/score", "/score")
MAX_PAIRS = 2048
"""Of one request, as many as texts of one for vectors."""
_NAMES = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"))

Parts = Sequence[Part]
Placed = tuple[PartBody, str]
"""A part, and where it stands."""


class SideBody(Body):
    """A query or a document that is more than a text: in parts, as in vLLM, or as Jina and the publisher's script have
    it."""

    content: Content | None = None
    video: str | list[str] | None = None
    image: str | None = None
    text: str | None = None

    def placed(self, where: str) -> list[Placed]:
        """In the order of the publisher's script. Raises InvalidRequestError."""
        found: list[Placed] = []
        if self.video is not None:
            found.append((VideoBody.model_validate({"type": "video", "video": self.video}), where))
        if self.image is not None:
            found.append((ImageBody(type="image", image=self.image), where))
        if self.text is not None:
            found.append((TextBody(type="text", text=self.text), where))
        if self.content is None:
            return found
        if found:
            raise InvalidRequestError(f"{where} has content and more beside it; send one of them", param=where)
        if isinstance(self.content, str):
            return [(TextBody(type="text", text=self.content), where)]
        return [(part, f"{where}.content[{i}]") for i, part in enumerate(self.content)]


Side = Annotated[Annotated[str, Tag(":text")] | Annotated[SideBody, Tag(":object")], by_shape]
Sides = Annotated[
    Annotated[str, Tag(":text")] | Annotated[SideBody, Tag(":object")] | Annotated[list[Side], Tag(":list")], by_shape
]


class ScoringBody(PromptBody):
    """What both routes take."""

    instruction: str | None = None
    mm_processor_kwargs: ProcessorBody | None = None

    # no effect by their nature
    user: Annotated[str | None, no_effect] = None
    request_id: Annotated[str | None, no_effect] = None

    # known, not served
    truncation_side: Annotated[Any, only("right")] = None
    max_tokens_per_doc: Annotated[Any, only(0)] = None
    max_tokens_per_query: Annotated[Any, only(0)] = None
    use_activation: Annotated[Any, only(True)] = None
    activation: Annotated[Any, only(True)] = None
    softmax: Annotated[Any, only(True)] = None
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None

    def params(self) -> GenerationParams:
        """Documents that are too long lose their ends: on the left stands what they are judged by."""
        most = self.truncate_prompt_tokens
        return GenerationParams(
            cache_salt=self.cache_salt or "",
            truncation=None if most is None else Truncation(most, "right"),
            priority=self.priority or 0,
            timeout_s=self.timeout,
        )

    def read(self, fields: Mapping[str, Sides], bounds: tuple[int, int]) -> list[dict[str, Parts]]:
        """The entries of each field by their places; `bounds` are the least and most pixels of an image here. Raises
        InvalidRequestError."""
        told = {name: _placed(sides, name) for name, sides in fields.items()}
        everything = [[part for part, _ in side] for sides in told.values() for side in sides.values()]
        reader = ContentReader(everything, bounds, self.mm_processor_kwargs)
        return [{where: _read(reader, where, side) for where, side in sides.items()} for sides in told.values()]


class RerankBody(ScoringBody):
    """Jina's and Cohere's, with what vLLM adds."""

    query: Side
    documents: Sides
    top_n: Annotated[Whole, Field(ge=0)] | None = None
    """0 is all of them, as in vLLM."""
    return_documents: bool | None = None

    # known, not served
    rank_fields: Annotated[Any, only([])] = None
    max_chunks_per_doc: Annotated[Any, only()] = None

    def pairs(self, bounds: tuple[int, int]) -> list[Pair]:
        """Raises InvalidRequestError."""
        queries, documents = self.read({"query": self.query, "documents": self.documents}, bounds)
        (query,) = queries.values()
        return [Pair(query, document, where) for where, document in documents.items()]


class ScoreBody(ScoringBody):
    """vLLM's, under any of the three names that it has for the two sides."""

    text_1: Sides | None = None
    text_2: Sides | None = None
    data_1: Sides | None = None
    data_2: Sides | None = None
    queries: Sides | None = None
    documents: Sides | None = None

    def pairs(self, bounds: tuple[int, int]) -> list[Pair]:
        """One query with each document, or as many, each with its own. Raises InvalidRequestError."""
        names = [names for names in _NAMES if any(getattr(self, name) is not None for name in names)]
        if len(names) != 1 or (missing := [name for name in names[0] if getattr(self, name) is None]):
            wanted = ", or ".join(" and ".join(names) for names in _NAMES)
            raise InvalidRequestError(f"send {wanted}", param=missing[0] if len(names) == 1 else "text_1")
        queries, documents = self.read({name: getattr(self, name) for name in names[0]}, bounds)
        if len(queries) not in (1, len(documents)):
            raise InvalidRequestError(
                f"{names[0][0]} has {len(queries)} entries and {names[0][1]} {len(documents)}; send one, or as many",
                param=names[0][0],
            )
        of_each = list(queries.values()) * (len(documents) // len(queries))
        return [Pair(query, *told[::-1]) for query, told in zip(of_each, documents.items(), strict=True)]


class RankedText(msgspec.Struct, frozen=True):
    text: str


class Ranked(msgspec.Struct, frozen=True):
    index: int
    """Of the document in the request."""
    relevance_score: float
    document: RankedText | msgspec.UnsetType = msgspec.UNSET
    """One of text alone, unless the request wants none."""


class RerankReply(msgspec.Struct, frozen=True):
    id: str
    model: str
    results: list[Ranked]
    """The best first."""
    usage: EmbeddingUsage


class ScoreObject(msgspec.Struct, frozen=True):
    index: int
    score: float
    object: str = "score"


class ScoreReply(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    data: list[ScoreObject]
    usage: EmbeddingUsage
    object: str = "list"


RERANK = Operation(
    summary="Documents in the order in which they answer a query.",
    body=RerankBody,
    example={"query": "Who stands in the reeds?", "documents": ["A heron.", "It rains."]},
    reply=RerankReply,
    errors=GENERATING,
)
SCORE = Operation(
    summary="How well documents answer queries, pair by pair.",
    body=ScoreBody,
    example={"text_1": "Who stands in the reeds?", "text_2": ["A heron.", "It rains."]},
    reply=ScoreReply,
    errors=GENERATING,
)


def score_routes(context: Context) -> APIRouter:
    """Of a model that was published for scores."""
    router = APIRouter()
    service, bounds = context.service, context.service.prompts.loader.pixel_bounds

    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankBody, context.bodies)
        head, pairs = context.head("rerank", body.model), body.pairs(bounds)
        told = [_told(document) if body.return_documents is not False else msgspec.UNSET for _, document, _ in pairs]
        begin = admitted(request, service.score(pairs, body.params(), instruction=body.instruction))
        most = body.top_n or len(pairs)
        del body, pairs  # their images may be large
        scores, usage = await unless_gone(request, _collected(begin), lambda _: None)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:most]
        results = [Ranked(i, scores[i], told[i]) for i in best]
        return json_response(RerankReply(head.id, head.model, results, usage))

    async def score(request: Request) -> Response:
        body = await read_body(request, ScoreBody, context.bodies)
        head = context.head("score", body.model)
        begin = admitted(request, service.score(body.pairs(bounds), body.params(), instruction=body.instruction))
        del body
        scores, usage = await unless_gone(request, _collected(begin), lambda _: None)
        data = [ScoreObject(i, score) for i, score in enumerate(scores)]
        return json_response(ScoreReply(head.id, head.created, head.model, data, usage))

    for paths, operation, answer in ((RERANK_PATHS, RERANK, rerank), (SCORE_PATHS, SCORE, score)):
        for path in paths:
            router.add_api_route(path, answer, methods=["POST"], openapi_extra=operation.extra)
    return router


def _placed(sides: Sides, name: str) -> dict[str, list[Placed]]:
    """What the entries of a field hold, by where they stand."""
    listed = {f"{name}[{i}]": side for i, side in enumerate(sides)} if isinstance(sides, list) else {name: sides}
    if not 1 <= len(listed) <= MAX_PAIRS:
        raise InvalidRequestError(f"{name} has {len(listed)} entries; send from 1 to {MAX_PAIRS}", param=name)
    return {
        where: [(TextBody(type="text", text=side), where)] if isinstance(side, str) else side.placed(where)
        for where, side in listed.items()
    }


def _read(reader: ContentReader, where: str, placed: list[Placed]) -> Parts:
    parts = tuple(reader.part(part, place) for part, place in placed)
    check_side(parts, where)
    return parts


def _told(document: Parts) -> RankedText | msgspec.UnsetType:
    """Nothing of one with pictures."""
    texts = [part.text for part in document if isinstance(part, TextPart)]
    return RankedText("".join(texts)) if len(texts) == len(document) else msgspec.UNSET


async def _collected(begin: Coroutine[Any, Any, Generation]) -> tuple[list[float], EmbeddingUsage]:
    generation = await begin
    scores = [score_of(state) for state in await collect_vectors(generation)]
    return scores, EmbeddingUsage.of(generation.usage)
