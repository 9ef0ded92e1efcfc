"""A stand-in for the Hugging Face Hub on a free local port: enough of its HTTP interface to push and to load.

    with HubStandIn() as hub:
        run(..., env={**os.environ, **hub.environment})
        hub.repositories["someone/model"]["config.json"]

A repository has one branch, whatever revision is asked for. Weights are large files: they are sent before the commit
that names them by their hash, as on the Hub without Xet; all other files travel with the commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class HubStandIn:
    """The server while the `with` block runs. `repositories` maps a repository's name to its files.

    Attributes:
        private: names of the repositories that are.
        commits: repository -> the paths of its commits, in their order.
        objects: large files by their hash, also those that no commit names yet.
        arrived: the hashes of large files that were sent, in their order.
        requests: "POST /api/repos/create" and so on, in their order.
        refusals: what is answered to some requests; see `refuse`.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: dict[str, list[list[str]]] = {}
        self.objects: dict[str, bytes] = {}
        self.arrived: list[str] = []
        self.requests: list[str] = []
        self.refusals: list[tuple[str, int, bool]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process that is to use this Hub has in its environment; read when huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def refuse(self, request: str, status: int, after: int = 0, once: bool = False) -> None:
        """Answer requests like the pattern `request` ("PUT /objects/.+") with a status, but for the first `after`."""
        self.refusals = [(request, 0, True)] * after + [(request, status, once)]

    def answer_instead(self, request: str) -> int:
        """The status to refuse a request with; 0 is none."""
        for number, (pattern, status, once) in enumerate(self.refusals):
            if re.fullmatch(pattern, request):
                if once:
                    del self.refusals[number]
                return status
        return 0

    def use_here(self, monkeypatch) -> None:
        """Let this very process use it until the end of the test."""
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # What huggingface_hub has read from the environment when it was imported.
        constants = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    def __enter__(self) -> "HubStandIn":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def revision(self, name: str) -> str:
        """The commit hash of what the repository holds now."""
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(self.repositories[name].items()):
            digest.update(f"{path} {blob_hash(content)}\n".encode())
        return digest.hexdigest()

    def commit(self, name: str, lines: bytes) -> None:
        """Apply a commit's lines of JSON, one operation each."""
        files, paths = self.repositories[name], []
        for operation in map(json.loads, lines.splitlines()):
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                    del files[path]
            elif kind != "header":
                raise ValueError(f"the stand-in does not know the commit operation {kind!r}")
            if kind != "header":
                paths.append(value["path"])
        self.commits.setdefault(name, []).append(paths)


def is_large(path: str) -> bool:
    """Whether a file is sent before its commit."""
    return path.endswith(".safetensors")


def etag(path: str, content: bytes) -> str:
    """By which the Hub names a file's content."""
    return hashlib.sha256(content).hexdigest() if is_large(path) else blob_hash(content)


def lfs(path: str, content: bytes) -> dict:
    """What the Hub's list of files says of a large one beside that."""
    large = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
    return {"lfs": large} if is_large(path) else {}


def blob_hash(content: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    # (method, path) -> the method below that answers; the groups of the path are its arguments.
    routes = (
        ("GET", r"/api/whoami-v2", "who"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/.+", "before_upload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/.+", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "where_to_send"),
        ("POST", r"/([^/]+/[^/]+)/verify", "verify"),
        ("PUT", r"/objects/([0-9a-f]{64})", "receive"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", "info"),
        ("GET", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", "file"),
    )

    def respond(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if status := self.hub.answer_instead(self.hub.requests[-1]):
            return self.refuse("", "the stand-in was told to refuse this", status)
        method = "GET" if self.command == "HEAD" else self.command
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if (method == "POST" or path == "/api/whoami-v2") and not is_known:
            return self.refuse("", "Invalid username or password.", 401)
        for route_method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if method == route_method and match:
                if match.groups() and "/" in match[1]:
                    is_visible = is_known or match[1] not in self.hub.private
                    if match[1] not in self.hub.repositories or not is_visible:
                        return self.refuse("RepoNotFound", f"no repository {match[1]}")
                return getattr(self, name)(*match.groups())
        self.refuse("EntryNotFound", f"the stand-in has no {method} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def who(self) -> None:
        self.answer({"type": "user", "name": "someone"})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        exists = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {})
        if wanted.get("visibility") == "private" and not exists:
            self.hub.private.add(name)
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def validate_card(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def before_upload(self, name: str) -> None:
        files = self.hub.repositories[name]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = etag(path, files[path])  # lets the client leave out what has not changed
            answers.append(answer)
        self.answer({"files": answers})

    def where_to_send(self, name: str) -> None:
        answers = json.loads(self.body)["objects"]
        for answer in answers:
            if answer["oid"] not in self.hub.objects:  # without actions there is nothing to send
                upload = {"href": f"{self.hub.url}/objects/{answer['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{name}/verify"}}
        self.answer({"transfer": "basic", "objects": answers})

    def receive(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse("", "this is not what the hash says", 400)
        self.hub.objects[oid] = self.body
        self.hub.arrived.append(oid)
        self.answer({})

    def verify(self, name: str) -> None:
        wanted = json.loads(self.body)
        is_there = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self.answer({}) if is_there else self.refuse("", f"it has not arrived for {name}")

    def commit(self, name: str) -> None:
        self.hub.commit(name, self.body)
        revision = self.hub.revision(name)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{revision}", "commitOid": revision})

    def info(self, name: str) -> None:
        files = [{"rfilename": path} for path in self.hub.repositories[name]]
        about = {"sha": self.hub.revision(name), "private": name in self.hub.private}
        self.answer({"id": name, "modelId": name, **about, "siblings": files, "tags": []})

    def tree(self, name: str, folder: str | None) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": blob_hash(content), **lfs(path, content)}
            for path, content in self.hub.repositories[name].items()
            if folder is None or path.startswith(f"{folder}/")
        ]
        if folder and not entries:
            return self.refuse("EntryNotFound", f"no folder {folder} in {name}")
        self.answer(entries)

    def file(self, name: str, path: str) -> None:
        content = self.hub.repositories[name].get(path)
        if content is None:
            return self.refuse("EntryNotFound", f"no file {path} in {name}")
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": self.hub.revision(name)}
        self.send(200, content, {"Content-Type": "application/octet-stream", **headers})

    def answer(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str, message: str, status: int = 404) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": message}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        """Say nothing; a failing client prints what it was answered."""
