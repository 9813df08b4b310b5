"""Access to one namespace of a Kubernetes cluster. The only file that imports the Kubernetes client.

Calls with a transient error (no connection, 429, 5xx) are repeated for `patience_s`, then they raise OutageError. A
refused call raises ClusterError with a message of one line.

kubeflow-training's TrainingClient is not used: it raises the same RuntimeError for a missing job (404), a name conflict
(409) and an outage, does not repeat calls, and has neither a watch from a resource version nor a delete with a UID
precondition (measured with 1.9.4). Adopting a job, and following it through outages, need all of these.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from kubernetes import client, config, watch
from kubernetes.client import ApiException
from kubernetes.utils.quantity import parse_quantity

from components.jobs.manifests import Manifest
from model.errors import ClusterError, OutageError
from model.retry import exponential_s, retry

log = logging.getLogger("mplug")
T = TypeVar("T")
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = (5, 30)
"""Timeouts for connecting and for the next bytes."""
LOG_SILENCE_S = 300
"""Seconds without a log line after which the log is requested again."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
CALL_ERRORS = (ApiException, urllib3.exceptions.HTTPError, OSError)
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:")


@dataclass(frozen=True)
class Kind:
    """API path, conditions and pod labels of a kind of job."""

    group: str
    version: str
    plural: str
    succeeded: str
    """Condition of a succeeded job. The condition of a failed one is `Failed` for all kinds."""
    pods: str
    """Label selector of the pods of a job, with a placeholder for its name."""
    first: str
    """Additional label selector of the first pod."""


