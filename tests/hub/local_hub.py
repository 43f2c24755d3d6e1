"""A small Hugging Face Hub on this machine: the requests that huggingface_hub makes, and the faults that it meets.

Repositories are directories, served as they are, at one commit. As on the Hub, weights live in a storage of their own:
`resolve` answers with a redirect to another host, which must not see the token.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local"  # noqa: S105, of no other Hub


@dataclass
class Request:
    """One request that was answered.

    Attributes:
        method: GET, HEAD, POST or PUT.
        path: without the query.
        status: of the answer.
        sent: bytes of its body.
        ranged: it asked for a range.
    """

    method: str
    path: str
    status: int
    sent: int
    ranged: bool


@dataclass
class Fault:
    """What happens to the next requests whose method and path match: a status, a cut, or another file.

    Attributes:
        pattern: searched in "METHOD path range", or "... whole" where no range is asked for.
        kind: "status", "cut" (half of the body, then the connection ends), "ignore range", or "swap" (`data` instead).
        times: how many requests it meets.
        status: the answer's status.
        headers: the answer's headers, for "status".
        data: the body, for "swap".
        skip: how many requests are left alone first.
    """

    pattern: str
    kind: str
    times: int = 1
    status: int = 429
    headers: dict = field(default_factory=lambda: {"Retry-After": "0"})
    data: bytes = b""
    skip: int = 0


@dataclass
class Repo:
    """A repository: a directory's files, or files that were pushed."""

    path: Path | None = None
    private: bool = False
    pushed: dict = field(default_factory=dict)  # path -> bytes, or the oid of a stored file
    commits: list = field(default_factory=list)
    digests: dict = field(default_factory=dict)
    claimed: dict = field(default_factory=dict)  # path -> the size that is said

    @property
    def sha(self):
        return self.commits[-1] if self.commits else git_id(str(self.path).encode())

    def files(self):
        if self.path is None:
            return dict(self.pushed)
        return {p.relative_to(self.path).as_posix(): p for p in sorted(self.path.rglob("*")) if p.is_file()}

    def digest(self, path):
        """The SHA-256 of a file, noted once: a file that changes later keeps it, as in a commit."""
        if path not in self.digests:
            self.digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.digests[path]


