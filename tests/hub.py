"""A small Hugging Face hub on 127.0.0.1: what `huggingface_hub` asks of the real one, with faults to order.

It speaks the hub's API over HTTP: metadata, files (large ones behind a redirect to another host, as on the real hub),
tokens, gates, and what an upload needs. What a client asked for is in `Hub.requests`.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import pytest

Content = bytes | memoryview
"""Of a file: a view of a mapped one is never held in memory whole."""
LARGE = (".safetensors", ".mlirb", ".bin", "tokenizer.json")
"""Ends of the names of files that are kept as LFS objects."""
_BLOCK = 64 * 1024


@attrs.define
class Fault:
    """What goes wrong with the answers about one file or path.

    Attributes:
        path: the fault strikes requests whose path ends with this...
        times: ...so many times; -1 for ever.
        methods: ...by one of these methods.
        parts: also those that ask for the beginning of a file alone.
        status: answer with this status, and the headers and the body below.
        headers: added to the answer.
        page: answer 200 with this as an HTML page.
        flip: so many bits of the content are flipped, from its middle on.
        drop: reset the connection after so many bytes of the content.
        stall: send nothing after so many bytes of the content, and keep the connection.
        truncate: the content ends after so many bytes, and the headers say so.
        end: the content ends after so many bytes, and the headers say no length.
        content: is sent in the place of the file's.
        close: no answer: the connection is closed.
    """

    path: str
    times: int = 1
    methods: tuple[str, ...] = ("GET",)
    parts: bool = True
    status: int | None = None
    headers: Mapping[str, str] = {}
    page: str | None = None
    flip: int = 0
    drop: int | None = None
    stall: int | None = None
    truncate: int | None = None
    end: int | None = None
    content: bytes | None = None
    close: bool = False

    @property
    def concerns_content(self) -> bool:
        """Whether it strikes where the bytes are, behind the redirect."""
        return bool(self.flip) or any(
            value is not None for value in (self.drop, self.stall, self.truncate, self.end, self.content, self.page)
        )


@attrs.frozen
class Request:
    """One request that came in: its method, path with query, `Range`, token, and the status of the answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int


