"""Content of files: resolve, the object store behind the redirects, and LFS uploads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.hub_server.access import identify, readable, writable
from tests.hub_server.messages import Response, serve_file
from tests.hub_server.routes_api import may_pull, refresh_route
from tests.hub_server.store import HubStateError

if TYPE_CHECKING:
    from tests.hub_server.hub import Hub
    from tests.hub_server.messages import Call


def resolve(hub: Hub, call: Call, name: str, revision: str, path: str) -> Response:
    """Return a file by repository, revision and path; redirect for an LFS object."""
    repo = readable(hub.store, name, identify(hub.store, call.token), content=True)
    head = repo.resolve(unquote(revision))
    entry = head.tree.get(unquote(path))
    headers = {"X-Repo-Commit": head.id}
    if entry is None:
        missing = HubStateError(404, "EntryNotFound", "Entry not found")
        return hub.error(missing, headers)
    headers |= {"ETag": f'"{entry.sha256 or entry.blob}"'}
    if entry.sha256 is None:
        return serve_file(repo.blob_path(entry.blob), entry.size, call.headers.get("range"), headers)
    headers |= {
        "X-Linked-Etag": f'"{entry.sha256}"',
        "X-Linked-Size": str(entry.size),
        "Location": hub.store_url(f"/_cdn/{name}/{entry.sha256}"),
    }
    if hub.xet_enabled and (stored := hub.xet.find(entry.sha256)) is not None:
        headers |= {"X-Xet-Hash": stored.hash, "X-Xet-Refresh-Route": refresh_route(hub, name, head.id)}
    return Response(302, b"", headers)


def cdn(hub: Hub, call: Call, name: str, sha256: str) -> Response:
    """Return an object from its signed address, without a token."""
    hub.signer.check(call)
    path = hub.store.repo(name).object_path(sha256)
    if not path.exists():
        return Response(404, b"<Error><Code>NoSuchKey</Code></Error>", {"Content-Type": "application/xml"})
    headers = {"ETag": f'"{sha256}"'}
    return serve_file(path, path.stat().st_size, call.headers.get("range"), headers)


def lfs_batch(hub: Hub, call: Call, name: str) -> Response:
    """Return the upload of each object: none, to one address, or in parts."""
    body = call.json()
    pull = may_pull(call, body.get("ref", {}).get("name", "")) or "ref" not in body
    repo = writable(hub.store, name, identify(hub.store, call.token), pull)
    multipart = "multipart" in body.get("transfers", ()) and hub.part_size is not None
    objects = []
    for item in body["objects"]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        objects.append(answer)
        if repo.object_path(oid).exists():
            continue
        hub.check_quota(size)
        verify = {"href": f"{hub.endpoint}/_verify/{name}"}
        if multipart and hub.part_size is not None and size > hub.part_size:
            parts = range(1, -(-size // hub.part_size) + 1)
            header = {str(part): hub.store_url(f"/_part/{name}/{oid}/{part}") for part in parts}
            header["chunk_size"] = str(hub.part_size)
            href = f"{hub.endpoint}{hub.signer.sign(f'/_complete/{name}/{oid}')}"
            answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        else:
            href = hub.store_url(f"/_upload/{name}/{oid}")
            answer["actions"] = {"upload": {"href": href}, "verify": verify}
    transfer = "multipart" if multipart else "basic"
    return Response.of_json({"transfer": transfer, "objects": objects})


def upload(hub: Hub, call: Call, name: str, oid: str) -> Response:
    """Store a whole object from one PUT."""
    hub.signer.check(call)
    temporary = hub.store.temporary()
    hub.save_body(call, temporary)
    hub.store.repo(name).add_object(temporary, oid)
    return Response(200, b"", {"ETag": f'"{oid}"'})


def upload_part(hub: Hub, call: Call, name: str, oid: str, number: str) -> Response:
    hub.signer.check(call)
    part = hub.part_path(name, oid, int(number))
    temporary = hub.store.temporary()
    size = hub.save_body(call, temporary)
    part.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(part)
    return Response(200, b"", {"ETag": f'"{oid[:8]}-{number}-{size}"'})


def complete(hub: Hub, call: Call, name: str, oid: str) -> Response:
    """Join parts in the order that the client confirms, and check the digest."""
    body = call.json()
    hub.signer.check(call)
    if hub.store.repo(name).object_path(oid).exists():
        return Response.of_json({"success": True})
    temporary = hub.store.temporary()
    with temporary.open("wb") as target:
        for part in body["parts"]:
            path = hub.part_path(name, oid, part["partNumber"])
            if not path.exists() or part["etag"] != f'"{oid[:8]}-{part["partNumber"]}-{path.stat().st_size}"':
                raise HubStateError(400, None, f"InvalidPart {part['partNumber']}")
            with path.open("rb") as source:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
    hub.store.repo(name).add_object(temporary, oid)
    hub.drop_parts(name, oid)
    return Response.of_json({"success": True})


def verify(hub: Hub, call: Call, name: str) -> Response:
    """Confirm that an uploaded object exists and has its size."""
    body = call.json()
    repo = readable(hub.store, name, identify(hub.store, call.token))
    path = repo.object_path(body["oid"])
    if not path.exists() or path.stat().st_size != body["size"]:
        raise HubStateError(404, None, "object not found or of another size")
    return Response.of_json({"ok": True})