KINDS = {
    "PyTorchJob": Kind(
        "kubeflow.org",
        "v1",
        "pytorchjobs",
        "Succeeded",
        "training.kubeflow.org/job-name={}",
        "training.kubeflow.org/replica-type=master",
    ),
    "Job": Kind("batch", "v1", "jobs", "Complete", "job-name={}", "job-name"),
    "TrainJob": Kind(
        "trainer.kubeflow.org",
        "v1alpha1",
        "trainjobs",
        "Complete",
        "jobset.sigs.k8s.io/jobset-name={}",
        "batch.kubernetes.io/job-completion-index=0",
    ),
    "TrainingRuntime": Kind("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "", "", ""),
    "Workload": Kind("kueue.x-k8s.io", "v1beta2", "workloads", "", "", ""),
}


def parse_amount(quantity: str | int) -> float:
    """A Kubernetes quantity, "500m" or "64Gi", as a number."""
    return float(parse_quantity(quantity))


class Cluster:
    """The cluster of the pod that this process runs in, or of the current kubeconfig."""

    def __init__(self, namespace: str = "", patience_s: float = 600.0) -> None:
        self.patience_s = patience_s
        try:
            config.load_incluster_config()
            known = OWN_NAMESPACE.read_text(encoding="utf-8")
        except config.ConfigException:
            try:
                where = os.environ.get("KUBECONFIG")  # the client only reads it at import
                config.load_kube_config(where)
                known = config.list_kube_config_contexts(where)[1]["context"].get("namespace", "")
            except config.ConfigException as error:
                raise ClusterError(f"no cluster is configured: {error} Set KUBECONFIG.") from error
        self.namespace = namespace or known or "default"
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # `call` repeats, and must see every failure
        if not settings.verify_ssl:  # set in the kubeconfig: without a warning at every call
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self.api = client.ApiClient(settings)
        self.custom, self.core = client.CustomObjectsApi(self.api), client.CoreV1Api(self.api)

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Calls a function of the API and repeats it during outages."""
        options.setdefault("_request_timeout", TIMEOUT_S)
        deadline = time.monotonic() + self.patience_s

        def wait_s(error: Exception, failures: int) -> float:
            if not isinstance(error, CALL_ERRORS):
                raise error
            if not is_transient(error):
                raise _refused(error) from error
            text = error_text(error)
            if time.monotonic() > deadline:
                raise OutageError(f"the API server has not answered for {self.patience_s:g} s: {text}") from error
            seconds = exponential_s(failures, FIRST_WAIT_S, LONGEST_WAIT_S)
            log.warning("the API server does not answer, retrying in %g s: %s", seconds, text)
            return seconds

        return retry(lambda: function(*arguments, **options), wait_s)

    def _json(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Manifest:
        """The parsed response. The client's model classes reject responses of newer servers that omit fields."""
        return json.loads(self.call(function, *arguments, _preload_content=False, **options).data)

    def _on_custom(self, verb: str, kind: str, *arguments: Any, **options: Any) -> Any:
        """Calls create, get, list, patch or delete for objects of a kind in KINDS."""
        of, function = KINDS[kind], getattr(self.custom, f"{verb}_namespaced_custom_object")
        return self.call(function, of.group, of.version, self.namespace, of.plural, *arguments, **options)

    def create(self, manifest: Manifest) -> Manifest:
        return dict(self._on_custom("create", manifest["kind"], manifest))

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object; None if it does not exist."""
        try:
            return dict(self._on_custom("get", kind, name))
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def labelled(self, kind: str, selector: str) -> list[Manifest]:
        """The objects with these labels."""
        return list(self._on_custom("list", kind, label_selector=selector)["items"])

    def patch(self, kind: str, name: str, changes: Manifest) -> None:
        self._on_custom("patch", kind, name, changes)

    def delete(self, kind: str, name: str, uid: str = "") -> bool:
        """Deletes the object and its pods. False if it does not exist, or if its UID is not `uid`."""
        options = {"propagationPolicy": "Background"}
        body = {**options, "preconditions": {"uid": uid}} if uid else options
        try:
            self._on_custom("delete", kind, name, body=body)
        except ClusterError as error:
            if error.status == 404 or (uid and error.status == 409):
                return False
            raise
        return True

    def changes(self, kind: str, name: str, version: str, seconds: int) -> Iterator[Manifest | None]:
        """Yields the object after each change for at most `seconds`; None if it was deleted.

        Ends early if the connection breaks or the server no longer knows `version`. Read the object again then.
        """
        of, watcher = KINDS[kind], watch.Watch()
        try:
            for event in watcher.stream(
                self.custom.list_namespaced_custom_object,
                of.group,
                of.version,
                self.namespace,
                of.plural,
                field_selector=f"metadata.name={name}",
                resource_version=version,
                timeout_seconds=seconds,
                _request_timeout=(TIMEOUT_S[0], seconds + TIMEOUT_S[1]),
            ):
                yield None if event["type"] == "DELETED" else event["object"]
        except CALL_ERRORS as error:
            if not is_transient(error):
                raise _refused(error) from error
            log.debug("the watch of %s ended: %s", name, error_text(error))
            time.sleep(FIRST_WAIT_S)
        finally:
            watcher.stop()

    def pods(self, kind: str, name: str, *, first: bool = False) -> list[Manifest]:
        """The pods of a job, or only its first pod."""
        selector = KINDS[kind].pods.format(name) + (f",{KINDS[kind].first}" if first else "")
        found = self._json(self.core.list_namespaced_pod, self.namespace, label_selector=selector)
        return list(found["items"])

    def warnings(self, name: str) -> list[str]:
        """Warning events of an object of this name, oldest first."""
        selector = f"involvedObject.name={name},type=Warning"
        found = self._json(self.core.list_namespaced_event, self.namespace, field_selector=selector)
        return [f"{event.get('reason')}: {event.get('message')}" for event in found["items"]]

    def log_lines(self, pod: str, *, follow: bool) -> Iterator[tuple[str, str]]:
        """Lines of a pod's log with their timestamps. Messages of the kubelet have no timestamp and are skipped."""
        stream = self.core.read_namespaced_pod_log(
            pod,
            self.namespace,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(TIMEOUT_S[0], LOG_SILENCE_S),
        )
        yield from filter(None, map(_timed, stream))

    def log_end(self, pod: str, container: str, lines: int) -> list[str]:
        """The last lines of a container's log."""
        options = {"container": container, "tail_lines": lines, "_preload_content": False}
        answer = self.call(self.core.read_namespaced_pod_log, pod, self.namespace, **options)
        return str(answer.data.decode(errors="replace")).splitlines()

    def read(self, path: str) -> Manifest:
        """Any object or list of the API by its path."""
        return self._json(self.api.call_api, path, "GET", auth_settings=["BearerToken"], _return_http_data_only=True)

    def admission_error(self, pod: Manifest) -> str:
        """The reason why admission would refuse a pod; empty if it would not. A dry run: nothing is created."""
        try:
            self.call(self.core.create_namespaced_pod, self.namespace, pod, dry_run="All", _preload_content=False)
        except ClusterError as error:
            return str(error)
        return ""

    def is_allowed(self, verb: str, group: str, resource: str) -> bool:
        """Whether the current user has this permission in the namespace."""
        name, _, part = resource.partition("/")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        create = client.AuthorizationV1Api(self.api).create_self_subject_access_review
        found = self._json(create, {**review, "spec": {"resourceAttributes": attributes}})
        return bool(found["status"]["allowed"])

    def pod_template(self, name: str) -> Manifest:
        """A PodTemplate of the namespace."""
        try:
            return self._json(self.core.read_namespaced_pod_template, name, self.namespace)
        except ClusterError as error:
            if error.status != 404:
                raise
            raise ClusterError(
                f"namespace {self.namespace} has no PodTemplate {name}: `kubectl apply -k` an overlay of k8s/ first.",
                404,
            ) from error

    def owner(self) -> list[Manifest]:
        """A reference to the workflow that owns this pod, so that created objects are removed with it.

        Empty outside of a pipeline step, and if the step runs in another namespace.
        """
        pod = os.environ.get("KFP_POD_NAME", "")
        if not pod or not OWN_NAMESPACE.exists() or OWN_NAMESPACE.read_text(encoding="utf-8") != self.namespace:
            return []
        step = self._json(self.core.read_namespaced_pod, pod, self.namespace)
        references = step["metadata"].get("ownerReferences", [])
        return [{**reference, "controller": False, "blockOwnerDeletion": False} for reference in references[:1]]


def find_condition(job: Manifest, name: str) -> Manifest | None:
    """The condition of a job if it is true, else None."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == name and item["status"] == "True"), None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later. 410: the resource version has expired; the next read has a new one."""
    return not isinstance(error, ApiException) or error.status in (0, 408, 410, 429, None) or error.status >= 500


def error_text(error: BaseException) -> str:
    """The error message of the API server in one line."""
    if not isinstance(error, ApiException):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        body: Mapping[str, Any] = json.loads(error.body or "{}")
    except ValueError:
        body = {}
    message = " ".join(str(body.get("message", "")).split())[:500]
    return f"{error.status} {body.get('reason') or error.reason}: {message}"


def _refused(error: BaseException) -> ClusterError:
    return ClusterError(f"Kubernetes: {error_text(error)}", getattr(error, "status", 0) or 0)


def _timed(line: bytes) -> tuple[str, str] | None:
    when, _, text = line.removesuffix(b"\n").decode(errors="replace").partition(" ")
    return (when, text) if MOMENT.match(when) else None