def git_id(data):
    """A digest of 40 digits, as git has them."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def is_large(name):
    """Whether the Hub keeps a file in its storage rather than in git."""
    return name.endswith(".safetensors")


class LocalHub:
    """A server in a thread; `url` is its HF_ENDPOINT."""

    def __init__(self):
        self.repos, self.stored = {}, {}
        self.requests, self.faults = [], []
        self.lock = threading.Lock()
        self.leaks = []  # tokens that the storage has seen
        self.slow = 0.0  # seconds before each half of a shard that is downloaded
        self.open = Counter()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, path):
        """Serve a directory as a repository; returns its commit."""
        self.repos[name] = repo = Repo(Path(path))
        for file in repo.files().values():
            repo.digest(file)
        return repo.sha

    def fault(self, pattern, kind, **how):
        self.faults.append(Fault(pattern, kind, **how))

    def take_fault(self, text):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, text):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sent(self, pattern=""):
        """Bytes of the contents in answers to requests whose path matches."""
        return sum(r.sent for r in self.requests if r.status < 300 and re.search(pattern, r.path))

    def asked(self, pattern, method=""):
        return [r for r in self.requests if re.search(pattern, r.path) and (not method or r.method == method)]

    def pushed(self, name):
        """The files of a repository that was pushed to, as bytes."""
        files = self.repos[name].pushed
        return {path: self.stored[data] if isinstance(data, str) else data for path, data in files.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it costs 40 ms a request
    server_hub: LocalHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        hub, url = self.server_hub, urlsplit(self.path)
        self.where, self.query = unquote(url.path), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length) if length else b""
        kind = "range" if "Range" in self.headers else "whole"
        self.trouble = hub.take_fault(f"{self.command} {self.where} {kind}")
        try:
            if self.trouble and self.trouble.kind == "status":
                self.reply(b"{}", self.trouble.status, self.trouble.headers)
                return
            for method, pattern, do in ROUTES:
                if method in (self.command, "*") and (found := re.fullmatch(pattern, self.where)):
                    do(self, *found.groups())
                    return
            self.reply(b"{}", 404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def note(self, status, sent):
        ranged = "Range" in self.headers
        self.server_hub.requests.append(Request(self.command, self.where, status, sent, ranged))

    def reply(self, body=b"", status=200, headers=None):
        sent = 0 if self.command == "HEAD" else len(body)
        self.note(status, sent)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if sent:
            self.wfile.write(body)

    def reply_json(self, document, status=200):
        self.reply(json.dumps(document).encode(), status, {"Content-Type": "application/json"})

    def validate(self):
        """What the Hub says of a card's metadata: that it is a block of YAML at the top."""
        content = json.loads(self.content)["content"]
        good = re.match(r"---\n(?:.+\n)+---\n", content) is not None
        self.reply_json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def refused(self, code):
        self.reply(b'{"error": "no"}', 404 if code != "Unauthorized" else 401, {"X-Error-Code": code})

    def allowed(self):
        """Whether the request carries the token; the answer is sent where it does not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.reply(b'{"error": "Invalid credentials"}', 401, {"X-Error-Message": "Invalid credentials"})
        return False

    # Reading

    def repo(self, name, revision="main"):
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refused("RepoNotFound")
            return None
        if revision not in ("main", "v1", repo.sha):
            self.refused("RevisionNotFound")
            return None
        return repo

    def info(self, name, revision="main"):
        if (repo := self.repo(name, revision)) is None:
            return
        blobs = "blobs" in self.query
        siblings = []
        for path, file in repo.files().items():
            entry = {"rfilename": path}
            if blobs:
                size, digest = self._stored(repo, file)
                size = repo.claimed.get(path, size)
                entry |= {"size": size, "blobId": git_id(path.encode())}
                if is_large(path):
                    entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        self.reply_json({"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def _stored(self, repo, file):
        """(size, SHA-256) of a file of a directory, or of one that was pushed."""
        if isinstance(file, Path):
            return file.stat().st_size, repo.digest(file)
        data = file if isinstance(file, bytes) else self.server_hub.stored[file]
        return len(data), hashlib.sha256(data).hexdigest()

    def tree(self, name, revision):
        if (repo := self.repo(name, revision)) is None:
            return
        entries = []
        for path, file in repo.files().items():
            size = file.stat().st_size
            entry = {"type": "file", "path": path, "size": size, "oid": git_id(path.encode())}
            if is_large(path):
                entry["lfs"] = {"oid": repo.digest(file), "size": size, "pointerSize": 134}
            entries.append(entry)
        self.reply_json(entries)

    def resolve(self, name, revision, path):
        if (repo := self.repo(name, revision)) is None:
            return
        file = repo.files().get(path)
        if file is None:
            self.refused("EntryNotFound")
            return
        headers = {"X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        if is_large(path):
            target = f"http://localhost:{self.server_hub.port}/storage/{name}/{path}"
            headers |= {"X-Linked-Etag": f'"{repo.digest(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            self.reply(b"", 302, headers | {"Location": target, "ETag": f'"{repo.digest(file)}"'})
            return
        self.serve(file, headers | {"ETag": f'"{git_id(path.encode())}"'})

    def storage(self, name, path):
        if "Authorization" in self.headers:
            self.server_hub.leaks.append(self.where)
        self.serve(self.server_hub.repos[name].files()[path], {"ETag": '"of the storage"'})

    def serve(self, file, headers):
        """A file, or the range of it that is asked for; here faults of bodies happen."""
        data = file.read_bytes()
        if self.trouble and self.trouble.kind == "swap":
            data = self.trouble.data
        first, last = 0, len(data) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not (self.trouble and self.trouble.kind == "ignore range"):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        body = data[first : last + 1]
        cut = len(body) // 2 if self.trouble and self.trouble.kind == "cut" else len(body)
        sent = 0 if self.command == "HEAD" else cut
        self.note(206 if "Content-Range" in headers else 200, sent)
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if sent:
            half, whole = sent // 2, is_large(file.name) and "Range" not in self.headers
            for part in (body[:half], body[half:sent]):
                time.sleep(self.server_hub.slow if whole else 0)
                self.wfile.write(part)
        self.close_connection = cut < len(body)

    # Writing

    def whoami(self):
        if self.allowed():
            self.reply_json({"name": "someone", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        if not self.allowed():
            return
        wish = json.loads(self.content)
        name = f"{wish.get('organization') or 'someone'}/{wish['name']}"
        there = name in self.server_hub.repos
        if not there:
            private = wish.get("private", False) or wish.get("visibility") == "private"
            self.server_hub.repos[name] = Repo(private=private)
        document = {"url": f"{self.server_hub.url}/{name}", "name": name}
        self.reply_json(document, 409 if there else 200)

    def preupload(self, name, _):
        if not self.allowed():
            return
        repo = self.server_hub.repos[name]
        self.reply_json({"files": [self._mode(repo, file["path"]) for file in json.loads(self.content)["files"]]})

    def _mode(self, repo, path):
        mode = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
        data = repo.pushed.get(path)
        if isinstance(data, bytes):
            mode["oid"] = git_id(b"blob %d\0" % len(data) + data)
        elif data is not None:
            mode["oid"] = data
        return mode

    def batch(self, _):
        if not self.allowed():
            return
        objects = []
        for each in json.loads(self.content)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server_hub.stored:
                entry["actions"] = {"upload": {"href": f"{self.server_hub.url}/upload/{each['oid']}", "header": {}}}
            objects.append(entry)
        self.reply_json({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            self.reply(b"", 400)
            return
        self.server_hub.stored[oid] = self.content
        self.reply()

    def commit(self, name, _):
        if not self.allowed():
            return
        repo = self.server_hub.repos[name]
        for line in self.content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repo.pushed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                repo.pushed[entry["value"]["path"]] = entry["value"]["oid"]
        repo.commits.append(git_id(self.content))
        self.reply_json({"commitUrl": f"{self.server_hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    ("*", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/storage/{_NAME}/(.+)", _Handler.storage),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/(\w+)", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
)
