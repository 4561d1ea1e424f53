"""The scripted server of the HTTP tests."""

from tests.server.conftest import folder, parts, serve, template, tokenizer

__all__ = ["folder", "parts", "serve", "template", "tokenizer"]
