"""The page at `/` to try the model: the files of `page/` as they are, and what they must know about the model."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from dashinfer_vlm.server.context import Context

FOLDER = Path(__file__).parent / "page"

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: http: https:",  # pictures that the user names by URL; answers never become images
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes markup, whatever a mistake in the page tries
        "trusted-types 'none'",
    )
)


class PageModel(msgspec.Struct, frozen=True):
    """What the page shows of the model, and what it draws boxes with."""

    name: str
    max_model_len: int
    min_pixels: int
    max_pixels: int
    side_step: int
    """Both sides of a resized picture are multiples of this many pixels."""
    box_unit: str
    """What `bbox_2d` counts: pixels of the resized picture, or thousandths."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file in memory."""

    content: bytes
    media_type: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        return cls(path.read_bytes(), _TYPES[path.suffix])

    def response(self, request: Request) -> Response:
        """The file, or 304 when the browser has it: it asks each time, so that an update is seen at once."""
        tag = f'"{sha256(self.content).hexdigest()[:16]}"'
        headers = {
            "ETag": tag,
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_files() -> dict[str, PageFile]:
    """The page's files by their paths on the server. They hold no secret, so that no key is needed to load them."""
    files = {f"/page/{path.name}": PageFile.read(path) for path in sorted(FOLDER.iterdir())}
    files["/"] = files.pop("/page/index.html")
    return files


def page_routes(context: Context) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, file in page_files().items():
        router.add_api_route(path, file.response, methods=["GET", "HEAD"])

    @router.get("/page/model.json")
    async def model() -> Response:
        return Response(msgspec.json.encode(_model(context)), media_type="application/json")

    return router


def _model(context: Context) -> PageModel:
    info, prompts = context.service.engine.info, context.service.prompts
    loader = prompts.loader
    least, most = loader.pixel_bounds
    return PageModel(context.model_names[0], info.max_model_len, least, most, loader.side_step, prompts.box_unit)
