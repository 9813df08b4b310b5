"""One namespace of a Kubernetes cluster, seen through an API that may fail: the only file that imports its client.

A call that fails for a reason that may pass (no connection, 429, 5xx) is made again, for `patience_s`; then it is an
OutageError. What is refused is a ClusterError in one line.
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
"""To connect, and to wait for the next bytes."""
LOG_SILENCE_S = 300
"""After which a log is asked for again."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
CALL_ERRORS = (ApiException, urllib3.exceptions.HTTPError, OSError)
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:")


@dataclass(frozen=True)
class Kind:
    """How jobs of one kind are found, and how they say that they have ended."""

    group: str
    version: str
    plural: str
    succeeded: str
    """Condition of a job that has; `Failed` is the other one for all of them."""
    pods: str
    """Label selector of its pods, for a name."""
    first: str
    """What its first pod has beyond that."""


KINDS = {
    "PyTorchJob": Kind(
        "kubeflow.org", "v1", "pytorchjobs", "Succeeded",
        "training.kubeflow.org/job-name={}", "training.kubeflow.org/replica-type=master",
    ),
    "Job": Kind("batch", "v1", "jobs", "Complete", "job-name={}", "job-name"),
    "TrainJob": Kind(
        "trainer.kubeflow.org", "v1alpha1", "trainjobs", "Complete",
        "jobset.sigs.k8s.io/jobset-name={}", "batch.kubernetes.io/job-completion-index=0",
    ),
    "TrainingRuntime": Kind("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "", "", ""),
    "Workload": Kind("kueue.x-k8s.io", "v1beta2", "workloads", "", "", ""),
}  # fmt: skip


def parse_amount(quantity: str | int) -> float:
    """A Kubernetes quantity, "500m" or "64Gi", as a number."""
    return float(parse_quantity(quantity))


class Cluster:
    """The cluster of the pod that this runs in, or of the current kubeconfig."""

    def __init__(self, namespace: str = "", patience_s: float = 600.0) -> None:
        self.patience_s = patience_s
        try:
            config.load_incluster_config()
            known = OWN_NAMESPACE.read_text(encoding="utf-8")
        except config.ConfigException:
            try:
                where = os.environ.get("KUBECONFIG")  # which the client reads when it is imported
                config.load_kube_config(where)
                known = config.list_kube_config_contexts(where)[1]["context"].get("namespace", "")
            except config.ConfigException as error:
                raise ClusterError(f"no cluster is configured: {error} Set KUBECONFIG.") from error
        self.namespace = namespace or known or "default"
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # urllib3's would hide from us how long it takes
        if not settings.verify_ssl:  # as the kubeconfig says: no warning at every call
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self.api = client.ApiClient(settings)
        self.custom, self.core = client.CustomObjectsApi(self.api), client.CoreV1Api(self.api)

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """`function` of one of the APIs, through outages."""
        options.setdefault("_request_timeout", TIMEOUT_S)
        deadline = time.monotonic() + self.patience_s

        def wait_s(error: Exception, failures: int) -> float:
            if not isinstance(error, CALL_ERRORS):
                raise error
            if not is_transient(error):
                raise _refused(error) from error
            text = error_text(error)
            if time.monotonic() > deadline:
                raise OutageError(f"the API server does not answer for {self.patience_s:g} s: {text}") from error
            seconds = exponential_s(failures, FIRST_WAIT_S, LONGEST_WAIT_S)
            log.warning("the API server does not answer, tried again in %g s: %s", seconds, text)
            return seconds

        return retry(lambda: function(*arguments, **options), wait_s)

    def _json(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Manifest:
        """The answer as it came: the client's classes refuse what a newer server leaves out."""
        found: Manifest = json.loads(self.call(function, *arguments, _preload_content=False, **options).data)
        return found

    def create(self, manifest: Manifest) -> Manifest:
        kind = KINDS[manifest["kind"]]
        made: Manifest = self.call(
            self.custom.create_namespaced_custom_object, kind.group, kind.version, self.namespace, kind.plural, manifest
        )
        return made

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or nothing where there is none."""
        of = KINDS[kind]
        try:
            found: Manifest = self.call(
                self.custom.get_namespaced_custom_object, of.group, of.version, self.namespace, of.plural, name
            )
        except ClusterError as error:
            if error.status == 404:
                return None
            raise
        return found

    def labelled(self, kind: str, selector: str) -> list[Manifest]:
        """The objects with these labels."""
        of = KINDS[kind]
        found = self.call(
            self.custom.list_namespaced_custom_object, of.group, of.version, self.namespace, of.plural,
            label_selector=selector,
        )  # fmt: skip
        return list(found["items"])

    def patch(self, kind: str, name: str, changes: Manifest) -> None:
        of = KINDS[kind]
        self.call(
            self.custom.patch_namespaced_custom_object, of.group, of.version, self.namespace, of.plural, name, changes
        )

    def delete(self, kind: str, name: str, uid: str = "") -> bool:
        """Whether there was one to delete, and with a `uid` this very one; its pods go with it."""
        of, options = KINDS[kind], {"propagationPolicy": "Background"}
        body = {**options, "preconditions": {"uid": uid}} if uid else options
        try:
            self.call(
                self.custom.delete_namespaced_custom_object, of.group, of.version, self.namespace, of.plural, name,
                body=body,
            )  # fmt: skip
        except ClusterError as error:
            if error.status == 404 or (uid and error.status == 409):
                return False
            raise
        return True

    def changes(self, kind: str, name: str, version: str, seconds: int) -> Iterator[Manifest | None]:
        """The object each time it changes, for so many seconds; nothing where it was deleted.

        Ends early where the connection does, or where the server has forgotten `version`: look again then.
        """
        of, watcher = KINDS[kind], watch.Watch()
        try:
            for event in watcher.stream(
                self.custom.list_namespaced_custom_object, of.group, of.version, self.namespace, of.plural,
                field_selector=f"metadata.name={name}", resource_version=version, timeout_seconds=seconds,
                _request_timeout=(TIMEOUT_S[0], seconds + TIMEOUT_S[1]),
            ):  # fmt: skip
                yield None if event["type"] == "DELETED" else event["object"]
        except CALL_ERRORS as error:
            if not is_transient(error):
                raise _refused(error) from error
            log.debug("the watch of %s ended: %s", name, error_text(error))
            time.sleep(FIRST_WAIT_S)
        finally:
            watcher.stop()

    def pods(self, kind: str, name: str, *, first: bool = False) -> list[Manifest]:
        """The pods of a job, or its first one."""
        selector = KINDS[kind].pods.format(name) + (f",{KINDS[kind].first}" if first else "")
        found = self._json(self.core.list_namespaced_pod, self.namespace, label_selector=selector)
        return list(found["items"])

    def warnings(self, name: str) -> list[str]:
        """What the cluster complains about with an object of this name, oldest first."""
        selector = f"involvedObject.name={name},type=Warning"
        found = self._json(self.core.list_namespaced_event, self.namespace, field_selector=selector)
        return [f"{event.get('reason')}: {event.get('message')}" for event in found["items"]]

    def log_lines(self, pod: str, *, follow: bool) -> Iterator[tuple[str, str]]:
        """Lines of a pod's log, each with its time. Messages of the kubelet carry no time and are dropped."""
        stream = self.core.read_namespaced_pod_log(
            pod, self.namespace, follow=follow, timestamps=True, _preload_content=False,
            _request_timeout=(TIMEOUT_S[0], LOG_SILENCE_S),
        )  # fmt: skip
        rest = b""
        for chunk in stream.stream():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from filter(None, map(_timed, lines))
        if timed := _timed(rest):
            yield timed

    def log_end(self, pod: str, container: str, lines: int) -> list[str]:
        """The last lines of a container's log."""
        answer = self.call(
            self.core.read_namespaced_pod_log, pod, self.namespace, container=container, tail_lines=lines,
            _preload_content=False,
        )  # fmt: skip
        return str(answer.data.decode(errors="replace")).splitlines()

    def read(self, path: str) -> Manifest:
        """Any object or list of the API, by its path."""
        return self._json(self.api.call_api, path, "GET", auth_settings=["BearerToken"], _return_http_data_only=True)

    def admission_error(self, pod: Manifest) -> str:
        """Why admission would refuse a pod, in a line; empty where it would not. Nothing is made."""
        try:
            self.call(self.core.create_namespaced_pod, self.namespace, pod, dry_run="All", _preload_content=False)
        except ClusterError as error:
            return str(error)
        return ""

    def is_allowed(self, verb: str, group: str, resource: str) -> bool:
        """Whether who asks has this right in the namespace."""
        name, _, part = resource.partition("/")
        attributes = {
            "namespace": self.namespace, "verb": verb, "group": group, "resource": name, "subresource": part
        }  # fmt: skip
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        found = self._json(
            client.AuthorizationV1Api(self.api).create_self_subject_access_review,
            {**review, "spec": {"resourceAttributes": attributes}},
        )
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
        """A reference to the workflow that owns this pod, so that what is made here goes when that goes.

        Empty outside a pipeline's step, and where the step runs in another namespace.
        """
        pod = os.environ.get("KFP_POD_NAME", "")
        if not pod or not OWN_NAMESPACE.exists() or OWN_NAMESPACE.read_text(encoding="utf-8") != self.namespace:
            return []
        step = self._json(self.core.read_namespaced_pod, pod, self.namespace)
        references = step["metadata"].get("ownerReferences", [])
        return [{**reference, "controller": False, "blockOwnerDeletion": False} for reference in references[:1]]


def find_condition(job: Manifest, name: str) -> Manifest | None:
    """The condition of a job, where it is true."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == name and item["status"] == "True"), None)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may go well later. 410: the server has forgotten a version; the next look has a new one."""
    if isinstance(error, ApiException):
        return error.status in (0, 408, 410, 429, None) or error.status >= 500
    return True


def error_text(error: BaseException) -> str:
    """One line of what the API server has said."""
    if not isinstance(error, ApiException):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        body: Mapping[str, Any] = json.loads(error.body or "{}")
    except ValueError:
        body = {}
    return (
        f"{error.status} {body.get('reason') or error.reason}: {' '.join(str(body.get('message', '')).split())[:500]}"
    )


def _refused(error: BaseException) -> ClusterError:
    return ClusterError(f"Kubernetes: {error_text(error)}", getattr(error, "status", 0) or 0)


def _timed(line: bytes) -> tuple[str, str] | None:
    when, _, text = line.decode(errors="replace").partition(" ")
    return (when, text) if MOMENT.match(when) else None
