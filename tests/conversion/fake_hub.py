"""A fake of the Hub: an HTTP server on this machine that keeps what is uploaded."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, each with its files; `refusals` has the status of a refused request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.refusals: dict[str, int] = {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        for part, status in self.server.refusals.items():
            if part in path:
                return self.answer(status, {"error": "no"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        _, _, _, owner, name, action, *_ = [*path.split("/"), "", "", ""]
        files = self.server.files.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, {"error": "Repository not found"})
        if action == "preupload":
            wanted = json.loads(body)["files"]
            told = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in wanted
            ]
            return self.answer(200, {"files": told})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            address = f"{self.server.address}/{owner}/{name}/commit/1"
            return self.answer(200, {"commitOid": "1" * 40, "commitUrl": address, "success": True})
        if action == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(each), "oid": "0" * 40}
                for path, each in files.items()
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": path} for path in files]
        return self.answer(
            200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings, "tags": []}
        )

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.server.created.append(wanted)
        known = name in self.server.files
        self.server.files.setdefault(name, {})
        self.answer(409 if known else 200, {"url": f"{self.server.address}/{name}", "name": name})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Let huggingface_hub use the fake, with a token that may write."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
