"""JSON API of the Hub: contents of a repository, its refs, and commits."""

from __future__ import annotations

import base64
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from tests.hub_server.access import identify, readable, writable
from tests.hub_server.messages import Response
from tests.hub_server.store import Commit, Entry, HubStateError, Repo, git_blob_id, is_lfs, lfs_pointer

if TYPE_CHECKING:
    from tests.hub_server.access import Caller
    from tests.hub_server.hub import Hub
    from tests.hub_server.messages import Call


def pointer_size(entry: Entry) -> int:
    return len(lfs_pointer(entry.sha256 or "", entry.size))


def file_item(hub: Hub, path: str, entry: Entry) -> dict[str, Any]:
    """Return a file in the form of tree and paths-info."""
    item: dict[str, Any] = {"type": "file", "path": path, "oid": entry.blob, "size": entry.size}
    if entry.sha256:
        item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
        if hub.xet_enabled and (stored := hub.xet.find(entry.sha256)) is not None:
            item["xetHash"] = stored.hash
    return item


def folder_item(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": git_blob_id(path.encode()), "size": 0}


def create_repo(hub: Hub, call: Call) -> Response:
    caller = identify(hub.store, call.token)
    body = call.json()
    name = f"{body.get('organization') or caller.user}/{body['name']}"
    if caller.user is None:
        raise HubStateError(401, None, "Invalid username or password.")
    if not caller.write or not caller.owns(name):
        raise HubStateError(403, None, f"You don't have the rights to create a model under {name.partition('/')[0]}")
    url = {"url": f"{hub.endpoint}/{name}", "name": name}
    with hub.store.lock:
        if hub.store.find(name) is not None:
            return Response.of_json({**url, "error": "You already created this model repo"}, 409)
        private = bool(body.get("private")) or body.get("visibility") == "private"
        hub.store.create(name, private=private)
    return Response.of_json(url)


def validate_yaml(hub: Hub, call: Call) -> Response:
    """Reject ``license: nonsense``, and every card while ``cards_refused`` is set."""
    hub.cards.append(call.json()["content"])
    bad = hub.cards_refused or "\nlicense: nonsense\n" in hub.cards[-1]
    errors = [{"message": '"license" must be one of [apache-2.0, mit]'}] if bad else []
    return Response.of_json({"errors": errors, "warnings": []}, 400 if bad else 200)


def whoami(hub: Hub, call: Call) -> Response:
    caller = identify(hub.store, call.token)
    if caller.user is None:
        raise HubStateError(401, None, "Invalid username or password.")
    return Response.of_json({"type": "user", "name": caller.user, "orgs": [], "auth": {}})


def model(hub: Hub, call: Call, name: str, rest: str) -> Response:
    """Handle requests below ``/api/models/{name}``; ``rest`` is the quoted remainder of the path."""
    caller = identify(hub.store, call.token)
    verb, _, tail = rest.partition("/")
    routes = {
        ("GET", ""): info,
        ("GET", "revision"): info,
        ("GET", "tree"): tree,
        ("POST", "paths-info"): paths_info,
        ("GET", "refs"): refs,
        ("GET", "commits"): commits,
        ("POST", "branch"): create_branch,
        ("DELETE", "branch"): delete_branch,
        ("POST", "preupload"): preupload,
        ("POST", "commit"): commit,
        ("GET", "xet-read-token"): xet_token,
        ("GET", "xet-write-token"): xet_token,
    }
    handler = routes.get((call.method, verb))
    if handler is None:
        raise HubStateError(404, None, f"no route for {call.method} {call.path}")
    return handler(hub, call, caller, name, tail)


def info(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    repo = readable(hub.store, name, caller)
    head = repo.resolve(unquote(tail) or "main")
    siblings = []
    for path, entry in sorted(head.tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if call.flag("blobs"):
            sibling |= {"size": entry.size, "blobId": entry.blob}
            if entry.sha256:
                size = pointer_size(entry)
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": size}
        siblings.append(sibling)
    meta = repo.meta
    flags = {key: meta[key] for key in ("private", "gated", "disabled")}
    return Response.of_json({"_id": name, "id": name, "modelId": name, "sha": head.id, **flags, "siblings": siblings})


def tree(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    revision, _, folder = (unquote(part) for part in tail.partition("/"))
    head = readable(hub.store, name, caller).resolve(revision)
    prefix = f"{folder}/" if folder else ""
    items: dict[str, dict[str, Any]] = {}
    for path, entry in sorted(head.tree.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        deepest = len(parts) - 1 if call.flag("recursive") else min(1, len(parts) - 1)
        for depth in range(1, deepest + 1):
            parent = prefix + "/".join(parts[:depth])
            items.setdefault(parent, folder_item(parent))
        if call.flag("recursive") or len(parts) == 1:
            items[path] = file_item(hub, path, entry)
    if folder and not items:
        raise HubStateError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    start = int(call.parameter("cursor") or 0)
    stop = start + hub.page_size
    answer = Response.of_json(list(items.values())[start:stop])
    if stop < len(items):
        options = f"recursive={call.flag('recursive')}&expand={call.flag('expand')}&cursor={stop}"
        answer.headers["Link"] = f'<{hub.endpoint}{call.path}?{options}>; rel="next"'
    return answer


def paths_info(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    head = readable(hub.store, name, caller).resolve(unquote(tail))
    wanted = parse_qs(call.body().decode()).get("paths", [])
    if len(wanted) > 1000:
        raise HubStateError(413, None, "too many parameters")
    found = [file_item(hub, path, head.tree[path]) for path in wanted if path in head.tree]
    found += [folder_item(path) for path in wanted if any(name.startswith(f"{path}/") for name in head.tree)]
    return Response.of_json(found)


def refs(hub: Hub, call: Call, caller: Caller, name: str, _tail: str) -> Response:
    found = readable(hub.store, name, caller).refs.items()

    def below(prefix: str) -> list[dict[str, str]]:
        named = ((ref, target) for ref, target in found if ref.startswith(prefix))
        return [{"name": ref[len(prefix) :], "ref": ref, "targetCommit": target} for ref, target in named]

    answer = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        answer["pullRequests"] = [{**ref, "name": ref["ref"]} for ref in below("refs/pr/")]
    return Response.of_json(answer)


def commits(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    """Return the history of a revision in pages, newest commit first."""
    history = list(readable(hub.store, name, caller).history(unquote(tail)))
    start = int(call.parameter("cursor") or 0)
    answer = Response.of_json([commit_item(item) for item in history[start : start + hub.page_size]])
    if start + hub.page_size < len(history):
        link = f"{hub.endpoint}{call.path}?cursor={start + hub.page_size}"
        answer.headers["Link"] = f'<{link}>; rel="next"'
    return answer


def commit_item(item: Commit) -> dict[str, Any]:
    return {
        "id": item.id,
        "title": item.title,
        "message": item.message,
        "date": item.date,
        "authors": [{"user": item.author}],
    }


def create_branch(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    body = call.json()
    with hub.store.lock:
        repo = writable(hub.store, name, caller)
        branch = f"refs/heads/{unquote(tail)}"
        if branch in repo.refs:
            raise HubStateError(409, None, f"Reference already exists: {branch}")
        repo.set_ref(branch, repo.resolve(body.get("startingPoint") or "main").id)
    return Response.of_json({"ok": True})


def delete_branch(hub: Hub, _call: Call, caller: Caller, name: str, tail: str) -> Response:
    with hub.store.lock:
        repo = writable(hub.store, name, caller)
        branch = f"refs/heads/{unquote(tail)}"
        if branch == "refs/heads/main":
            raise HubStateError(403, None, "The default branch cannot be deleted")
        if branch not in repo.refs:
            raise HubStateError(404, "RevisionNotFound", f"Invalid rev id: {unquote(tail)}")
        repo.set_ref(branch, None)
    return Response.of_json({"ok": True})


def preupload(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    """Return how each file must be uploaded, and the object stored at its path."""
    repo = writable(hub.store, name, caller, may_pull(call, unquote(tail)))
    head = repo.resolve(unquote(tail))
    answer = []
    for file in call.json()["files"]:
        mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        item: dict[str, Any] = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if (present := head.tree.get(file["path"])) is not None:
            item["oid"] = present.sha256 or present.blob
        answer.append(item)
    return Response.of_json({"files": answer})


def may_pull(call: Call, revision: str) -> bool:
    return call.flag("create_pr") or revision.startswith("refs/pr/")


def commit(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    """Make one commit from NDJSON, atomically."""
    revision, pull = unquote(tail), call.flag("create_pr")
    lines = [json.loads(line) for line in call.body().splitlines() if line.strip()]
    header = lines[0]["value"]
    with hub.store.lock:
        repo = writable(hub.store, name, caller, may_pull(call, revision))
        head = repo.resolve(revision)
        parent = header.get("parentCommit")
        if parent is not None and parent != head.id:
            raise HubStateError(412, None, "A commit has happened since. Please refresh and try again.")
        changed = apply_operations(hub, repo, dict(head.tree), lines[1:])
        title, message = header["summary"], header.get("description", "")
        created = repo.add_commit(head.id, changed, title, message, caller.user or "")
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        answer = {
            "commitOid": created,
            "commitUrl": f"{hub.endpoint}/{name}/commit/{created}",
            "success": True,
        }
        if pull:
            number = repo.meta["pulls"] + 1
            repo.set_meta(pulls=number)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{hub.endpoint}/{name}/discussions/{number}"
        repo.set_ref(ref, created)
    return Response.of_json(answer)


def apply_operations(
    hub: Hub, repo: Repo, tree: dict[str, Entry], operations: list[dict[str, Any]]
) -> dict[str, Entry]:
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if not path or path.startswith("/") or ".." in path.split("/") or ".git" in path.split("/"):
            raise HubStateError(400, None, f"invalid path {path!r}")
        if kind == "file":
            tree[path] = repo.add_blob(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            hub.receive_from_xet(repo, value["oid"])
            entry = repo.lfs_entry(value["oid"])
            if value.get("size", entry.size) != entry.size:
                raise HubStateError(400, None, f"{path} is {entry.size} bytes, announced {value['size']}")
            tree[path] = entry
        elif kind == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubStateError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif kind == "deletedFolder":
            inside = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise HubStateError(404, "EntryNotFound", "A folder with this name doesn't exist")
            for name in inside:
                del tree[name]
        else:
            raise HubStateError(400, None, f"unknown operation {kind}")
    return tree


def xet_token(hub: Hub, call: Call, caller: Caller, name: str, tail: str) -> Response:
    """Return the address of the Xet store; the offline store ignores the token."""
    if not hub.xet_enabled:
        raise HubStateError(404, None, "Xet is off")
    if "xet-write-token" in call.path:
        writable(hub.store, name, caller, may_pull(call, unquote(tail)))
    else:
        readable(hub.store, name, caller, content=True)
    expires = int(time.time() + 3600)
    headers = {
        "X-Xet-Cas-Url": hub.xet.url,
        "X-Xet-Access-Token": "local",
        "X-Xet-Token-Expiration": str(expires),
    }
    body = {"casUrl": hub.xet.url, "accessToken": "local", "exp": expires}
    return Response.of_json(body, 200, **headers)


def refresh_route(hub: Hub, name: str, revision: str) -> str:
    return f"{hub.endpoint}/api/models/{name}/xet-read-token/{quote(revision, safe='')}"
