"""TLS with a certificate that may be replaced while the server runs."""

from __future__ import annotations

import logging
import ssl

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.files import Changes

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate and its key, read again when their files change: connections from then on get the new one. A pair
    that cannot be used is logged, and the one before stays."""

    def __init__(self, certfile: str, keyfile: str) -> None:
        """Files in PEM format; raises ConfigError."""
        self.certfile, self.keyfile = certfile, keyfile
        self._changes = Changes(certfile, keyfile)
        self._context = self._read()

    def follow(self, context: ssl.SSLContext) -> None:
        """Have the connections of `context` get this certificate instead of its own."""
        context.sni_callback = self._hand_out  # called in every handshake, also where no name is asked for

    def _hand_out(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        if self._changes.happened():
            self.read_again()
        connection.context = self._context

    def read_again(self) -> None:
        """Look at the files now."""
        try:
            self._context = self._read()
            logger.info("the certificate in %s is used from now on", self.certfile)
        except ConfigError as error:
            logger.error("%s; the certificate before is still used", error)

    def _read(self) -> ssl.SSLContext:
        """A context of its own: one that has half of a new pair would be of no use."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or error
            raise ConfigError(
                f"--ssl-certfile {self.certfile} with --ssl-keyfile {self.keyfile} cannot be used: {reason}"
            ) from error
        return context
