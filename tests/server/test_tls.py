"""A certificate that is replaced while the server runs."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from pathlib import Path

import pytest

from dashinfer_vlm.cli.serve import certificate_of
from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server import files
from dashinfer_vlm.server.app import create_app
from dashinfer_vlm.server.tls import Certificate
from tests.certificates import self_signed
from tests.server.conftest import Serve, TestedServer, listening


async def shown(port: int, name: str | None) -> str:
    """The certificate that a handshake shows, in PEM form; `name` is the host that is asked for."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=name or "127.0.0.1")
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return ssl.DER_cert_to_PEM_cert(der)


@pytest.mark.parametrize("name", ["localhost", None])
async def test_connections_get_the_certificate_that_is_in_the_files(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    """Also clients that ask for no name; and half of a pair is not used."""
    monkeypatch.setattr(files, "_LOOK_S", 0.0)
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        self_signed(tmp_path / str(number))
    old, new = (((tmp_path / number / "certificate.pem").read_text()) for number in "12")
    live = shutil.copytree(tmp_path / "1", tmp_path / "live")
    running, config = await serve(), ServerConfig(host="127.0.0.1", log_level="warning")
    certificate = Certificate(str(live / "certificate.pem"), str(live / "key.pem"))
    server = TestedServer(create_app(running.service, config), running.service, config, certificate)
    async with listening(server):
        port = server.servers[0].sockets[0].getsockname()[1]
        assert await shown(port, name) == old
        caplog.set_level(logging.INFO, "dashinfer_vlm")
        shutil.copy(tmp_path / "2" / "certificate.pem", live)
        assert await shown(port, name) == old
        assert "the certificate before is still used" in caplog.text
        shutil.copy(tmp_path / "2" / "key.pem", live)
        assert await shown(port, name) == new
        assert "is used from now on" in caplog.text


def test_flags_name_the_files_or_the_environment_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = map(str, self_signed(tmp_path))
    assert certificate_of(ServerConfig()) is None
    named = certificate_of(ServerConfig(ssl_certfile=certificate, ssl_keyfile=key))
    monkeypatch.setenv("SSL_CERTFILE", certificate)
    monkeypatch.setenv("SSL_KEYFILE", key)
    found = certificate_of(ServerConfig(ssl=True))
    for each in (named, found):
        assert each is not None
        assert (each.certfile, each.keyfile) == (certificate, key)


def test_files_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    key, certificate = self_signed(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be used: No such file"):
        Certificate(str(certificate), str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=f"--ssl-certfile {key} .* cannot be used"):
        Certificate(str(key), str(key))
