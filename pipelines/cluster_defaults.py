"""Defaults of pipeline parameters on a cluster, read from the cluster or from an overlay of k8s/."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.jobs.client import Cluster
from components.jobs.manifests import POD_TEMPLATE, find_container, overlay_documents
from model.errors import ConfigError, OutageError, StageError
from pipelines.catalog import parse_arguments, pipeline_parameters
from pipelines.local import code_version

log = logging.getLogger("mplug")
CONFIG, DEFAULTS = "mplug-config", "mplug-pipelines"
ADDRESSES = {"root": "MPLUG_ROOT", "tracking_uri": "MLFLOW_TRACKING_URI"}
"""Parameters, and their keys in the ConfigMap with the addresses of a cluster."""
PATIENCE_S = 5.0


def arguments_on_cluster(name: str, items: Sequence[str], overlay: Path | None = None) -> dict[str, Any]:
    """All arguments of pipeline `name` that differ from the compiled defaults: given ones, and defaults of the
    cluster."""
    given, known = parse_arguments(name, items), pipeline_parameters(name)
    values = {"code_version": code_version(), **cluster_defaults(name, given.get("namespace", ""), overlay), **given}
    if "cpu_image" in known and "image" in given and "cpu_image" not in given:
        values["cpu_image"] = given["image"]
    return values


def cluster_defaults(name: str, namespace: str, overlay: Path | None) -> dict[str, Any]:
    """Arguments of pipeline `name` from an overlay, or else from the namespace of the current context.

    Empty, with a warning, if no cluster is reachable. Raises ConfigError for a value of the wrong type.
    """
    try:
        found, namespace = _of_overlay(overlay) if overlay else _of_cluster(namespace)
    except (StageError, OutageError) as error:
        log.warning("the defaults of the cluster cannot be read, using those of the pipeline: %s", error)
        return {}
    addresses, defaults = found[CONFIG]["data"], found[DEFAULTS]["data"]
    known = pipeline_parameters(name)
    image = find_container(found[POD_TEMPLATE]["template"]).get("image", "")
    values = {key: addresses[source] for key, source in ADDRESSES.items() if source in addresses}
    values |= {"namespace": namespace, "image": image, "cpu_image": image, **defaults}
    return parse_arguments(name, [f"{key}={value}" for key, value in values.items() if key in known and value])


def _of_cluster(namespace: str) -> tuple[dict[str, Any], str]:
    cluster = Cluster(namespace, patience_s=PATIENCE_S)
    path = f"/api/v1/namespaces/{cluster.namespace}/configmaps"
    found = {name: cluster.read(f"{path}/{name}") for name in (CONFIG, DEFAULTS)}
    return {**found, POD_TEMPLATE: cluster.pod_template(POD_TEMPLATE)}, cluster.namespace


def _of_overlay(overlay: Path) -> tuple[dict[str, Any], str]:
    wanted = {(CONFIG, "ConfigMap"), (DEFAULTS, "ConfigMap"), (POD_TEMPLATE, "PodTemplate")}
    found = {
        document["metadata"]["name"]: document
        for document in overlay_documents(overlay)
        if (document["metadata"]["name"], document["kind"]) in wanted
    }
    if missing := {name for name, _ in wanted} - set(found):
        raise ConfigError(f"{overlay} must hold {', '.join(sorted(missing))}, as the overlays of k8s/ do.")
    return found, found[POD_TEMPLATE]["metadata"].get("namespace", "default")
