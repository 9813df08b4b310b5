"""Rules for manifests beyond their schemas.

They cover the restricted Pod Security Standard (pod_security.py), the admission of training-operator, and requirements
of this platform. A problem names the source of the rule in brackets; rules of this platform have none.
"""

import re
from collections.abc import Iterator

from components.jobs.pod_security import Manifest, containers, violations

POD_PATHS: dict[str, tuple[str, ...]] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SAVING_S = 60
"""Maximum time of a run to save a checkpoint after SIGTERM (model.training.launch.SHUTDOWN_S)."""
LONGEST_LABEL = 63
ADMISSION = "(admission of training-operator 1.9)"
MANAGERS = ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue")


def problems(manifest: Manifest) -> list[str]:
    """All problems of a manifest, one line each, with their location."""
    found: list[str] = []
    for place, pod in pods(manifest):
        found += [f"{place}: {problem}" for problem in (*violations(pod), *_hardened(pod))]
    if manifest["kind"] == "PyTorchJob":
        found += [*_admitted(manifest), *_meets(manifest), *_ends(manifest)]
    if manifest["kind"] == "TrainJob":
        found += _fits_jobset(manifest)
    if manifest["kind"] == "Job":
        found += _fails_for_good(manifest)
    name = f"{manifest['kind']} {manifest['metadata'].get('name', '?')}"
    return [f"{name}: {problem}" for problem in dict.fromkeys(found)]


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The pod templates of a manifest with their locations."""
    kind = manifest["kind"]
    if kind in POD_PATHS:
        yield "pod", _at(manifest, *POD_PATHS[kind])
    elif kind == "PyTorchJob":
        for name, replica in _at(manifest, "spec", "pytorchReplicaSpecs").items():
            yield name, _at(replica, "template")
    elif kind == "TrainingRuntime":
        for replicated in _at(manifest, "spec", "template", "spec")["replicatedJobs"]:
            yield replicated["name"], _at(replicated, "template", "spec", "template")


def _at(tree: Manifest, *path: str) -> Manifest:
    for key in path:
        tree = (tree or {}).get(key) or {}
    return tree


def _hardened(pod: Manifest) -> Iterator[str]:
    """Requirements of this platform on pods."""
    spec = _at(pod, "spec")
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: nothing in the pod talks to the API server."
    for container in containers(pod):
        name, resources = container.get("name"), container.get("resources") or {}
        if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True:
            yield f"container {name}: readOnlyRootFilesystem must be true."
        if not {"cpu", "memory"} <= set(resources.get("requests") or {}):
            yield f"container {name}: requests must set cpu and memory, which the scheduler needs."
        if "memory" not in (resources.get("limits") or {}):
            yield f"container {name}: limits must set memory, or one pod can exhaust a node."
        image = container.get("image") or ""
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"container {name}: image must have a tag other than latest, or a digest, got {image!r}."
        for variable in container.get("env") or []:
            value = str(variable.get("value") or "")
            if SECRET_NAME.search(variable.get("name", "")) and value and "$(" not in value:
                yield f"container {name}: {variable.get('name')} must come from a secret, not from the manifest."


def _admitted(job: Manifest) -> Iterator[str]:
    yield from (f"{rule} {ADMISSION}." for rule in _refused(job))


def _refused(job: Manifest) -> Iterator[str]:
    """Rules of the operator's webhook and of the field types in its CRD."""
    spec, name = _at(job, "spec"), str(job["metadata"].get("name", ""))
    replicas, elastic = _at(spec, "pytorchReplicaSpecs"), spec.get("elasticPolicy")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_LABEL:
        yield f"metadata.name must be a DNS-1035 label of at most {LONGEST_LABEL} characters, got {name!r}"
    if spec.get("pytorchReplicaSpecs") is None:
        yield "pytorchReplicaSpecs must be given"
    if not isinstance(spec.get("nprocPerNode", ""), str):
        yield f"nprocPerNode must be a string, got {spec['nprocPerNode']!r}"
    if elastic is not None and "Worker" not in replicas:
        yield "elasticPolicy requires a Worker"
    if elastic and elastic.get("nProcPerNode") is not None and spec.get("nprocPerNode") is not None:
        yield "elasticPolicy.nProcPerNode and nprocPerNode must not both be given"
    manager = _at(spec, "runPolicy").get("managedBy")
    if manager not in (None, *MANAGERS):
        yield f"runPolicy.managedBy must be one of {', '.join(MANAGERS)}, got {manager!r}"
    for kind, replica in replicas.items():
        yield from (f"{kind}: {rule}" for rule in _refused_replica(kind, replica or {}))


def _refused_replica(kind: str, replica: Manifest) -> Iterator[str]:
    if kind not in ("Master", "Worker"):
        yield "must be a replica type, Master or Worker"
    count = replica.get("replicas")
    if count is not None and not isinstance(count, int):
        yield f"replicas must be a number, got {count!r}"
    elif kind == "Master" and count != 1:
        yield f"replicas must be 1, got {count}"
    elif kind != "Master" and count is not None and count < 1:
        yield f"replicas must be at least 1, got {count}"
    own = _at(replica, "template", "spec").get("containers") or []
    if not any(container.get("name") == "pytorch" for container in own):
        yield "one container must be named pytorch"
    for container in own:
        if not container.get("image"):
            yield f"container {container.get('name')} must name its image"


