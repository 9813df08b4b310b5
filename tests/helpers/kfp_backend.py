"""A double of Kubeflow Pipelines 2.17 on Argo that executes compiled pipelines. The steps are real.

It has drivers that resolve inputs and reject unknown ones; pods in a Kubernetes API in memory, with the requests of a
step and a node that may be too small; a launcher that exits with 1 for any failed command, and with 143 half a second
after a signal; the retry policy OnError, which repeats no exit code; one exit handler; and retries of failed steps.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.jobs.client import parse_amount
from tests.helpers.fake_kube import FakeKube

Tree = dict[str, Any]
NAMESPACE = "kubeflow"
CUT_OFF_S = 0.4
PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")


class NodeFailedError(Exception):
    """A node of the workflow has failed, so later nodes do not run."""


@dataclass
class Run:
    """One run: its workflow in the cluster, and the thread that executes it."""

    run_id: str
    spec: Tree
    platform: Tree
    parameters: Tree
    state: str = "PENDING"
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: dict[str, Tree] = field(default_factory=dict)
    """Outputs of successful nodes by name; a retry does not repeat them."""
    handled: set[str] = field(default_factory=set)
    """Exit handlers that have run; a retry does not repeat them."""

    @property
    def workflow(self) -> str:
        return f"wf-{self.run_id}"


class Backend:
    def __init__(self, kube: FakeKube, folder: Path, cores: float) -> None:
        self.kube, self.folder, self.cores = kube, folder, cores
        self.runs: dict[str, Run] = {}
        self.cache: dict[str, Tree] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    # the API

    def start(self, run_id: str, spec: Tree, platform: Tree, parameters: Tree) -> None:
        run = self.runs[run_id] = Run(run_id, spec, platform, parameters)
        labels = {"pipeline/runid": run_id}
        self.kube.put(
            "workflows",
            {"metadata": {"name": run.workflow, "labels": labels}, "spec": {}, "status": {"nodes": {}}},
            NAMESPACE,
        )
        threading.Thread(target=self._go, args=(run,), daemon=True).start()

    def terminate(self, run_id: str) -> None:
        run = self.runs[run_id]
        run.state = "CANCELING"
        with self.kube.changed:
            self.kube.find(NAMESPACE, "workflows", run.workflow)["spec"]["activeDeadlineSeconds"] = 0
        run.cancelled.set()
        for pod in [name for name in self.processes if name.startswith(run.workflow)]:
            self.drain(pod)

    def retry(self, run_id: str) -> bool:
        """Whether there was a failed step to retry."""
        run = self.runs[run_id]
        if run.state != "FAILED":
            return False
        run.cancelled.clear()
        with self.kube.changed:
            workflow = self.kube.find(NAMESPACE, "workflows", run.workflow)
            workflow["spec"].pop("activeDeadlineSeconds", None)
            nodes = workflow["status"]["nodes"]
            workflow["status"]["nodes"] = {key: node for key, node in nodes.items() if node["phase"] == "Succeeded"}
        threading.Thread(target=self._go, args=(run,), daemon=True).start()
        return True

    def task_details(self, run_id: str) -> list[tuple[str, str]]:
        """(display name, state) of every node, with the names of Argo, without reasons or pods."""
        phases = {"Succeeded": "SUCCEEDED", "Running": "RUNNING", "Pending": "PENDING", "Failed": "FAILED"}
        nodes = self.kube.find(NAMESPACE, "workflows", self.runs[run_id].workflow)["status"]["nodes"]
        return [(node["displayName"], phases[node["phase"]]) for node in list(nodes.values())]

    def drain(self, pod: str) -> None:
        """Signals all processes of the pod at once; the launcher exits, and the container with it."""
        process = self.processes[pod]
        try:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(CUT_OFF_S)
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    # the workflow

    def _go(self, run: Run) -> None:
        run.state = "RUNNING"
        root = run.spec["root"]
        defaults = {key: item.get("defaultValue") for key, item in root["inputDefinitions"]["parameters"].items()}
        try:
            self._dag(run, root, {**defaults, **run.parameters}, f"{run.workflow}.root(0)")
            run.state = "SUCCEEDED"
        except NodeFailedError:
            run.state = "FAILED"  # also for a cancelled run: "retry exceeded workflow deadline"

    def _dag(self, run: Run, component: Tree, inputs: Tree, path: str) -> Tree:
        """Runs the tasks of a component in the order of their dependencies, and returns the outputs."""
        tasks, results, failed = component["dag"]["tasks"], dict[str, Tree](), set[str]()
        handlers = {name for name, task in tasks.items() if "triggerPolicy" in task}
        left = [name for name in tasks if name not in handlers]
        while left:
            name = next(name for name in left if not dependencies(tasks[name]) & set(left))
            left.remove(name)
            try:
                if dependencies(tasks[name]) & failed or run.cancelled.is_set():
                    raise NodeFailedError(name)
                results[name] = self._task(run, name, tasks[name], component, inputs, results, f"{path}.{name}")
            except NodeFailedError:
                failed.add(name)
        for name in handlers:
            if f"{path}.{name}" not in run.handled:
                run.handled.add(f"{path}.{name}")
                self._task(run, name, tasks[name], component, inputs, results, f"{path}.{name}", is_handler=True)
        if failed:
            raise NodeFailedError(path)
        wanted = component["dag"].get("outputs", {}).get("parameters", {})
        chosen = {key: item["valueFromParameter"] for key, item in wanted.items()}
        return {key: results[item["producerSubtask"]][item["outputParameterKey"]] for key, item in chosen.items()}

    def _task(
        self,
        run: Run,
        name: str,
        task: Tree,
        around: Tree,
        inputs: Tree,
        results: Tree,
        path: str,
        *,
        is_handler: bool = False,
    ) -> Tree:
        if path in run.done:
            return run.done[path]
        component = run.spec["components"][task["componentRef"]["name"]]
        self._node(run, path, name, "Retry", "Running")
        try:
            given = self._resolved(run, task, around, inputs, results, path)
            if "parameterIterator" in task:
                outputs = self._loop(run, task, component, given, path)
            elif "dag" in component:
                outputs = self._dag(run, component, given, f"{path}(0)")
            else:
                outputs = self._step(run, task, component, given, path, is_handler=is_handler)
        except NodeFailedError:
            self._node(run, path, name, "Retry", "Failed")
            raise
        run.done[path] = outputs
        self._node(run, path, name, "Retry", "Succeeded")
        return outputs

    def _loop(self, run: Run, task: Tree, component: Tree, given: Tree, path: str) -> Tree:
        iterator = task["parameterIterator"]
        items = iterator["items"]
        values = given[items["inputParameter"]] if "inputParameter" in items else json.loads(items["raw"])
        outputs = [
            self._dag(run, component, {**given, iterator["itemInput"]: value}, f"{path}(0).iteration({number}:1)(0)")
            for number, value in enumerate(values)
        ]
        return {key: [item[key] for item in outputs] for key in outputs[0]}

    def _resolved(self, run: Run, task: Tree, around: Tree, inputs: Tree, results: Tree, path: str) -> Tree:
        """The driver: resolves the inputs of a task and of its platform configuration."""
        known = around.get("inputDefinitions", {}).get("parameters", {})
        found: Tree = {}
        component = run.spec["components"][task["componentRef"]["name"]]
        label = component.get("executorLabel", "")
        platform = run.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].get(label, {})
        asked = re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps([task, platform]))
        if unknown := [name for name in asked if name not in known]:
            message = f"parent DAG does not have input parameter {unknown[0]}"
            self._node(
                run,
                f"{path}-driver(0)",
                f"{path.rpartition('.')[2]}-driver(0)",
                "Pod",
                "Failed",
                f"Error (exit code 1): {message}",
            )
            raise NodeFailedError(message)
        for key, item in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in item:
                found[key] = inputs[item["componentInputParameter"]]
            elif "taskOutputParameter" in item:
                source = item["taskOutputParameter"]
                found[key] = results[source["producerTask"]][source["outputParameterKey"]]
            else:
                found[key] = item["runtimeValue"]["constant"]
        found = {key: inserted(value, found) for key, value in found.items()}
        defaults = component.get("inputDefinitions", {}).get("parameters", {})
        return {**{key: item["defaultValue"] for key, item in defaults.items() if "defaultValue" in item}, **found}

    def _node(self, run: Run, path: str, display: str, kind: str, phase: str, message: str = "") -> None:
        with self.kube.changed:
            nodes = self.kube.find(NAMESPACE, "workflows", run.workflow)["status"]["nodes"]
            nodes[path] = {
                "id": path,
                "name": path,
                "displayName": display,
                "type": kind,
                "phase": phase,
                "message": message,
            }

    # a pod

    def _step(self, run: Run, task: Tree, component: Tree, given: Tree, path: str, *, is_handler: bool) -> Tree:
        container = run.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        key = json.dumps([container["command"], container.get("args"), given], sort_keys=True)
        if task.get("cachingOptions", {}).get("enableCache") and key in self.cache:
            return self.cache[key]
        pod, node = f"{run.workflow}-{len(self.kube.logs)}-{os.urandom(2).hex()}", f"{path}(0).executor(0)"
        resources = inserted(container.get("resources", {}), given)
        cores = parse_amount(resources.get("resourceCpuRequest", "100m"))
        if cores > self.cores:
            message = "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu."
            self._node(run, node, "executor(0)", "Pod", "Pending", message)
            run.cancelled.wait()
            self._node(run, node, "executor(0)", "Pod", "Failed", "workflow shutdown with strategy: Terminate")
            raise NodeFailedError(node)
        self._node(run, node, "executor(0)", "Pod", "Running")
        code, outputs, message = self._container(run, component, container, given, pod, node, resources)
        if code:
            cut_off = code == -signal.SIGTERM or code == -signal.SIGKILL or (run.cancelled.is_set() and not is_handler)
            message = "Error (exit code 143)" if cut_off else f"Error (exit code 1): {message}"
            self._node(run, node, "executor(0)", "Pod", "Failed", message)
            raise NodeFailedError(node)
        self._node(run, node, "executor(0)", "Pod", "Succeeded")
        self.cache[key] = outputs
        return outputs

    def _container(
        self, run: Run, component: Tree, container: Tree, given: Tree, pod: str, node: str, resources: Tree
    ) -> tuple[int, Tree, str]:
        """Exit code, outputs, and termination message of the container."""
        folder = self.folder / pod
        folder.mkdir(parents=True)
        for name in ("termination", "log"):
            (folder / name).touch()
        labels = {"pipeline/runid": run.run_id, "workflows.argoproj.io/workflow": run.workflow}
        self.kube.put(
            "pods",
            {
                "metadata": {"name": pod, "labels": labels, "annotations": {"workflows.argoproj.io/node-name": node}},
                "spec": {"containers": [{"name": "main", "resources": resources}]},
                "status": {"phase": "Running"},
            },
            NAMESPACE,
        )
        platform = run.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][component["executorLabel"]]
        environment = {**os.environ, "MPLUG_TERMINATION_LOG": str(folder / "termination")}
        environment |= {item["name"]: item["value"] for item in container.get("env", [])}
        environment |= {"HOME": str(folder), "MPLUG_CACHE": str(folder / "cache")}  # the volumes
        for item in platform.get("fieldPathAsEnv", []):
            path = item["fieldPath"]
            environment[item["name"]] = NAMESPACE if path == "metadata.namespace" else labels[path.split("'")[1]]
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        asked = executor_input(component, given, folder)
        command = [part.replace("{{$}}", json.dumps(asked)) for part in container["command"] + container["args"]]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
            self.processes[pod] = process
            code = process.wait()
            del self.processes[pod]
        self.kube.log(pod, *(folder / "log").read_text(errors="replace").splitlines())
        if code:
            return code, {}, (folder / "termination").read_text()
        outputs = json.loads((folder / "output.json").read_text()) if (folder / "output.json").exists() else {}
        return 0, outputs.get("parameterValues", {}), ""


def dependencies(task: Tree) -> set[str]:
    produced = re.findall(r'"producerTask": "([^"]+)"', json.dumps(task.get("inputs", {})))
    return {*task.get("dependentTasks", []), *produced}


def inserted(value: Any, inputs: Tree) -> Any:
    """`value` with its input placeholders replaced."""
    if isinstance(value, dict):
        return {key: inserted(item, inputs) for key, item in value.items()}
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda match: str(inputs[match[1]]), value)
    return value


def executor_input(component: Tree, given: Tree, folder: Path) -> Tree:
    outputs = component.get("outputDefinitions", {})
    known = component.get("inputDefinitions", {}).get("parameters", {})
    artifacts = {
        key: {"artifacts": [{"name": key, "uri": str(folder / key), "type": item["artifactType"], "metadata": {}}]}
        for key, item in outputs.get("artifacts", {}).items()
    }
    return {
        "inputs": {"parameterValues": {key: value for key, value in given.items() if key in known}},
        "outputs": {
            "parameters": {key: {"outputFile": str(folder / f"out-{key}")} for key in outputs.get("parameters", {})},
            "artifacts": artifacts,
            "outputFile": str(folder / "output.json"),
        },
    }
