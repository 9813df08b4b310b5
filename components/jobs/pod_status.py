"""Reads the status of pods: why they wait, why they ended, which of them were replaced."""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from components.jobs.manifests import POD_TEMPLATE, Manifest

log = logging.getLogger("mplug")
INITIAL_S = 60.0
"""Seconds after which a pod that is still in an init container is reported."""
OOM_KILLED = "it was OOM-killed"
RECENT_S = 30.0
"""A step that was logged within this time means that training has already resumed."""
RESUMED = re.compile(r"training resumes from step (\d+)")


@dataclass
class JobHistory:
    """The reported conditions and warnings of a job, and its pods so far."""

    conditions: set[str] = field(default_factory=set)
    warnings: set[str] = field(default_factory=set)
    pods: dict[str, list[str]] = field(default_factory=dict)
    """UIDs of the pods of each name, newest last."""
    end_reasons: dict[str, str] = field(default_factory=dict)
    """Reason why a pod ended, by UID."""
    replaced: dict[str, float] = field(default_factory=dict)
    """Replaced pods, and when this was noticed. Reported once the log contains the step to resume from."""

    last_step: str = ""
    last_step_at: float = 0.0
    """Step that training has resumed from, and when. The log may be read before the pods."""

    @property
    def restarts(self) -> int:
        return max((len(uids) - 1 for uids in self.pods.values()), default=0)

    def note(self, pod: Manifest) -> None:
        """Records a pod, and whether it replaces one of the same name, or of the same index in a Job."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        labels = pod["metadata"].get("labels") or {}
        index = labels.get("batch.kubernetes.io/job-completion-index", "")
        uids = self.pods.setdefault(f"{labels['job-name']}-{index}" if "job-name" in labels else name, [])
        if uid not in uids:
            if uids:
                why = self.end_reasons.get(uids[-1], "it was deleted.")
                self.replaced[f"pod {name} was replaced: {why}"] = time.monotonic()
                if time.monotonic() - self.last_step_at < RECENT_S:
                    self.report(f"Training resumes from step {self.last_step}.")
            uids.append(uid)
        if why := termination_reason(pod):
            self.end_reasons[uid] = why

    def resumed(self, line: str) -> None:
        """Reads a line of the log, which may contain the step that training resumes from."""
        if step := RESUMED.search(line):
            self.last_step, self.last_step_at = step[1], time.monotonic()
            self.report(f"Training resumes from step {step[1]}.")

    def report(self, more: str) -> None:
        replaced = list(self.replaced)
        for one in replaced:  # another thread may add pods meanwhile
            self.replaced.pop(one, None)
        if replaced:
            log.warning("%s %s", " ".join(replaced), more)


def waiting_reasons(pod: Manifest) -> Iterator[str]:
    """Reasons of the scheduler or the kubelet why a pod does not run."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    for item in status.get("conditions") or []:
        if item["type"] == "PodScheduled" and item["status"] == "False":
            yield f"pod {name} cannot be scheduled: {item.get('message', '')}"
    initial = status.get("initContainerStatuses") or []
    for container in [*initial, *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            yield f"pod {name} does not start: {waiting['reason']}: {waiting.get('message', '')}"
    for container in initial:
        started = ((container.get("state") or {}).get("running") or {}).get("startedAt")
        if started and time.time() - parse_time(started) > INITIAL_S:
            yield (
                f"pod {name} stays in init container {container['name']}; `kubectl logs {name} --container "
                f"{container['name']}` says why. The operator's default may wait forever; k8s/operator has one that "
                "does not."
            )


def termination_reasons(pods: list[Manifest]) -> str:
    return "; ".join(f"pod {pod['metadata']['name']}: {why}" for pod in pods if (why := termination_reason(pod)))


def termination_reason(pod: Manifest) -> str:
    """Exit code and reason of the failed container; empty for a pod that runs or has succeeded."""
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        states = (container.get("state") or {}, container.get("lastState") or {})
        ended: Manifest = next((state["terminated"] for state in states if state.get("terminated")), {})
        if ended.get("reason") == "OOMKilled":
            limit = _memory_limit(pod, container["name"])
            return f"{OOM_KILLED} at the pod's limit of {limit}: raise it in PodTemplate {POD_TEMPLATE}."
        if ended.get("exitCode"):
            noted = " ".join(str(ended.get("message") or ended.get("reason") or "").split())
            return noted if noted.startswith("exit code") else f"it ended with exit code {ended['exitCode']} ({noted})."
    for item in (pod.get("status") or {}).get("conditions") or []:
        if item["type"] == "DisruptionTarget" and item["status"] == "True":
            return f"{item.get('reason')}: {item.get('message')}"
    return str((pod.get("status") or {}).get("message") or "")


def _memory_limit(pod: Manifest, container: str) -> str:
    for item in (pod.get("spec") or {}).get("containers") or []:
        if item["name"] == container and "memory" in item.get("resources", {}).get("limits", {}):
            return str(item["resources"]["limits"]["memory"])
    return "its node"


def pod_exit_codes(pods: list[Manifest]) -> Iterator[int]:
    for pod in pods:
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            if code := ((container.get("state") or {}).get("terminated") or {}).get("exitCode"):
                yield int(code)


def parse_time(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
