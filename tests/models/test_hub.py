"""Asking the hub ends within seconds and in one line, whatever answers."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.models import hub


class LocalHub:
    """Points huggingface_hub at this computer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._servers: list[http.server.ThreadingHTTPServer] = []

    def at(self, port: int) -> None:
        self._monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")

    def answers(self, status: int, code: str) -> None:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(b"{}" if self.command == "GET" else b"")

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self._servers.append(server)
        self.at(server.server_port)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    local = LocalHub(monkeypatch)
    yield local
    local.close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "no such model or revision"),
        (404, "RevisionNotFound", "no such model or revision"),
        (403, "GatedRepo", "accept a licence first"),
        (500, "", "the hub cannot be reached"),
        (429, "", "the hub cannot be reached"),
        (200, "", "gave no proper answer"),
    ],
)
def test_every_answer_but_the_model_is_one_line(online: LocalHub, status: int, code: str, said: str) -> None:
    online.answers(status, code)
    with pytest.raises(SdlabError, match=said) as raised:
        hub.snapshot("org/name", asked="org/name")
    assert str(raised.value).startswith("org/name: ") and "\n" not in str(raised.value)


def test_a_hub_that_never_answers_is_given_up_within_seconds(online: LocalHub) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        online.at(deaf.getsockname()[1])
        with pytest.raises(SdlabError, match="the hub cannot be reached"):
            hub.snapshot("org/name", asked="org/name")


def test_a_hub_that_is_not_there_names_the_three_ways_on(online: LocalHub) -> None:
    online.at(9)
    with pytest.raises(SdlabError, match=r"a local folder, a single file .* or a built-in model"):
        hub.snapshot("org/name@main", asked="org/name@main")


def test_offline_asks_nobody(online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_knock", lambda: pytest.fail("asked the hub"))
    with pytest.raises(SdlabError, match="HF_HUB_OFFLINE is set"):
        hub.snapshot("org/name", asked="org/name")
