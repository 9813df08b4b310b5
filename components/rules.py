"""What must hold of a manifest beyond its schema: the restricted Pod Security Standard, the operator's admission rules,
and what a job of this platform needs in order to end when it should. Facts of training-operator 1.9 in k8s/README.md.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Manifest = Mapping[str, Any]
POD_PATHS: dict[str, tuple[str, ...]] = {
    "Pod": (), "PodTemplate": ("template",), "Deployment": ("spec", "template"), "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"), "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}  # fmt: skip
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SAVING_S = 60
"""What a run takes at most to save when it is asked to end (components.torchrun.SHUTDOWN_S)."""
LONGEST_LABEL = 63


def problems(manifest: Manifest) -> list[str]:
    """Everything that is wrong, as lines that name the place; empty where nothing is."""
    found: list[str] = []
    for place, pod in pods(manifest):
        found += [f"{place}: {problem}" for rule in POD_RULES for problem in rule(pod)]
    if manifest["kind"] == "PyTorchJob":
        found += [problem for rule in JOB_RULES for problem in rule(manifest)]
    if manifest["kind"] == "Job":
        found += _fails_for_good(manifest)
    name = f"{manifest['kind']} {manifest['metadata'].get('name', '?')}"
    return [f"{name}: {problem}" for problem in dict.fromkeys(found)]


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The pod templates of a manifest, each with its place."""
    kind = manifest["kind"]
    if kind in POD_PATHS:
        yield "pod", _at(manifest, *POD_PATHS[kind])
    elif kind == "PyTorchJob":
        for name, replica in _at(manifest, "spec", "pytorchReplicaSpecs").items():
            yield name, replica.get("template", {})
    elif kind == "TrainingRuntime":
        for replicated in _at(manifest, "spec", "template", "spec")["replicatedJobs"]:
            yield replicated["name"], _at(replicated, "template", "spec", "template")


def _at(tree: Manifest, *path: str) -> Manifest:
    for key in path:
        tree = tree.get(key) or {}
    return tree


def _containers(pod: Manifest) -> list[Manifest]:
    spec = _at(pod, "spec")
    return [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]


def _restricted_pod(pod: Manifest) -> Iterator[str]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, of the pod itself."""
    spec = _at(pod, "spec")
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} must be unset (restricted Pod Security Standard)."
    for volume in spec.get("volumes") or []:
        if other := set(volume) - {"name"} - RESTRICTED_VOLUMES:
            yield f"volume {volume['name']} must not be {', '.join(sorted(other))} (restricted Pod Security Standard)."
    if (spec.get("securityContext") or {}).get("sysctls"):
        yield "sysctls must be unset (restricted Pod Security Standard)."


def _restricted_containers(pod: Manifest) -> Iterator[str]:
    """The same, of each container."""
    outer = _at(pod, "spec", "securityContext")
    for container in _containers(pod):
        own = container.get("securityContext") or {}
        both = {**outer, **own}
        dropped = _at(own, "capabilities").get("drop") or []
        added = set(_at(own, "capabilities").get("add") or []) - {"NET_BIND_SERVICE"}
        rules = {
            "privileged must be unset": not own.get("privileged"),
            "allowPrivilegeEscalation must be false": own.get("allowPrivilegeEscalation") is False,
            "capabilities.drop must hold ALL": "ALL" in dropped,
            f"capabilities.add must not hold {', '.join(sorted(added))}": not added,
            "runAsNonRoot must be true": both.get("runAsNonRoot") is True,
            "runAsUser must not be 0": both.get("runAsUser") != 0,
            "seccompProfile.type must be RuntimeDefault or Localhost":
                (both.get("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"),
            "procMount must be unset": own.get("procMount", "Default") == "Default",
        }  # fmt: skip
        for rule, holds in rules.items():
            if not holds:
                yield f"container {container['name']}: {rule} (restricted Pod Security Standard)."


def _hardened(pod: Manifest) -> Iterator[str]:
    """What this platform asks for beyond the standard."""
    spec = _at(pod, "spec")
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: nothing in the pod talks to the API server."
    for container in _containers(pod):
        name, resources = container["name"], container.get("resources") or {}
        if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
            yield f"container {name}: readOnlyRootFilesystem must be true."
        if not {"cpu", "memory"} <= set(resources.get("requests") or {}):
            yield f"container {name}: requests must name cpu and memory, or the scheduler places it blindly."
        if "memory" not in (resources.get("limits") or {}):
            yield f"container {name}: limits must name memory, or one pod takes a node down."
        image = container.get("image") or ""
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"container {name}: image must carry a tag other than latest, or a digest, got {image!r}."
        for variable in container.get("env") or []:
            value = str(variable.get("value") or "")
            if SECRET_NAME.search(variable["name"]) and value and "$(" not in value:
                yield f"container {name}: {variable['name']} must come from a secret, it holds its value."


POD_RULES: tuple[Callable[[Manifest], Iterator[str]], ...] = (_restricted_pod, _restricted_containers, _hardened)


def _admitted(job: Manifest) -> Iterator[str]:
    """What the operator's webhook refuses, and the schema does not know."""
    replicas, name = _at(job, "spec", "pytorchReplicaSpecs"), str(job["metadata"].get("name", ""))
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name must be a DNS-1035 label, got {name!r}."
    for kind in set(replicas) - {"Master", "Worker"}:
        yield f"{kind} is no replica type; there are Master and Worker."
    if "Master" in replicas and replicas["Master"].get("replicas", 1) != 1:
        yield f"Master must have 1 replica, got {replicas['Master']['replicas']}."
    if "Worker" in replicas and replicas["Worker"].get("replicas", 1) < 1:
        yield f"Worker must have 1 replica at least, got {replicas['Worker']['replicas']}."
    for kind, replica in replicas.items():
        containers = _at(replica, "template", "spec").get("containers") or []
        own = [container for container in containers if container.get("name") == "pytorch"]
        if not own:
            yield f"{kind}: one container must be named pytorch."
        elif not own[0].get("image"):
            yield f"{kind}: container pytorch must name its image."