@attrs.define
class Stored:
    """A repository.

    Attributes:
        commits: the files of each commit, by name.
        revisions: the commit of each branch and tag.
        gated: reading files needs a token in `Hub.granted`.
        private: only a known token sees it.
        card: front matter, as the hub parsed it.
        messages: of the commits that arrived.
    """

    commits: dict[str, dict[str, Content]] = attrs.Factory(dict)
    revisions: dict[str, str] = attrs.Factory(dict)
    gated: bool = False
    private: bool = False
    card: dict[str, Any] = attrs.Factory(dict)
    messages: list[str] = attrs.Factory(list)

    @property
    def files(self) -> dict[str, Content]:
        """Those of branch main."""
        return self.commits[self.revisions["main"]]

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or (the beginning of) a commit means; None if there is none."""
        if revision in self.revisions:
            return self.revisions[revision]
        found = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        return found[0] if len(found) == 1 else None


class Hub:
    """The server; a context manager that starts and stops it.

    Args:
        home: what `environment` names as HF_HOME.

    Attributes:
        repositories: by id.
        tokens: those that it knows; with any other, a request is refused.
        granted: those of them that may read gated repositories.
        blind: those of them that see no private repository.
        requests: what was asked, in order.
        metadata: whether the metadata of a repository has sizes and hashes, as the real hub's has.
        etags: whether the ETag of a file is its hash.
        ranges: whether a part of a file can be asked for.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repositories: dict[str, Stored] = {}
        self.tokens: set[str] = set()
        self.granted: set[str] = set()
        self.blind: set[str] = set()
        self.requests: list[Request] = []
        self.metadata = True
        self.etags = True
        self.ranges = True
        self.objects: dict[str, Content] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the server down: from now on the connection is refused."""
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a client in another process."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def cache(self) -> Path:
        """Where a client keeps what it fetched."""
        return self.home / "hub"

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, Content],
        *,
        commit: str | None = None,
        revisions: Iterable[str] = ("main",),
        gated: bool = False,
        private: bool = False,
        licence: str | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> str:
        """Put files into a repository, as one commit that these branches point at; the commit.

        Args:
            repo_id: `owner/name`; made if it is not there.
            files: all files, by name; or a folder of them.
            commit: 40 hexadecimal digits; else they follow from the files.
            revisions: branches or tags.
            gated: see `Stored`.
            private: see `Stored`.
            licence: of the card.
            card: more of the front matter.
        """
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()
            }
        stored = self.repositories.setdefault(repo_id, Stored())
        stored.gated, stored.private = gated, private
        stored.card = {**({"license": licence} if licence else {}), **(card or {})}
        return self.record(stored, dict(files), commit=commit, revisions=revisions)

    def record(
        self,
        stored: Stored,
        files: dict[str, Content],
        *,
        commit: str | None = None,
        revisions: Iterable[str] = ("main",),
    ) -> str:
        """One more commit."""
        if commit is None:
            text = repr([(name, git_sha1(files[name])) for name in sorted(files)]) + str(len(stored.commits))
            commit = hashlib.sha1(text.encode()).hexdigest()
        stored.commits[commit] = files
        for revision in revisions:
            stored.revisions[revision] = commit
        for name, content in files.items():
            if is_large(name):
                self.objects[sha256(content)] = content
        return commit

    def inject(self, path: str, **fault: Any) -> Fault:
        """Let a fault strike requests whose path ends with `path`; see `Fault`."""
        made = Fault(path, **fault)
        self._faults.append(made)
        return made

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    def fault(self, method: str, path: str, ranged: str | None, *, content: bool) -> Fault | None:
        """The first fault that strikes this request, and that is one of the content or not; it counts as used."""
        part = ranged is not None and not ranged.endswith("-")
        with self._lock:
            for fault in self._faults:
                strikes = path.endswith(fault.path) and method in fault.methods and fault.times
                if strikes and fault.concerns_content == content and (fault.parts or not part):
                    fault.times -= 1
                    return fault
        return None

    def log(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def asked(self, name: str) -> list[str | None]:
        """The `Range` of each request for the bytes of a file, in order, where there were bytes to be had."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET"
            and request.path.endswith("/" + name)
            and (request.path.startswith("/cdn/") or not is_large(name))
        ]

    def configure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have `huggingface_hub` in this process use this hub: what it reads of the environment when it is imported."""
        import huggingface_hub
        from huggingface_hub import constants

        for name, value in {**self.environment, "HF_TOKEN": ""}.items():
            monkeypatch.setenv(name, value)
        for name, setting in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.cache),
            "HF_ASSETS_CACHE": str(self.home / "assets"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_STORED_TOKENS_PATH": str(self.home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(self.home / ".agent_harnesses.json"),
            "HF_HUB_DOWNLOAD_TIMEOUT": 1,
            "HF_HUB_ETAG_TIMEOUT": 1,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, setting)
        huggingface_hub.close_session()  # a connection of a hub that is gone


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


_known: dict[int, tuple[memoryview, str]] = {}


def sha256(content: Content) -> str:
    """The SHA-256 of a content, in hexadecimal; of a view it is computed once, for it may be of gigabytes."""
    if not isinstance(content, memoryview):
        return hashlib.sha256(content).hexdigest()
    if id(content) not in _known:
        _known[id(content)] = content, hashlib.sha256(content).hexdigest()
    return _known[id(content)][1]


def git_sha1(content: Content) -> str:
    """The id that git gives a file with this content."""
    digest = hashlib.sha1(b"blob %d\0" % len(content))
    digest.update(content)
    return digest.hexdigest()


def pointer(content: Content) -> bytes:
    """What git has of a file that is kept as an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that a client keeps for its next request."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what is tested."""


