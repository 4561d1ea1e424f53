"""An event loop in a thread, for asynchronous rooms behind a synchronous face."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.forked import check_process

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for callers in other threads. An interrupted caller cancels its coroutine; one that waits when
    the loop is closed is told EngineDeadError."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        """The process that has the thread."""
        self._helpers = ThreadPoolExecutor(thread_name_prefix="offline")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._helpers)
        self._is_closing = False
        self._lock = threading.Lock()
        """So that what comes while it is closed is refused, or cancelled with the rest."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="offline", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._submit(coroutine)
        try:
            return future.result()
        except CancelledError:  # nobody else holds the future
            raise _closed() from None
        except BaseException:  # Ctrl-C above all: whoever stops waiting stops the work
            future.cancel()
            raise

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run` for a caller that has an event loop of its own."""
        future = self._submit(coroutine)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._is_closing:
                raise _closed() from None
            raise

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of `stream`, each made when it is asked for; leaving early closes the stream."""
        try:
            while (item := self.run(_next(stream))) is not _END:
                yield item
        finally:
            self.run(stream.aclose())

    async def aiterate(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`iterate` for a caller that has an event loop of its own."""
        try:
            while (item := await self.arun(_next(stream))) is not _END:
                yield item
        finally:
            await self.arun(stream.aclose())

    def close(self) -> None:
        """Cancel what still runs; idempotent."""
        if self._loop.is_closed():
            return
        with self._lock:
            self._is_closing = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._helpers.shutdown()  # the loop would not wait for the ends of its threads

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            check_process(self.pid)
            with self._lock:
                if self._is_closing:
                    raise _closed()
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except EngineDeadError:
            coroutine.close()
            raise


def _closed() -> EngineDeadError:
    return EngineDeadError("this object was closed")


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


_END: Any = object()


async def _next(stream: AsyncGenerator[T, None]) -> T:
    """StopAsyncIteration cannot leave a task, so the end is an object."""
    return await anext(stream, _END)


async def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all side by side; when one fails, or the caller is cancelled, the others are cancelled and awaited."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
