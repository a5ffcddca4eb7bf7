"""A Hub on loopback, in a process of its own: what huggingface_hub asks of the real one, and a few accidents.

`python tests/hub/loopback.py` prints its port, and serves until it is killed. It forgets all. Paths below `/test/` are
for the tests: `GET /test/requests` tells what was asked, `POST /test/accident` what shall go wrong.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".faiss", ".parquet", ".png")
REPO = r"(?P<repo>(?:datasets/|spaces/)?[\w.-]+/[\w.-]+)"
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[\w.-]+/[\w.-]+)"


class Refused(Exception):
    """An answer that is an error: status, and the code by which huggingface_hub knows its kind."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


@dataclass
class Repo:
    """Commits, each a whole tree of path -> object id (sha256), and the branches and tags that name them."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, str], message: str) -> str:
        parent = self.refs.get(branch, "")
        sha = hashlib.sha1(json.dumps([parent, tree, message, time.time_ns()]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub:
    """The state of the Hub. Accidents: `refuse` has sizes of objects whose upload is refused, `cut` the paths whose
    next download breaks off half-way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.lfs: set[str] = set()
        self.requests: list[str] = []
        self.refuse: set[int] = set()
        self.cut: set[str] = set()

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refused(404, "RepoNotFound", f"Repository not found: {name}")
        return self.repos[name]


HUB = Hub()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        with HUB.lock:
            if not path.startswith("/test/"):
                HUB.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            try:
                for method, pattern, answer in ROUTES:
                    if self.command in method and (match := re.fullmatch(pattern, path)):
                        if method == ("POST",) and not path.startswith("/test/") and "lfs/verify" not in path:
                            self.check_token()
                        return answer(self, **match.groupdict())
                raise Refused(404, "EntryNotFound", f"no such route: {self.command} {path}")
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
                self.send_json({"error": str(refused)}, status=refused.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def check_token(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_loopback":
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def send_json(self, value, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- writing -------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.send_json({"type": "user", "name": "somebody", "orgs": []})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if asked.get("type") == "space" and asked.get("sdk") != "gradio":
            raise Refused(400, "BadRequest", "a Space needs an sdk")
        full = full_name(f"{asked.get('type') or 'model'}s", name)
        url = {"url": f"http://{self.headers['Host']}/{full}"}
        if full in HUB.repos:
            return self.send_json({"error": "You already created this repo", **url}, status=HTTPStatus.CONFLICT)
        HUB.repos[full] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        HUB.repos[full].commit("main", {".gitattributes": store(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.send_json(url)

    def create_branch(self, kind: str, name: str, revision: str) -> None:
        repo = HUB.repo(full_name(kind, name))
        if revision in repo.refs:
            return self.send_json({"error": "Reference already exists"}, status=HTTPStatus.CONFLICT)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.refs[revision] = repo.resolve(start)
        self.send_json({})

    def create_tag(self, kind: str, name: str, revision: str) -> None:
        repo = HUB.repo(full_name(kind, name))
        repo.refs[json.loads(self.body)["tag"]] = repo.resolve(revision)
        self.send_json({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = HUB.repo(full_name(kind, name))
        tree = repo.commits[repo.resolve(revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], file["path"].endswith(LFS_SUFFIXES)
            oid = tree.get(path)
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid if lfs or oid is None else git_oid(oid),
                }
            )
        self.send_json({"files": files})

    def lfs_batch(self, repo: str) -> None:
        HUB.repo(repo)
        host, objects = f"http://{self.headers['Host']}", []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in HUB.objects:  # what is there already needs no upload
                upload, verify = {"href": f"{host}/lfs/{entry['oid']}"}, {"href": f"{host}/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if len(self.body) in HUB.refuse:
            raise Refused(403, "Forbidden", "storage quota exceeded")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "BadRequest", "content and oid differ")
        HUB.lfs.add(store(self.body))
        self.send_json({})

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        if len(HUB.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, "BadRequest", "size differs")
        self.send_json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        full = full_name(kind, name)
        repo = HUB.repo(full)
        tree = dict(repo.commits[repo.resolve(revision)])
        message = ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                tree[value["path"]] = store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in HUB.objects:
                    raise Refused(400, "BadRequest", f"LFS object of {value['path']} was never uploaded")
                tree[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del tree[value["path"]]
            else:
                raise Refused(400, "BadRequest", f"{key} is not implemented")
        sha = repo.commit(revision, tree, message)
        url = f"http://{self.headers['Host']}/{full}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # -- reading -------------------------------------------------------------------------------------------------------

    def repo_info(self, kind: str, name: str, revision: str | None = None) -> None:
        repo = HUB.repo(full_name(kind, name))
        sha = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.send_json({"_id": "1", "id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        repo = HUB.repo(full_name(kind, name))
        prefix = f"{folder}/" if folder else ""
        entries = [
            describe(path, oid)
            for path, oid in sorted(repo.commits[repo.resolve(revision)].items())
            if path.startswith(prefix)
        ]
        if folder and not entries:
            raise Refused(404, "EntryNotFound", f"no folder {folder}")
        self.send_json(entries)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = HUB.repo(full_name(kind, name))
        tree = repo.commits[repo.resolve(revision)]
        self.send_json([describe(path, tree[path]) for path in json.loads(self.body)["paths"] if path in tree])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """A file, or the part of it that `Range` asks for."""
        found = HUB.repo(repo)
        sha = found.resolve(revision)
        oid = found.commits[sha].get(path)
        if oid is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        content = HUB.objects[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or stop) + bool(asked[2]), len(content))
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{oid if oid in HUB.lfs else git_oid(oid)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in HUB.cut:
            HUB.cut.remove(path)
            self.wfile.write(content[start : (start + stop) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:stop])

    # -- for the tests -------------------------------------------------------------------------------------------------

    def test_requests(self) -> None:
        self.send_json(HUB.requests)

    def test_accident(self) -> None:
        accident = json.loads(self.body)
        HUB.refuse, HUB.cut = set(accident.get("refuse_uploads_of", ())), set(accident.get("cut_downloads_of", ()))
        HUB.requests.clear()
        self.send_json({})


def full_name(kind: str, name: str) -> str:
    return name if kind == "models" else f"{kind}/{name}"


def store(content: bytes) -> str:
    oid = hashlib.sha256(content).hexdigest()
    HUB.objects[oid] = content
    return oid


def git_oid(oid: str) -> str:
    content = HUB.objects[oid]
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(path: str, oid: str) -> dict[str, object]:
    entry = {"type": "file", "oid": git_oid(oid), "size": len(HUB.objects[oid]), "path": path}
    if oid in HUB.lfs:
        entry["lfs"] = {"oid": oid, "size": entry["size"], "pointerSize": 130}
    return entry


ROUTES = [
    (("GET",), r"/test/requests", Handler.test_requests),
    (("POST",), r"/test/accident", Handler.test_accident),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create_repo),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"{API}/branch/(?P<revision>.+)", Handler.create_branch),
    (("POST",), rf"{API}/tag/(?P<revision>.+)", Handler.create_tag),
    (("POST",), rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    (("POST",), rf"{API}/paths-info/(?P<revision>.+)", Handler.paths_info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("POST",), r"/lfs/verify", Handler.lfs_verify),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("GET",), rf"{API}", Handler.repo_info),
    (("GET",), rf"{API}/revision/(?P<revision>.+)", Handler.repo_info),
    (("GET",), rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
