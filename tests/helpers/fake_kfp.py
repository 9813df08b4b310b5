"""The API of Kubeflow Pipelines in memory, with the models of kfp-server-api. `faults` are returned first."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kfp_server_api as kfp

from tests.helpers.kfp_backend import Backend


@dataclass
class FakeKfp:
    url: str = ""
    experiments: list[kfp.V2beta1Experiment] = field(default_factory=list)
    runs: list[kfp.V2beta1Run] = field(default_factory=list)
    states: list[str] = field(default_factory=lambda: ["PENDING", "RUNNING", "SUCCEEDED"])
    """State of a run per request; the last one stays."""
    failed_steps: list[str] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    version: str = "2.17.0"
    """Empty: the server does not report it."""
    backend: Backend | None = None
    """Executes submitted runs; without it, a run takes the `states` in order."""
    headers: dict[str, str] = field(default_factory=dict)
    """Header of the last request."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeKfp
    read = kfp.ApiClient()

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        url, fake = urlsplit(self.path), self.fake
        fake.headers = {name.lower(): value for name, value in self.headers.items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if fake.faults and (code := fake.faults.pop(0)):
            return self.respond(code, {"code": code, "message": "put in by the test"})
        match self.command, url.path.removeprefix("/apis/v2beta1/").split("/"):
            case "GET", ["experiments"]:
                self.respond(200, self.page(dict(parse_qsl(url.query))))
            case "POST", ["experiments"]:
                created = kfp.V2beta1Experiment(
                    experiment_id=f"e{len(fake.experiments)}", **self.known(body, "Experiment")
                )
                fake.experiments.append(created)
                self.respond(200, created)
            case "POST", ["runs"]:
                run = kfp.V2beta1Run(run_id=f"r{len(fake.runs)}", state="PENDING", **self.known(body, "Run"))
                fake.runs.append(run)
                if fake.backend:
                    spec = run.pipeline_spec
                    parameters = run.runtime_config["parameters"]
                    fake.backend.start(run.run_id, spec["pipeline_spec"], spec["platform_spec"], parameters)
                self.respond(200, run)
            case "GET", ["healthz"]:
                self.respond(200, {"multi_user": False} | ({"tag_name": fake.version} if fake.version else {}))
            case "POST", ["runs", call]:
                run_id, _, verb = call.partition(":")
                self.act(verb, next(run for run in fake.runs if run.run_id == run_id))
            case "GET", ["runs", run_id]:
                run = next(run for run in fake.runs if run.run_id == run_id)
                shown = [(name, "FAILED") for name in fake.failed_steps]
                if fake.backend:
                    run.state, shown = fake.backend.runs[run_id].state, fake.backend.task_details(run_id)
                else:
                    run.state = fake.states.pop(0) if len(fake.states) > 1 else fake.states[0]
                details = [kfp.V2beta1PipelineTaskDetail(display_name=name, state=state) for name, state in shown]
                run.run_details = kfp.V2beta1RunDetails(task_details=details)
                self.respond(200, run)
            case _:
                self.respond(404, {"message": "not found"})

    do_GET = do_POST = serve  # noqa: N815

    def act(self, verb: str, run: kfp.V2beta1Run) -> None:
        """`:terminate` and `:retry`."""
        fake, backend = self.fake, self.fake.backend
        if verb == "terminate" and backend:
            backend.terminate(run.run_id)
        elif verb == "retry" and not (backend.retry(run.run_id) if backend else fake.failed_steps):
            message = f"Workflow cannot be retried. Workflow must be Failed/Error to retry. State: {run.state}"
            return self.respond(400, {"code": 9, "message": message})
        self.respond(200, {})

    def known(self, body: dict[str, Any], model: str) -> dict[str, Any]:
        """The request as a model; an unknown key is an error, as in the server."""
        names = getattr(kfp, f"V2beta1{model}").attribute_map
        unknown = set(body) - set(names.values())
        assert not unknown, unknown
        return {key: body[name] for key, name in names.items() if name in body}

    def page(self, query: dict[str, str]) -> kfp.V2beta1ListExperimentsResponse:
        """Returns two items per page, so that the caller must paginate."""
        start = int(query.get("page_token") or 0)
        found = [item for item in self.fake.experiments if (item.namespace or "") == query.get("namespace", "")]
        following = str(start + 2) if start + 2 < len(found) else ""
        return kfp.V2beta1ListExperimentsResponse(experiments=found[start : start + 2], next_page_token=following)

    def respond(self, code: int, answer: Any) -> None:
        data = json.dumps(self.read.sanitize_for_serialization(answer)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def fake_kfp(backend: Backend | None = None) -> Iterator[FakeKfp]:
    fake = FakeKfp(backend=backend)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"fake": fake}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
