"""A Hub of the size that a test needs, on this machine: create a repository, commit to it, download a revision."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions: dict[str, dict[str, dict[str, bytes]]] = {}  # by repository and id, oldest first: files
        self.private: set[str] = set()  # repositories
        self.cards: list[str] = []  # metadata that was sent to be checked
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The id and the files of a commit, given whole or by its first characters."""
        commits = self.revisions[repo]
        sha = list(commits)[-1] if revision == "main" else next(sha for sha in commits if sha.startswith(revision))
        return sha, commits[sha]


class Handler(BaseHTTPRequestHandler):
    """The requests of huggingface_hub."""

    server: Hub
    protocol_version = "HTTP/1.1"
    info: ClassVar[re.Pattern[str]] = re.compile(
        r"/api/models/([\w.-]+/[\w.-]+)(?:/(?:revision|tree)/([^/?]+))?(?:\?.*)?"
    )
    resolve: ClassVar[re.Pattern[str]] = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([^?]+)")

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.say({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if repo in self.server.revisions:
                self.say({"error": "You already created this model repo", "url": f"{self.server.endpoint}/{repo}"}, 409)
                return
            self.server.revisions[repo] = {"0" * 40: {}}
            if given.get("private") or given.get("visibility") == "private":
                self.server.private.add(repo)
            self.say({"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": repo})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.say({"files": files})
        elif match := re.match(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            files = dict(self.server.files(match[1])[1])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "deletedFile":
                    del files[entry["value"]["path"]]
            sha = hashlib.sha1(body).hexdigest()
            self.server.revisions[match[1]][sha] = files
            self.say(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{match[1]}/commit/{sha}"}
            )
        else:
            self.say({"error": self.path}, 404)

    def do_GET(self) -> None:
        asked, wanted = self.info.fullmatch(self.path), self.resolve.match(self.path)
        match = asked or wanted
        if match is None or match[1] not in self.server.revisions:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        sha, files = self.server.files(match[1], match[2] or "main")
        if "/tree/" in self.path:
            self.say([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files])
        elif asked:
            siblings = [{"rfilename": name} for name in files]
            self.say({"id": match[1], "sha": sha, "private": match[1] in self.server.private, "siblings": siblings})
        elif match[3] in files:
            etag = hashlib.sha1(files[match[3]]).hexdigest()
            self.answer(200, files[match[3]], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """A running Hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
