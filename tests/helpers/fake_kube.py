"""A Kubernetes API server in memory with HTTP, watches, logs, and injected faults.

It supports objects of any kind, the real server's 404, 409 and 422, watches that replay from a version, and cascading
owner references. `faults` holds functions (method, path) -> status or None, called before each request.
"""

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from components.jobs.pod_security import violations

Object = dict[str, Any]
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|status))?"
)
FAULT_NAMES = {403: "Forbidden", 410: "Expired", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError"}


class StatusError(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class FakeKube:
    """The server; tests change its objects with `put`, `conclude`, `remove` and `log`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.events: list[tuple[int, str, Object, str]] = []
        self.oldest = 0
        """Older versions have expired: a watch from them gets 410."""
        self.version = 100
        self.changed = threading.Condition(threading.RLock())
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.sent_lines: list[str] = []
        self.faults: list[Callable[[str, str], int | None]] = []
        self.requests: list[tuple[str, str]] = []
        self.slow_delete_s = 0.0
        """How long a deleted object remains, like one whose pods are terminating."""
        self.break_watches = 0
        """Number of watches to cut off within a line."""
        self.pages: dict[str, Object] = {"/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.1"}}
        """Responses for other paths."""
        self.kubelet_says = ""
        """A line without a timestamp at the end of each log, as for a deleted container."""
        self.denied: set[tuple[str, str]] = set()
        """(verb, resource) that the client has no permission for."""

    # called by tests

    def put(self, plural: str, manifest: Object, namespace: str = "mplug") -> Object:
        with self.changed:
            return self._store(namespace, plural, copy.deepcopy(manifest), "ADDED")

    def wait_for(self, plural: str, number: int = 1, seconds: float = 10) -> list[Object]:
        """Waits for this many objects of a kind and returns them."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.changed:
                found = [item for (_, kind, _), item in self.objects.items() if kind == plural]
                if len(found) >= number:
                    return copy.deepcopy(found)
                self.changed.wait(0.1)
        raise AssertionError(f"there are not {number} {plural}")

    def conclude(self, plural: str, name: str, condition: str, message: str = "", namespace: str = "mplug") -> None:
        with self.changed:
            found = copy.deepcopy(self.objects[namespace, plural, name])
            conditions = found.setdefault("status", {}).setdefault("conditions", [])
            conditions.append({"type": condition, "status": "True", "reason": condition, "message": message})
            self._store(namespace, plural, found, "MODIFIED")

    def remove(self, plural: str, name: str, namespace: str = "mplug") -> Object:
        with self.changed:
            gone = self.objects.pop((namespace, plural, name))
            self._emit("DELETED", plural, gone)
            for (space, kind, child), item in list(self.objects.items()):
                owners = [owner.get("uid") for owner in item["metadata"].get("ownerReferences", [])]
                if gone["metadata"]["uid"] in owners and (space, kind, child) in self.objects:
                    self.remove(kind, child, space)
            return gone

    def log(self, pod: str, *lines: str) -> None:
        with self.changed:
            for line in lines:
                moment = f"2026-01-01T00:00:00.{sum(map(len, self.logs.values())):09d}Z"
                self.logs.setdefault(pod, []).append((moment, line))
            self.changed.notify_all()

    def pod(self, name: str, labels: dict[str, str], phase: str = "Running", **status: Any) -> Object:
        return self.put(
            "pods",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels},
                "spec": {"containers": [{"name": "pytorch"}]},
                "status": {"phase": phase, **status},
            },
        )

    def forget(self) -> None:
        """Expires all versions so far for watches."""
        self.oldest = self.version + 1

    # called by the server

    def _store(self, namespace: str, plural: str, item: Object, event: str) -> Object:
        metadata, known = item["metadata"], self.objects.get((namespace, plural, item["metadata"]["name"]))
        metadata["uid"] = known["metadata"]["uid"] if known else str(uuid.uuid4())
        metadata.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        metadata["namespace"] = namespace
        self.objects[namespace, plural, metadata["name"]] = item
        return self._emit(event, plural, item)

    def _emit(self, event: str, plural: str, item: Object) -> Object:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, event, copy.deepcopy(item), plural))
        self.changed.notify_all()
        return item

    def find(self, namespace: str, plural: str, name: str) -> Object:
        if (namespace, plural, name) not in self.objects:
            raise StatusError(404, "NotFound", f'{plural} "{name}" not found')
        return self.objects[namespace, plural, name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kube: FakeKube

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        url, kube = urlsplit(self.path), self.kube
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        kube.requests.append((self.command, url.path))
        try:
            for fault in list(kube.faults):
                if code := fault(self.command, url.path):
                    raise StatusError(code, FAULT_NAMES.get(code, "ServiceUnavailable"), "put in by the test")
            if url.path in kube.pages:
                return self.respond(200, kube.pages[url.path])
            if url.path.endswith("/selfsubjectaccessreviews"):
                asked = body["spec"]["resourceAttributes"]
                return self.respond(201, {"status": {"allowed": (asked["verb"], asked["resource"]) not in kube.denied}})
            match = PATH.fullmatch(url.path)
            if not match:
                raise StatusError(404, "NotFound", "the server could not find the requested resource")
            self.answer(match, dict(parse_qsl(url.query)), body)
        except StatusError as error:
            self.respond(
                error.code,
                {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "message": str(error),
                    "reason": error.reason,
                    "code": error.code,
                },
            )

    do_GET = do_POST = do_DELETE = do_PATCH = serve  # noqa: N815

    def answer(self, match: re.Match[str], query: dict[str, str], body: Object) -> None:
        kube, (namespace, plural, name) = self.kube, match.group("namespace", "plural", "name")
        if match["sub"] == "log":
            return self.stream_log(namespace, name, query)
        if self.command == "GET" and query.get("watch") == "True":
            return self.stream_changes(namespace, plural, query)
        with kube.changed:
            if self.command == "POST" and query.get("dryRun") == "All":
                return self.respond(201, self.admitted(namespace, plural, body))
            if self.command == "POST":
                if (namespace, plural, body["metadata"]["name"]) in kube.objects:
                    raise StatusError(409, "AlreadyExists", f'{plural} "{body["metadata"]["name"]}" already exists')
                return self.respond(201, kube._store(namespace, plural, body, "ADDED"))
            if self.command == "DELETE":
                return self.respond(200, self.delete(namespace, plural, name, body))
            if self.command == "PATCH":
                changed = merged(copy.deepcopy(kube.find(namespace, plural, name)), body)
                return self.respond(200, kube._store(namespace, plural, changed, "MODIFIED"))
            if name:
                return self.respond(200, kube.find(namespace, plural, name))
            items = [item for (space, kind, _), item in kube.objects.items() if (space, kind) == (namespace, plural)]
            chosen = [item for item in items if selected(item, query)]
            return self.respond(200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": chosen})

    def admitted(self, namespace: str, plural: str, body: Object) -> Object:
        """Pod Security admission of a namespace that enforces the restricted standard."""
        labels = self.kube.pages.get(f"/api/v1/namespaces/{namespace}", {}).get("metadata", {}).get("labels", {})
        is_restricted = plural == "pods" and labels.get("pod-security.kubernetes.io/enforce") == "restricted"
        if is_restricted and (broken := list(violations(body))):
            name = body["metadata"].get("name") or body["metadata"]["generateName"]
            message = f'pods "{name}" is forbidden: violates PodSecurity "restricted:latest": {"; ".join(broken)}'
            raise StatusError(403, "Forbidden", message)
        return body

    def delete(self, namespace: str, plural: str, name: str, options: Object) -> Object:
        kube, found = self.kube, self.kube.find(namespace, plural, name)
        wanted = options.get("preconditions", {}).get("uid")
        if wanted and wanted != found["metadata"]["uid"]:
            raise StatusError(409, "Conflict", f"the UID in the precondition ({wanted}) does not match")
        if not kube.slow_delete_s:
            return kube.remove(plural, name, namespace)
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        threading.Timer(kube.slow_delete_s, kube.remove, (plural, name, namespace)).start()
        return found

    def respond(self, code: int, answer: Object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def stream_changes(self, namespace: str, plural: str, query: dict[str, str]) -> None:
        kube, last = self.kube, int(query.get("resourceVersion") or 0)
        deadline = time.monotonic() + float(query.get("timeoutSeconds", 60))
        if last < kube.oldest:
            raise StatusError(410, "Expired", f"too old resource version: {last}")
        self.begin_stream()
        try:
            if kube.break_watches:
                kube.break_watches -= 1
                self.chunk(b'{"type": "MODI')
                self.close_connection = True
                self.connection.close()
                return
            while time.monotonic() < deadline:
                with kube.changed:
                    new = [event for event in kube.events if event[0] > last]
                    if not new:
                        kube.changed.wait(0.1)
                for version, event, item, kind in new:
                    last = version
                    if kind == plural and item["metadata"]["namespace"] == namespace and selected(item, query):
                        self.chunk(json.dumps({"type": event, "object": item}).encode() + b"\n")
            self.chunk(b"")
        except OSError:
            self.close_connection = True

    def stream_log(self, namespace: str, pod: str, query: dict[str, str]) -> None:
        kube, follow, is_timed = self.kube, query.get("follow") == "True", query.get("timestamps") == "True"
        uid = kube.find(namespace, "pods", pod)["metadata"]["uid"]
        sent = max(0, len(kube.logs.get(pod, [])) - int(query["tailLines"])) if "tailLines" in query else 0
        self.begin_stream()
        try:
            while True:
                with kube.changed:
                    found = kube.objects.get((namespace, "pods", pod))
                    is_same = found and found["metadata"]["uid"] == uid
                    new = kube.logs.get(pod, [])[sent:] if is_same else []
                    running = is_same and found["status"]["phase"] == "Running"
                    if not new and follow and running:
                        kube.changed.wait(0.1)
                        continue
                if not new:
                    if kube.kubelet_says:
                        self.chunk(kube.kubelet_says.encode())
                    break
                for when, line in new:
                    sent += 1
                    self.chunk(f"{when + ' ' if is_timed else ''}{line}\n".encode())
                    kube.sent_lines.append(line)
            self.chunk(b"")
        except OSError:
            self.close_connection = True


def merged(item: Object, changes: Object) -> Object:
    """Applies a merge patch (RFC 7386)."""
    for key, value in changes.items():
        if value is None:
            item.pop(key, None)
        elif isinstance(value, dict):
            item[key] = merged(item.get(key) or {}, value)
        else:
            item[key] = value
    return item


def selected(item: Object, query: dict[str, str]) -> bool:
    """Whether labelSelector and fieldSelector select an object."""
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, is_equality, value = term.partition("=")
        if key not in labels or (is_equality and labels[key] != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = item
        for key in path.split("."):
            found = (found or {}).get(key)
        if str(found) != value:
            return False
    return True


@contextmanager
def fake_kube(kubeconfig: Path) -> Iterator[FakeKube]:
    """Runs a server with the namespace `mplug`, and writes `kubeconfig` for it."""
    kube = FakeKube()
    handler = type("BoundHandler", (Handler,), {"kube": kube})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    context = {"cluster": "c", "user": "u", "namespace": "mplug"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "u", "user": {}}],
    }
    kubeconfig.write_text(json.dumps(config))
    try:
        yield kube
    finally:
        server.shutdown()
        server.server_close()
