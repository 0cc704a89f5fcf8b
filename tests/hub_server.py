"""A small server with the calls of the Hugging Face hub that sharing uses; what it holds is in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_thetokenofthetests"
CARD = re.compile(r"---\n(.*?\n)---\n", re.S)


class Hub(ThreadingHTTPServer):
    """By repository the files of its last commit; `private` ones are there for the token alone."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.resolve()

    def do_GET(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        """A file; of /api/models/NAME/REPO, that there is one."""
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/resolve/main/(.+))?", self.path)
        repo, file = match.groups() if match else ("", "")
        files = self.server.repos.get(repo)
        if files is None or (repo in self.server.private and not self.is_known):
            return self.fail(401 if not self.is_known else 404, "RepoNotFound")
        if file is None:
            return self.say({"id": repo})
        if file not in files:
            return self.fail(404, "EntryNotFound")
        content = files[file]
        known = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
        self.answer(200, content, **known)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rpartition("/")[2]] = content
        self.answer(200, b"")

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length")
        content = self.rfile.read(int(size)) if size else b"".join(self.chunks())
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(content)["content"])
        if not self.is_known:
            return self.fail(401, None)
        if self.path == "/api/repos/create":
            return self.create(json.loads(content))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {
                    "path": x["path"],
                    "uploadMode": "regular" if x["path"].endswith(".md") else "lfs",
                    "shouldIgnore": False,
                }
                for x in json.loads(content)["files"]
            ]
            return self.say({"files": files}) if match[1] in self.server.repos else self.fail(404, "RepoNotFound")
        if self.path.endswith(".git/info/lfs/objects/batch"):
            found = json.loads(content)["objects"]
            upload = [{**x, "actions": {"upload": {"href": f"{self.server.address}/lfs/{x['oid']}"}}} for x in found]
            return self.say({"transfer": "basic", "objects": upload})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self.commit(match[1], [json.loads(line) for line in content.splitlines()])
        return self.fail(404, None)

    def validate(self, card: str) -> None:
        front = CARD.match(card)
        fields = yaml.safe_load(front[1]) if front else {}
        if re.fullmatch(r"[a-z0-9.-]+", str(fields.get("license", ""))):
            return self.say({"warnings": [], "errors": []})
        self.answer(400, json.dumps({"errors": [{"message": '"license" is not one of the list'}]}).encode())

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "another":
            return self.fail(403, None)
        status = 409 if repo in self.server.repos else 200
        self.server.repos.setdefault(repo, {})
        if asked.get("visibility") == "private":
            self.server.private.add(repo)
        self.answer(status, json.dumps({"url": f"{self.server.address}/{repo}"}).encode())

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo]
        for value in [line["value"] for line in lines if line["key"] == "file"]:
            files[value["path"]] = base64.b64decode(value["content"])
        for value in [line["value"] for line in lines if line["key"] == "lfsFile"]:
            files[value["path"]] = self.server.objects[value["oid"]]
        oid = commit_of(files)
        self.say({"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{repo}/commit/{oid}"})

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def say(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def fail(self, status: int, code: str | None) -> None:
        self.answer(status, b"{}", **({"X-Error-Code": code} if code else {}))

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The server, with its owner's token, and a cache of its own; Xet, the hub's own upload protocol, is left out."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