def _meets(job: Manifest) -> Iterator[str]:
    """Settings that prevent the nodes of a job from finding each other."""
    replicas, elastic = _at(job, "spec", "pytorchReplicaSpecs"), _at(job, "spec", "elasticPolicy")
    processes = _at(job, "spec").get("nprocPerNode")
    if not str(processes or "").isdigit():
        yield f"nprocPerNode must be a number in quotes, got {processes!r}: auto is one process per core without a GPU."
    if "Master" not in replicas and not elastic:
        yield "without a Master or elasticPolicy, pods do not know the address of the first pod."
    if "Master" in replicas and elastic:
        yield "elasticPolicy must be used without a Master: pods join at the first Worker."
    workers = _at(replicas, "Worker").get("replicas") or 1
    last = f"{job['metadata'].get('name', '')}-worker-{workers - 1 if isinstance(workers, int) else workers}"
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
                        f"{kind}: container {container.get('name')} must have no {probe}: the operator's services do "
                        "not name pods that are not ready, and a pod is not ready before it has been found."
                    )
            if (container.get("command") or [""])[0] not in ("mplug", "torchrun"):
                yield f"{kind}: container {container.get('name')} must start mplug or torchrun: RANK counts pods here."


def _ends(job: Manifest) -> Iterator[str]:
    """Settings that let a job run forever, or fail when it could resume."""
    policy = _at(job, "spec", "runPolicy")
    if policy.get("cleanPodPolicy") != "Running":
        yield (
            f"cleanPodPolicy must be Running, got {policy.get('cleanPodPolicy')!r}: None keeps other pods running "
            "after a failure, All deletes their logs."
        )
    if policy.get("backoffLimit"):
        yield "backoffLimit must be unset: with ExitCode the operator counts the restarts of each pod from zero."
    for kind, replica in _at(job, "spec", "pytorchReplicaSpecs").items():
        restart = (replica or {}).get("restartPolicy")
        if restart in ("OnFailure", "Always", None):
            yield f"{kind}: restartPolicy must be ExitCode, got {restart!r}: it restarts a wrong configuration forever."
        elif restart == "Never":
            yield f"{kind}: restartPolicy must be ExitCode, got 'Never': the job would not survive the loss of a node."
        yield from (f"{kind}: {problem}" for problem in _survives(replica))


def _survives(replica: Manifest) -> Iterator[str]:
    """Requirements of a pod for saving its run, and for ending after too many restarts."""
    spec = _at(replica, "template", "spec")
    grace = spec.get("terminationGracePeriodSeconds") or 30
    if grace <= SAVING_S:
        yield f"terminationGracePeriodSeconds must be more than {SAVING_S}, got {grace}: the last checkpoint needs it."
    memory = {
        volume.get("name") for volume in spec.get("volumes") or [] if _at(volume, "emptyDir").get("medium") == "Memory"
    }
    for container in spec.get("containers") or []:
        if container.get("name") != "pytorch":
            continue
        mounts = {mount.get("mountPath"): mount.get("name") for mount in container.get("volumeMounts") or []}
        if mounts.get("/dev/shm") not in memory:
            yield "/dev/shm must be an emptyDir of medium Memory: the default of 64 MB is too small for loaders."
        arguments = [*(container.get("command") or []), *(container.get("args") or [])]
        bounds = [item.partition("=")[2] for item in arguments if item.startswith("checkpoint.max_attempts=")]
        if arguments[:2] != ["mplug", "train"] or any(not bound.isdigit() or int(bound) > 100 for bound in bounds):
            yield (
                "this job restarts forever on OOM: 137 is restartable, and nothing counts the restarts. `mplug train` "
                "counts them (checkpoint.max_attempts, at most 100 here)."
            )


def longest_trainjob_name(nodes: int) -> int:
    """Rules of JobSet, which refuses a job if the names of its pods, <name>-node-0-<index>-<five letters>, are too long
    for a label."""
    return LONGEST_LABEL - len(f"-node-0-{nodes - 1}-abcde")


def _fits_jobset(job: Manifest) -> Iterator[str]:
    name, nodes = job["metadata"].get("name", ""), _at(job, "spec", "trainer").get("numNodes") or 1
    if len(name) > longest_trainjob_name(nodes):
        yield f"metadata.name must have at most {longest_trainjob_name(nodes)} characters for JobSet, got {len(name)}."


def _fails_for_good(job: Manifest) -> Iterator[str]:
    permanent = {
        code
        for rule in _at(job, "spec", "podFailurePolicy").get("rules") or []
        if rule.get("action") == "FailJob" and _at(rule, "onExitCodes").get("operator") == "In"
        for code in rule["onExitCodes"]["values"]
    }
    if not {1, 2, 3, 4} <= permanent:
        yield "podFailurePolicy must fail the job on exit codes 1 to 4, which are permanent."
