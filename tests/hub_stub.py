"""The part of the Hugging Face hub's HTTP interface that uploads and downloads of models use, on this machine."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """What a repository holds, by commit; branches point to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files to the main branch and return the commit."""
        held = self.commits.get(self.branches.get("main", ""), {}) | files
        text = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in held.items()})
        sha = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[sha] = held
        self.branches["main"] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.commits[self.branches["main"]]


class Hub:
    """A server with repositories; a context manager."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Put a public repository there, and return its commit."""
        return self.repositories.setdefault(name, Repository()).commit(files)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, content: bytes | Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _path(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def do_PUT(self) -> None:
        body = self._body()
        self.hub.large[self._path()[-1]] = body
        self._reply(b"")

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "Unauthorized", "Invalid credentials.")
        elif path == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif path == ["api", "validate-yaml"]:
            self._reply({"errors": [], "warnings": []})
        elif path[:2] == ["api", "models"] and path[4] == "preupload":
            modes = [self._mode(file["path"]) for file in json.loads(body)["files"]]
            self._reply({"files": modes})
        elif path[:2] == ["api", "models"] and path[4] == "commit":
            self._commit("/".join(path[2:4]), [json.loads(line) for line in body.splitlines()])
        elif path[-2:] == ["objects", "batch"]:
            self._reply({"transfer": "basic", "objects": [self._large(one) for one in json.loads(body)["objects"]]})
        else:
            self._refuse(404, "EntryNotFound", "Not here.")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        reply = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            self._reply(reply | {"error": "You already created this model repo"}, 409)
            return
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._reply(reply)

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".gguf", ".bin"))
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _large(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.hub.large
        upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}", "header": {}}}}
        return asked if known else asked | upload

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = self.hub.repositories[name].commit(files)
        self._reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if path[:2] == ["api", "models"]:
            self._found("/".join(path[2:4]), path[5] if len(path) > 5 else "main", path[4:5], path[6:])
        elif len(path) > 4 and path[2] == "resolve":
            self._found("/".join(path[:2]), path[3], ["resolve"], path[4:])
        else:
            self._refuse(404, "EntryNotFound", "Not here.")

    def _found(self, name: str, revision: str, what: list[str], rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        files = repository.commits[sha]
        if what == ["resolve"]:
            self._file(files, "/".join(rest), sha)
        elif what == ["tree"]:
            self._reply([_entry(path, content) for path, content in sorted(files.items())])
        else:
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": []}
            self._reply(about | {"siblings": siblings})

    def _file(self, files: dict[str, bytes], path: str, sha: str) -> None:
        if path not in files:
            self._reply(b"Entry not found", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        etag = hashlib.sha1(files[path]).hexdigest()
        self._reply(files[path], X_Repo_Commit=sha, ETag=f'"{etag}"', Accept_Ranges="bytes")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
