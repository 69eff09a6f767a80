"""A stand-in for the Hugging Face hub on this machine: its file layout over HTTP, with faults on demand."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Repositories are folders `<root>/<owner>/<name>`; each has one commit on one branch, main."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and Range header of every request for a file."""
        self.break_off: set[str] = set()
        """Files whose next download ends halfway."""
        self.gated: set[str] = set()
        self.endpoint = ""

    def files(self, repo: str) -> list[Path]:
        """Paths in a repository."""
        base = self.root / repo
        return sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file())


@contextlib.contextmanager
def serve(root: Path) -> Iterator[LocalHub]:
    """Serve until the block ends."""
    hub = LocalHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Quiet."""

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", headers.pop("length", str(len(body))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self._route()

        def do_GET(self) -> None:
            self._route()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path).strip("/")
            if path == "api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != "Bearer right":
                return self._answer(401, b"{}")
            if path == "api/repos/create":
                about = json.loads(body)
                repo = "/".join(filter(None, (about.get("organization"), about["name"])))
                (root / repo).mkdir(parents=True, exist_ok=True)
                return self._json({"url": f"{hub.endpoint}/{repo}", "name": repo})
            repo, _, action = path.removeprefix("api/models/").partition("/preupload/")
            if action:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            repo, _, action = path.removeprefix("api/models/").partition("/commit/")
            assert action, path
            for line in filter(None, body.decode().splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    file = root / repo / entry["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            return self._json(
                {"commitUrl": f"{hub.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def _route(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                self._list(path.removeprefix("api/models/"))
            else:
                self._file(path)

        def _missing(self, code: str) -> None:
            self._answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

        def _list(self, path: str) -> None:
            owner, name, *rest = path.split("/")
            repo = f"{owner}/{name}"
            if not (root / repo).is_dir():
                return self._missing("RepoNotFound")
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self._missing("RevisionNotFound")
            if rest[:1] == ["tree"]:
                found = [
                    {"type": "file", "path": str(one), "size": (root / repo / one).stat().st_size, "oid": COMMIT}
                    for one in hub.files(repo)
                ]
                return self._answer(200, json.dumps(found).encode(), Content_Type="application/json")
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": str(one)} for one in hub.files(repo)]}
            return self._answer(200, json.dumps(about).encode(), Content_Type="application/json")

        def _file(self, path: str) -> None:
            parts = path.split("/", 4)
            if len(parts) < 5 or parts[2] != "resolve":
                return self._missing("EntryNotFound")
            owner, name, _, revision, inside = parts
            assert revision in ("main", COMMIT)
            if f"{owner}/{name}" in hub.gated:
                return self._answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
            file = root / owner / name / inside
            hub.requests.append((self.command, inside, self.headers.get("Range", "")))
            if not file.is_file():
                return self._missing("EntryNotFound")
            body = file.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            headers = {"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            wanted = self.headers.get("Range", "")
            if self.command == "GET" and inside in hub.break_off:
                hub.break_off.discard(inside)
                self.send_response(200)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.connection.close()
                return None
            if wanted.startswith("bytes=") and self.command == "GET":
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                part = body[start:]
                headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return self._answer(206, part, **headers)
            return self._answer(200, body, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