def _meets(job: Manifest) -> Iterator[str]:
    """What keeps the nodes of a job from finding each other."""
    replicas, elastic = _at(job, "spec", "pytorchReplicaSpecs"), _at(job, "spec", "elasticPolicy")
    processes = _at(job, "spec").get("nprocPerNode")
    if not str(processes or "").isdigit():
        yield f"nprocPerNode must be a number in quotes, got {processes!r}: auto is one process per core without a GPU."
    if "Master" not in replicas and not elastic:
        yield "without a Master and without elasticPolicy no pod is told where the first one is."
    if "Master" in replicas and elastic:
        yield "elasticPolicy must go without a Master: the pods meet at the first Worker."
    last = f"{job['metadata'].get('name', '')}-worker-{replicas.get('Worker', {}).get('replicas', 1) - 1}"
    if len(last) > LONGEST_LABEL:
        yield f"metadata.name is too long: its pod {last} has more than {LONGEST_LABEL} characters."
    for kind, replica in replicas.items():
        pod = _at(replica, "template")
        metadata, spec = _at(pod, "metadata"), _at(pod, "spec")
        if (metadata.get("annotations") or {}).get("sidecar.istio.io/inject") != "false":
            yield f'{kind}: annotation sidecar.istio.io/inject must be "false": a mesh\'s proxy never lets the pod end.'
        for container in spec.get("containers") or []:
            for probe in ("readinessProbe", "startupProbe"):
                if container.get(probe):
                    yield (
                        f"{kind}: container {container['name']} must have no {probe}: the operator's services do not "
                        "name pods that are not ready, and a pod is not ready before the others have found it."
                    )
            if (container.get("command") or [""])[0] not in ("mplug", "torchrun"):
                yield f"{kind}: container {container['name']} must start mplug or torchrun: RANK counts pods here."


def _ends(job: Manifest) -> Iterator[str]:
    """What makes a job run for ever, or fail where it could go on."""
    policy = _at(job, "spec", "runPolicy")
    if policy.get("cleanPodPolicy") != "Running":
        yield (
            f"cleanPodPolicy must be Running, got {policy.get('cleanPodPolicy')!r}: None leaves the others running "
            "when one has failed, All removes their logs."
        )
    if policy.get("backoffLimit"):
        yield "backoffLimit must be unset: with ExitCode the operator counts restarts anew with each pod."
    for kind, replica in _at(job, "spec", "pytorchReplicaSpecs").items():
        restart = replica.get("restartPolicy")
        if restart in ("OnFailure", "Always", None):
            yield f"{kind}: restartPolicy must be ExitCode, got {restart!r}: it restarts a wrong configuration forever."
        elif restart == "Never":
            yield f"{kind}: restartPolicy must be ExitCode, got 'Never': the job would not survive the loss of a node."
        yield from (f"{kind}: {problem}" for problem in _survives(replica))


def _survives(replica: Manifest) -> Iterator[str]:
    """What a pod needs to save its run, and to come to an end where saving does not help."""
    spec = _at(replica, "template", "spec")
    grace = spec.get("terminationGracePeriodSeconds", 30)
    if grace <= SAVING_S:
        yield f"terminationGracePeriodSeconds must be more than {SAVING_S}, got {grace}: the last checkpoint needs it."
    memory = {
        volume["name"] for volume in spec.get("volumes") or [] if _at(volume, "emptyDir").get("medium") == "Memory"
    }
    for container in spec.get("containers") or []:
        if container.get("name") != "pytorch":
            continue
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts") or []}
        if mounts.get("/dev/shm") not in memory:
            yield "/dev/shm must be an emptyDir of medium Memory: a container's own has 64 MB, and loaders die of it."
        arguments = [*(container.get("command") or []), *(container.get("args") or [])]
        bounds = [item.partition("=")[2] for item in arguments if item.startswith("checkpoint.max_attempts=")]
        if arguments[:2] != ["mplug", "train"] or any(int(bound or 0) > 100 for bound in bounds):
            yield (
                "this job restarts forever on OOM: 137 counts as worth a restart, and nothing counts them. `mplug "
                "train` does (checkpoint.max_attempts, at most 100 here)."
            )


def _fails_for_good(job: Manifest) -> Iterator[str]:
    permanent = {
        code
        for rule in _at(job, "spec", "podFailurePolicy").get("rules") or []
        if rule.get("action") == "FailJob" and _at(rule, "onExitCodes").get("operator") == "In"
        for code in rule["onExitCodes"]["values"]
    }
    if not {1, 2, 3, 4} <= permanent:
        yield "podFailurePolicy must end the job on exit codes 1 to 4: they will be the same after a restart."


JOB_RULES: tuple[Callable[[Manifest], Iterator[str]], ...] = (_admitted, _meets, _ends)
