"""A Hub of the size that a test needs, on this machine: download a revision."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions = {}  # by repository and id, oldest first: files
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The requests of huggingface_hub."""

    server: Hub
    protocol_version = "HTTP/1.1"
    info: ClassVar[re.Pattern[str]] = re.compile(
        r"/api/models/([\w.-]+/[\w.-]+)(?:/(?:revision|tree)/([^/?]+))?(?:\?.*)?"
    )
    resolve: ClassVar[re.Pattern[str]] = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([^?]+)")

    def log_message(self, *_):
        pass

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        asked, wanted = self.info.fullmatch(self.path), self.resolve.match(self.path)
        match = asked or wanted
        commits = self.server.revisions.get(match[1], {}) if match else {}
        if match is None or not commits:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        sha = list(commits)[-1] if match[2] in (None, "main") else match[2]
        files = commits[sha]
        if "/tree/" in self.path:
            self.say([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files])
        elif asked:
            self.say({"id": match[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif match[3] in files:
            etag = hashlib.sha1(files[match[3]]).hexdigest()
            self.answer(200, files[match[3]], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@contextmanager
def serving():
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
