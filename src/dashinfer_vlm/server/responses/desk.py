"""Where responses are kept and found again; what one tenant has said is nobody else's business."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from dashinfer_vlm.errors import InvalidRequestError, OverloadedError
from dashinfer_vlm.server.errors import HttpError
from dashinfer_vlm.server.responses import kept
from dashinfer_vlm.server.responses.ids import response_of
from dashinfer_vlm.server.responses.items import AnyItem, MessageItemBody, ReferenceBody
from dashinfer_vlm.server.responses.jobs import Jobs, Keep
from dashinfer_vlm.server.responses.replies import ResponseReply
from dashinfer_vlm.server.responses.store import Kept, ResponseStore
from dashinfer_vlm.server.responses.turns import Placed


class Desk:
    """The responses of one server: those under way in the background, and those that are over."""

    def __init__(self, store: ResponseStore) -> None:
        """`close` closes the store too."""
        self._store = store
        self.jobs = Jobs()

    @property
    def keeps_anything(self) -> bool:
        return self._store.max_bytes > 0

    async def close(self) -> None:
        await self.jobs.close()
        await self._store.close()

    async def earlier(self, tenant: str, previous: str | None, hold: Callable[[int], None]) -> list[Placed]:
        """What was said up to the response `previous`; `hold` counts its bytes.

        Raises HttpError where that is not kept, or another tenant's, and what `hold` raises.
        """
        if previous is None:
            return []
        chain = await self._chain(tenant, previous)
        hold(sum(each.size for each in chain))
        items = await asyncio.to_thread(lambda: [item for each in chain for item in kept.items_of(each)])
        return [Placed(item, "previous_response_id") for item in items]

    async def own(
        self, tenant: str, input: str | Sequence[AnyItem | ReferenceBody], hold: Callable[[int], None]
    ) -> list[Placed]:
        """The items of an input; `hold` counts the bytes of those that are only named, as often as they are.

        Raises HttpError for one that is named and not kept, InvalidRequestError for none, and what `hold` raises.
        """
        if isinstance(input, str):
            return [Placed(MessageItemBody(type="message", role="user", content=input), "input")]
        if not input:
            raise InvalidRequestError("input is empty; send a text or at least one item", param="input")
        named = await self._named(tenant, [item.id for item in input if isinstance(item, ReferenceBody)], hold)
        places = [f"input[{i}]" for i in range(len(input))]
        return [
            Placed(_meant(named, item.id, where) if isinstance(item, ReferenceBody) else item, where)
            for item, where in zip(input, places, strict=True)
        ]

    def keeper(self, tenant: str, input: bytes) -> Keep:
        """What stores a response to these items, a JSON list; raises InvalidRequestError where they are too large."""
        if 2 * len(input) > self._store.max_bytes:
            raise InvalidRequestError(
                f"an input of {len(input)} bytes is too large to be stored where all responses together may have "
                f"{self._store.max_bytes}; send store: false or start with --responses-store-mib",
                param="store",
            )

        async def keep(reply: ResponseReply) -> None:
            told = msgspec.json.encode(reply)
            row = Kept(id=reply.id, previous=reply.previous_response_id, input=input, reply=told)
            await self._store.put(tenant, row)

        return keep

    def check_jobs(self, num_bytes: int) -> None:
        """Raise OverloadedError where responses in the background hold too much to begin another one."""
        if self.jobs.num_bytes + num_bytes > self._store.max_bytes:
            raise OverloadedError(
                f"responses in the background hold {self.jobs.num_bytes} bytes, the limit is {self._store.max_bytes}; "
                "try again later",
                reason="background_bytes",
            )

    async def reply(self, tenant: str, id: str) -> bytes:
        """A response as JSON; raises HttpError. The end of one in the background is told when it is stored, so that it
        can be gone on with at once, and its place for a request is free again."""
        job = self.jobs.find(tenant, id)
        if job and job.is_under_way:
            return msgspec.json.encode(job.writer.reply)
        if job:
            await asyncio.wait({job.task})
        return (await self._kept(tenant, id)).reply

    async def input(self, tenant: str, id: str) -> list[msgspec.Raw]:
        """The items of a response's own input; raises HttpError."""
        job = self.jobs.find(tenant, id)
        return kept.inputs(job.input if job else (await self._kept(tenant, id)).input)

    async def delete(self, tenant: str, id: str) -> None:
        """End and forget it; raises HttpError."""
        await self.jobs.cancel(tenant, id)
        if not await self._store.delete(tenant, id):
            raise _not_found(id)

    async def cancel(self, tenant: str, id: str) -> bytes:
        """End it, if it is under way, and tell it as it is then. Raises HttpError."""
        if reply := await self.jobs.cancel(tenant, id):
            return msgspec.json.encode(reply)
        found = await self._kept(tenant, id)
        if not kept.was_in_background(found):
            raise HttpError(400, "invalid_value", "Cannot cancel a synchronous response.", param="response_id")
        return found.reply

    async def _kept(self, tenant: str, id: str) -> Kept:
        found = await self._store.get(tenant, id)
        if found is None:
            raise _not_found(id)
        return found

    async def _chain(self, tenant: str, id: str) -> list[Kept]:
        try:
            return await self._store.chain(tenant, id)
        except KeyError as error:
            if self.jobs.find(tenant, error.args[0]):
                raise HttpError(
                    400,
                    "previous_response_not_found",
                    f"Previous response with id {error.args[0]!r} is still in progress; poll it until it has ended.",
                    param="previous_response_id",
                ) from None
            raise HttpError(
                400,
                "previous_response_not_found",
                f"Previous response with id {error.args[0][:80]!r} not found.",
                param="previous_response_id",
            ) from None

    async def _named(self, tenant: str, ids: Sequence[str], hold: Callable[[int], None]) -> dict[str, AnyItem]:
        """Those that are kept. Each response is read once, however often it is named."""
        items: dict[str, AnyItem] = {}
        counts = Counter(ids)
        for response in dict.fromkeys(map(response_of, counts)):
            if found := await self._store.get(tenant, response):
                for id, (item, num_bytes) in (await asyncio.to_thread(kept.find_items, found, counts)).items():
                    hold(counts[id] * num_bytes)
                    items[id] = item
        return items


def _meant(named: dict[str, AnyItem], id: str, where: str) -> AnyItem:
    if id not in named:
        raise HttpError(404, "not_found", f"Item with id {id[:80]!r} not found.", param=f"{where}.id")
    return named[id]


def _not_found(id: str) -> HttpError:
    return HttpError(404, "not_found", f"Response with id {id[:80]!r} not found.", param="response_id")
