"""The API of Kubeflow Pipelines: calls that survive outages, and a check of the server version."""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import kfp_server_api
import urllib3
from kfp_server_api import ApiException

from model.errors import OutageError, StageError
from model.retry import exponential_s, retry

log = logging.getLogger("mplug")
T = TypeVar("T")
PATIENCE_S = 300.0
"""Time for which calls are repeated if the host does not answer."""
OLDEST = (2, 16)
"""Oldest version with the features of the compiled pipelines: `runAsNonRoot` of a step (2.16), optional secrets (2.15).
"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Address and credentials of Kubeflow Pipelines."""

    url: str
    token: str = ""
    """Sent as a bearer token."""
    headers: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""
    """Profile namespace; empty for a Kubeflow without profiles."""

    def api(self) -> kfp_server_api.ApiClient:
        settings = kfp_server_api.Configuration(host=self.url.rstrip("/"))
        settings.retries = False
        if self.token:
            settings.api_key["authorization"] = self.token
            settings.api_key_prefix["authorization"] = "Bearer"
        api = kfp_server_api.ApiClient(settings)
        api.default_headers.update(self.headers)
        return api

    def link(self, run_id: str) -> str:
        return f"{self.url.rstrip('/')}/#/runs/details/{run_id}"


def check_version(host: Host) -> None:
    """Raises StageError for a server that is too old for the compiled pipelines."""
    service = kfp_server_api.HealthzServiceApi(host.api())
    # the raw response: the model of the client leaves the version out
    answer: Any = call_api(service.healthz_service_get_healthz, _preload_content=False)
    try:
        tag = str(json.loads(answer.data).get("tag_name", ""))
    except (ValueError, AttributeError):
        raise StageError(f"{host.url} is not Kubeflow Pipelines: {answer.data[:100]!r}.") from None
    needed = ".".join(map(str, OLDEST))
    version = re.match(r"v?(\d+)\.(\d+)", tag)
    if not version:
        log.warning("the version of Kubeflow Pipelines is unknown (%s); these pipelines need %s.", tag or "-", needed)
    elif tuple(map(int, version.groups())) < OLDEST:
        raise StageError(f"Kubeflow Pipelines must be {needed} or newer, {host.url} is {tag}.")


def call_api(function: Callable[..., T], *arguments: Any, patience_s: float | None = None, **options: Any) -> T:
    """Calls the API, and repeats the call while the host does not answer."""
    options = {key: value for key, value in options.items() if value is not None}
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)

    def wait_s(error: Exception, failures: int) -> float:
        if not isinstance(error, ApiException | urllib3.exceptions.HTTPError | OSError):
            raise error
        status = getattr(error, "status", 0) or 0
        message = f"{status} {error.reason}" if isinstance(error, ApiException) else f"{type(error).__name__}"
        if status in (401, 403):
            raise StageError(f"Kubeflow Pipelines denies access: {message}. Pass --token or --header.") from error
        if 400 <= status < 500 and status != 429:
            body = " ".join(str(getattr(error, "body", "")).split())[:300]
            raise StageError(f"Kubeflow Pipelines: {message}: {body}") from error
        if time.monotonic() >= deadline:
            raise OutageError(f"Kubeflow Pipelines does not answer: {message}.") from error
        seconds = exponential_s(failures, 1.0, 30.0)
        log.warning("Kubeflow Pipelines does not answer, retrying in %g s: %s", seconds, message)
        return seconds

    return retry(lambda: function(*arguments, _request_timeout=(5, 60), **options), wait_s)