class _Refused(Exception):
    """An answer that is an error: status, code and message as the real hub gives them."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body does not wait until the headers are acknowledged

    # -----------------------------------------------------------------------------------------------------------------
    # From a request to its answer
    # -----------------------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """`Hub.requests` is the log."""

    def _serve(self) -> None:
        self.hub = self.server.hub
        split = urllib.parse.urlsplit(self.path)
        self.route = urllib.parse.unquote(split.path)
        self.query = urllib.parse.parse_qs(split.query)
        self.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self._strike():
            return
        try:
            if self.token and self.token not in self.hub.tokens and not self.route.startswith("/cdn/"):
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            self._dispatch(split.path)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._answer_json({"error": refused.message}, refused.status, headers)

    def _dispatch(self, raw: str) -> None:
        """Call what serves the path. Ids and names are parted before they are unquoted: revisions have slashes."""
        parts = [urllib.parse.unquote(part) for part in raw.strip("/").split("/")]
        match parts:
            case ["api", "whoami-v2"]:
                self._whoami()
            case ["api", "validate-yaml"]:
                self._answer_json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case ["cdn", _owner, _name, digest, *_path]:
                self._answer_content(self.hub.objects[digest], {"ETag": f'"{digest[:32]}"'})
            case [owner, git, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"{owner}/{git.removesuffix('.git')}")
            case ["lfs", digest]:
                self._lfs_put(digest)
            case ["lfs", digest, "verify"]:
                self._answer_json({}, 200 if digest in self.hub.objects else 404)
            case _:
                raise _Refused(404, "", "Sorry, we can't find the page you are looking for.")

    def _api(self, repo_id: str, rest: list[str]) -> None:
        match rest:
            case [] | ["revision", _]:
                self._info(repo_id, rest[1] if rest else "main")
            case ["tree", revision, *_folder]:
                self._tree(repo_id, revision)
            case ["preupload", revision]:
                self._preupload(repo_id, revision)
            case ["commit", revision]:
                self._commit(repo_id, revision)
            case ["branch", branch]:
                self._branch(repo_id, branch)
            case _:
                raise _Refused(404, "", "Not Found")

    # -----------------------------------------------------------------------------------------------------------------
    # Reading
    # -----------------------------------------------------------------------------------------------------------------

    def _stored(self, repo_id: str) -> Stored:
        stored = self.hub.repositories.get(repo_id)
        if stored is None or (stored.private and self.token in {None, *self.hub.blind}):
            # To those that it does not know the real hub does not say which of the two it is.
            if self.token is None:
                raise _Refused(401, "RepoNotFound", "Invalid username or password.")
            raise _Refused(404, "RepoNotFound", "Repository not found")
        return stored

    def _snapshot(self, repo_id: str, revision: str) -> tuple[Stored, str, dict[str, Content]]:
        stored = self._stored(repo_id)
        commit = stored.commit(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return stored, commit, stored.commits[commit]

    def _info(self, repo_id: str, revision: str) -> None:
        stored, commit, files = self._snapshot(repo_id, revision)
        siblings: list[dict[str, Any]] = []
        for name, content in sorted(files.items()):
            sibling: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query and self.hub.metadata:
                sibling |= _described(name, content)
            siblings.append(sibling)
        self._answer_json(
            {
                "_id": commit[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.partition("/")[0],
                "sha": commit,
                "lastModified": "2026-01-02T03:04:05.000Z",
                "createdAt": "2026-01-02T03:04:05.000Z",
                "private": stored.private,
                "gated": "manual" if stored.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "cardData": stored.card,
                "siblings": siblings,
                "spaces": [],
            }
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        _, _, files = self._snapshot(repo_id, revision)
        entries = []
        for name, content in sorted(files.items()):
            described = _described(name, content)
            entry = {"type": "file", "path": name, "size": len(content), "oid": described["blobId"]}
            if "lfs" in described:
                lfs = described["lfs"]
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            entries.append(entry)
        self._answer_json(entries)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        stored, commit, files = self._snapshot(repo_id, revision)
        if stored.gated and self.token not in self.hub.granted:
            message = f"Access to model {repo_id} is restricted."
            raise _Refused(401 if self.token is None else 403, "GatedRepo", message)
        if name not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not is_large(name):
            etag = git_sha1(content) if self.hub.etags else f"{name}-1"
            self._answer_content(content, {**headers, "ETag": f'"{etag}"'})
            return
        digest = sha256(content)
        headers |= {
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest if self.hub.etags else digest[:32]}"',
            "ETag": f'"{git_sha1(pointer(content))}"',
            # Another host than 127.0.0.1 to a client, which must not send its token there.
            "Location": f"http://localhost:{self.hub.port}/cdn/{repo_id}/{digest}/{urllib.parse.quote(name)}",
        }
        self._answer(302, b"", headers)

    def _whoami(self) -> None:
        if self.token is None:
            raise _Refused(401, "", "Invalid username or password.")
        self._answer_json({"type": "user", "name": "somebody", "auth": {"accessToken": {"role": "write"}}})

    # -----------------------------------------------------------------------------------------------------------------
    # Writing
    # -----------------------------------------------------------------------------------------------------------------

    def _writable(self, repo_id: str) -> Stored:
        if self.token is None:
            raise _Refused(401, "", "Invalid username or password.")
        return self._stored(repo_id)

    def _create(self) -> None:
        if self.token is None:
            raise _Refused(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": "0" * 24}
        if repo_id in self.hub.repositories:
            message = "You already created this model repo"
            self._answer_json({**answer, "error": message}, 409, {"X-Error-Message": message})
            return
        stored = self.hub.repositories[repo_id] = Stored(private=wanted.get("visibility") == "private")
        self.hub.record(stored, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._answer_json(answer)

    def _branch(self, repo_id: str, branch: str) -> None:
        stored = self._writable(repo_id)
        if branch in stored.revisions:
            raise _Refused(409, "", f"Reference {branch} already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        stored.revisions[branch] = stored.commit(start) or stored.revisions["main"]
        self._answer_json({})

    def _preupload(self, repo_id: str, revision: str) -> None:
        stored = self._writable(repo_id)
        commit = stored.commit(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answers = []
        for file in json.loads(self.body)["files"]:
            answer = {"path": file["path"], "shouldIgnore": False, "uploadMode": "regular"}
            if is_large(file["path"]) or file["size"] > 10_000_000:
                answer["uploadMode"] = "lfs"
            present = stored.commits[commit].get(file["path"])
            if present is not None:
                large = answer["uploadMode"] == "lfs"
                answer["oid"] = sha256(present) if large else git_sha1(present)
            answers.append(answer)
        self._answer_json({"files": answers})

    def _lfs_batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            digest = wanted["oid"]
            answer: dict[str, Any] = {"oid": digest, "size": wanted["size"]}
            if digest not in self.hub.objects:
                base = f"{self.hub.endpoint}/lfs/{digest}"
                answer["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        self._answer_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise _Refused(400, "", "The content has another SHA-256")
        self.hub.objects[digest] = self.body
        self._answer_json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        stored = self._writable(repo_id)
        parent = stored.commit(revision)
        if parent is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(stored.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                stored.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, "", f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.hub.record(stored, files, revisions=[revision])
        self._answer_json(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}",
                "hookOutput": "",
            }
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Answers, and what goes wrong with them
    # -----------------------------------------------------------------------------------------------------------------

    def _fault(self, *, content: bool) -> Fault | None:
        return self.hub.fault(self.command, self.route, self.headers.get("range"), content=content)

    def _strike(self) -> bool:
        """Let a fault that is none of the content take the place of the answer."""
        fault = self._fault(content=False)
        if fault is None:
            if not (self.route.startswith("/api/") or "/info/lfs/" in self.route):
                return False
            fault = self._fault(content=True)
            if fault is None:
                return False
        if fault.close:
            self._log(0)
            self._reset()
        elif fault.page is not None:
            self._answer(200, fault.page.encode(), {"Content-Type": "text/html; charset=utf-8"})
        elif fault.stall is not None:
            self._log(0)
            self.hub.closing.wait(30)
            self.close_connection = True
        else:
            assert fault.status is not None, f"{fault} cannot strike {self.route}"
            self._answer_json({"error": "a fault"}, fault.status, dict(fault.headers))
        return True

    def _answer_content(self, content: Content, headers: dict[str, str]) -> None:
        """A file or the range of it that is asked for, or what a fault makes of it."""
        fault = self._fault(content=True) if self.command == "GET" else None
        if fault is not None and fault.page is not None:
            self._answer(200, fault.page.encode(), {"Content-Type": "text/html; charset=utf-8"})
            return
        if fault is not None:
            content = _changed(content, fault)
        if not is_large(self.route) and "gzip" in self.headers.get("accept-encoding", ""):
            packed = gzip.compress(content)
            self._answer(200, packed, {**headers, "Content-Encoding": "gzip"}, fault)
            return
        ranged = self.headers.get("range") if self.hub.ranges else None
        first, _, last = (ranged or "").removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), min(int(last) + 1, len(content)) if last else len(content)
        headers = {"Content-Type": "application/octet-stream", **headers}
        if start > 0 and start >= len(content):
            self._answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206 if ranged else 200, content[start:stop], headers, fault)

    def _answer_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: Content, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        self._log(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault is not None and fault.end is not None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body)
        if fault is not None:
            end = next((stop for stop in (fault.drop, fault.stall, fault.end) if stop is not None), end)
        for start in range(0, min(end, len(body)), _BLOCK):
            self.wfile.write(body[start : min(start + _BLOCK, end)])
        if fault is not None and fault.stall is not None:
            self.hub.closing.wait(30)
            self.close_connection = True
        if fault is not None and fault.drop is not None:
            self._reset()

    def _reset(self) -> None:
        """End the connection as a machine does that lost it, but not before what was sent has arrived."""
        self.wfile.flush()
        self.hub.closing.wait(0.1)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _log(self, status: int) -> None:
        self.hub.log(Request(self.command, self.path, self.headers.get("range"), self.token, status))


def _described(name: str, content: Content) -> dict[str, Any]:
    """A file in a repository's metadata."""
    if not is_large(name):
        return {"size": len(content), "blobId": git_sha1(content)}
    text = pointer(content)
    lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": len(text)}
    return {"size": len(content), "blobId": git_sha1(text), "lfs": lfs}


def _changed(content: Content, fault: Fault) -> Content:
    if fault.content is not None:
        return fault.content
    if fault.truncate is not None:
        return content[: fault.truncate]
    if fault.flip:
        changed = bytearray(content)
        middle = len(changed) // 2
        for bit in range(fault.flip):
            changed[middle + bit // 8] ^= 1 << (bit % 8)
        return bytes(changed)
    return content
