"""Sends a compiled pipeline to Kubeflow Pipelines, and waits for the end of its run: `mplug pipeline submit`."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import kfp_server_api
import urllib3
from kfp_server_api import ApiException

from model.exits import OutageError, StageError
from pipelines.catalog import documents

log = logging.getLogger("mplug")
T = TypeVar("T")
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
LOOK_EVERY_S = 10.0
PATIENCE_S = 300.0
"""With a host that does not answer."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where Kubeflow Pipelines is, and who asks."""

    url: str
    token: str = ""
    """Sent as a bearer token."""
    headers: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""
    """Of a Kubeflow with profiles; empty where there are none."""

    def api(self) -> kfp_server_api.ApiClient:
        settings = kfp_server_api.Configuration(host=self.url.rstrip("/"))
        settings.retries = False
        if self.token:
            settings.api_key["authorization"] = self.token
            settings.api_key_prefix["authorization"] = "Bearer"
        api = kfp_server_api.ApiClient(settings)
        for name, value in self.headers.items():
            api.set_default_header(name, value)
        return api

    def link(self, run_id: str) -> str:
        return f"{self.url.rstrip('/')}/#/runs/details/{run_id}"


def submit(
    host: Host, name: str, arguments: Mapping[str, Any], *, run_name: str, experiment: str, service_account: str = "",
    caching: bool = True,
) -> str:  # fmt: skip
    """Starts a run of pipeline `name`; returns its id."""
    api = host.api()
    spec, platform = documents(name)
    if not caching:
        _without_cache(spec)
    run = kfp_server_api.V2beta1Run(
        display_name=run_name,
        experiment_id=_experiment(api, experiment, host.namespace),
        pipeline_spec={"pipeline_spec": spec, "platform_spec": platform},
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(arguments)),
        service_account=service_account or None,
    )
    # made again after an answer that was lost, it would be a second run: this one call is not repeated
    made = _call(kfp_server_api.RunServiceApi(api).run_service_create_run, run=run, patience_s=0)
    run_id: str = made.run_id
    return run_id


def wait(host: Host, run_id: str) -> None:
    """Returns when the run has succeeded. Raises StageError, with the steps that have failed."""
    service, state = kfp_server_api.RunServiceApi(host.api()), ""
    while True:
        run = _call(service.run_service_get_run, run_id)
        if run.state != state:
            state = run.state
            log.info("run %s: %s", run_id, state)
        if state == "SUCCEEDED":
            return
        if state in ENDED:
            raise StageError(f"run {run_id} has ended as {state}. {_failed_steps(run)} {host.link(run_id)}")
        time.sleep(LOOK_EVERY_S)


def _experiment(api: kfp_server_api.ApiClient, name: str, namespace: str) -> str:
    """Id of the experiment of this name, made where there is none."""
    service = kfp_server_api.ExperimentServiceApi(api)
    token = ""
    while True:
        page = _call(
            service.experiment_service_list_experiments, page_size=100, page_token=token, namespace=namespace or None
        )
        for found in page.experiments or []:
            if found.display_name == name:
                return str(found.experiment_id)
        token = page.next_page_token or ""
        if not token:
            break
    wanted = kfp_server_api.V2beta1Experiment(display_name=name, namespace=namespace or None)
    return str(_call(service.experiment_service_create_experiment, experiment=wanted).experiment_id)


def _failed_steps(run: Any) -> str:
    tasks = (run.run_details.task_details if run.run_details else None) or []
    failed = sorted({task.display_name for task in tasks if task.state == "FAILED" and task.display_name})
    return f"Failed: {', '.join(failed)}." if failed else ""


def _without_cache(spec: dict[str, Any]) -> None:
    """Every task of every level; the backend's own switch knows only the outermost."""
    parts = [spec["root"], *spec.get("components", {}).values()]
    for part in parts:
        for task in part.get("dag", {}).get("tasks", {}).values():
            task["cachingOptions"] = {}


def _call(function: Callable[..., T], *arguments: Any, patience_s: float | None = None, **options: Any) -> T:
    """A call that is made again while the host does not answer."""
    options = {key: value for key, value in options.items() if value is not None}
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    wait_s = 1.0
    while True:
        try:
            return function(*arguments, _request_timeout=(5, 60), **options)
        except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            status = getattr(error, "status", 0) or 0
            said = f"{status} {error.reason}" if isinstance(error, ApiException) else f"{type(error).__name__}"
            if status in (401, 403):
                raise StageError(f"Kubeflow Pipelines refuses who asks: {said}. Give --token or --header.") from error
            if 400 <= status < 500 and status != 429:
                body = " ".join(str(getattr(error, "body", "")).split())[:300]
                raise StageError(f"Kubeflow Pipelines: {said}: {body}") from error
            if time.monotonic() >= deadline:
                raise OutageError(f"Kubeflow Pipelines does not answer: {said}.") from error
            log.warning("Kubeflow Pipelines does not answer, tried again in %g s: %s", wait_s, said)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 30.0)
