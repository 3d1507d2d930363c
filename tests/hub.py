"""A server on loopback that speaks what pushing to the Hugging Face Hub and pulling from it need."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "token-of-me"
REFUSED = "Invalid credentials in Authorization header"


class RefusedError(Exception):
    """An answer with an error status; code and message go into the headers of the Hub."""

    def __init__(self, status, code="", message=""):
        super().__init__(status, code, message)


@dataclass
class Repository:
    """A repository and its history."""

    private: bool
    history: list = field(default_factory=lambda: [("0" * 40, {})])
    """(commit, path -> content), oldest first."""

    def files(self, revision):
        """Return the commit of a revision, and its files."""
        if revision in ("main", None):
            return self.history[-1]
        found = next((it for it in self.history if it[0] == revision), None)
        if found is None:
            raise RefusedError(404, "RevisionNotFound")
        return found


class FakeHub:
    """The repositories of a Hub; the token belongs to the user me."""

    def __init__(self):
        self.repositories, self.objects, self.requests = {}, {}, []
        self.damaged, self.on_preupload = set(), lambda: None

    def repository(self, name, user, *, write=False):
        """Find a repository that a user may read, or write."""
        found = self.repositories.get(name)
        owns = name.partition("/")[0] == user
        if found is None or (found.private and not owns):
            raise RefusedError(404, "RepoNotFound")
        if write and not owns:
            raise RefusedError(403, "", "you have no right to write there")
        return found

    def create(self, user, body, address):
        """POST /api/repos/create."""
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else f"{user}/{body['name']}"
        if name.partition("/")[0] != user:
            raise RefusedError(403, "", "you have no right to create there")
        self.repositories[name] = Repository(private=body.get("visibility") == "private" or bool(body.get("private")))
        return {"url": f"{address}/{name}"}

    def info(self, name, user, revision):
        """GET /api/models/NAME."""
        repository = self.repository(name, user)
        commit, files = repository.files(revision)
        return {
            "id": name,
            "sha": commit,
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in files],
        }

    def preupload(self, name, user, body):
        """POST /api/models/NAME/preupload/REVISION: safetensors are LFS."""
        self.repository(name, user, write=True)
        modes = {True: "lfs", False: "regular"}
        files = [it["path"] for it in body["files"]]
        self.on_preupload()
        return {
            "files": [
                {"path": it, "uploadMode": modes[it.endswith(".safetensors")], "shouldIgnore": False} for it in files
            ]
        }

    def batch(self, name, user, body, address):
        """POST /NAME.git/info/lfs/objects/batch."""
        self.repository(name, user, write=True)
        missing = [it for it in body["objects"] if it["oid"] not in self.objects]
        actions = {it["oid"]: {"upload": {"href": f"{address}/lfs/{it['oid']}"}} for it in missing}
        objects = [
            {**it, **({"actions": actions[it["oid"]]} if it["oid"] in actions else {})} for it in body["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def put(self, oid, content):
        """PUT /lfs/OID: the content must have this hash."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, "", "the content has another hash")
        self.objects[oid] = content
        return {}

    def commit(self, name, user, lines, address):
        """POST /api/models/NAME/commit/REVISION."""
        repository = self.repository(name, user, write=True)
        parent, before = repository.history[-1]
        files, header = dict(before), lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise RefusedError(412, "", "a commit has happened since")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                del files[value["path"]]
        commit = hashlib.sha1(f"{len(repository.history)} {name}".encode()).hexdigest()
        repository.history.append((commit, files))
        return {"commitUrl": f"{address}/{name}/commit/{commit}", "commitOid": commit}

    def describe(self, name, user, revision, paths):
        """POST /api/models/NAME/paths-info/REVISION."""
        _, files = self.repository(name, user).files(revision)
        found = []
        for path in paths:
            content = files[path]
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 100}
            found.append({"type": "file", "path": path, "size": len(content), "oid": blob})
            found[-1] |= {"lfs": lfs} if path.endswith(".safetensors") else {}
        return found

    def resolve(self, name, user, revision, path):
        """GET /NAME/resolve/REVISION/PATH: commit and content; that of a damaged path has another first byte."""
        commit, files = self.repository(name, user).files(revision)
        if path not in files:
            raise RefusedError(404, "EntryNotFound")
        content = files[path]
        return commit, bytes([content[0] ^ 1]) + content[1:] if path in self.damaged else content


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to a server with the attribute `hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Keep the terminal clean."""

    def do_GET(self):
        """Answer any request."""
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # names of http.server

    def body(self):
        """Read the body, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self):
        """Route a request, and send its answer or error."""
        body, path = self.body(), unquote(urlsplit(self.path).path)
        self.server.hub.requests.append((self.command, path))
        try:
            status, headers, content = 200, {}, self.route(path, body)
            if isinstance(content, tuple):
                headers["X-Repo-Commit"], content = content
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            else:
                content = json.dumps(content).encode()
        except RefusedError as error:
            status, code, message = error.args
            headers, content = (
                {"X-Error-Code": code, "X-Error-Message": message},
                json.dumps({"error": message}).encode(),
            )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self, path, body):
        """Call what a path names."""
        hub, address = self.server.hub, f"http://{self.headers['Host']}"
        if path.startswith("/lfs/"):
            return hub.put(path.removeprefix("/lfs/"), body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise RefusedError(401, "", REFUSED)
        user = "me" if token else None
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return hub.create(user, json.loads(body), address)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return hub.resolve(found[1], user, found[2], found[3])
        return self.route_model(hub, user, path, body, address)

    def route_model(self, hub, user, path, body, address):
        """Call what a path below a repository names."""
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return hub.batch(found[1], user, json.loads(body), address)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)/([^/]+))?", path)
        if found is None:
            raise RefusedError(404)
        name, verb, revision = found.groups()
        calls = {
            "preupload": lambda: hub.preupload(name, user, json.loads(body)),
            "commit": lambda: hub.commit(name, user, [json.loads(line) for line in body.splitlines()], address),
            "paths-info": lambda: hub.describe(name, user, revision, parse_qs(body.decode())["paths"]),
        }
        return calls.get(verb, lambda: hub.info(name, user, revision))()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without repositories, which the client of this process is pointed to, with the token of me."""
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = fake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()
