"""Sends a compiled pipeline to Kubeflow Pipelines: `mplug pipeline submit`."""

from collections.abc import Mapping
from typing import Any

import kfp_server_api

from pipelines.catalog import compiled_documents
from pipelines.kfp_host import Host, call_api, check_version


def submit_run(
    host: Host,
    name: str,
    arguments: Mapping[str, Any],
    *,
    run_name: str,
    experiment: str,
    service_account: str = "",
    caching: bool = True,
) -> str:
    """Starts a run of pipeline `name` and returns its ID."""
    check_version(host)
    api = host.api()
    spec, platform = compiled_documents(name)
    if not caching:
        _without_cache(spec)
    run = kfp_server_api.V2beta1Run(
        display_name=run_name,
        experiment_id=_experiment(api, experiment, host.namespace),
        pipeline_spec={"pipeline_spec": spec, "platform_spec": platform},
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(arguments)),
        service_account=service_account or None,
    )
    # this call is not repeated: if its response was lost, a second call would start a second run
    return call_api(kfp_server_api.RunServiceApi(api).run_service_create_run, run=run, patience_s=0).run_id


def _experiment(api: kfp_server_api.ApiClient, name: str, namespace: str) -> str:
    """ID of the experiment of this name, which is created if it does not exist."""
    service = kfp_server_api.ExperimentServiceApi(api)
    token: str | None = ""
    while token is not None:
        page = call_api(
            service.experiment_service_list_experiments, page_size=100, page_token=token, namespace=namespace or None
        )
        for found in page.experiments or []:
            if found.display_name == name:
                return str(found.experiment_id)
        token = page.next_page_token or None
    wanted = kfp_server_api.V2beta1Experiment(display_name=name, namespace=namespace or None)
    return str(call_api(service.experiment_service_create_experiment, experiment=wanted).experiment_id)


def _without_cache(spec: dict[str, Any]) -> None:
    """Disables the cache of all tasks on all levels. The switch of the backend only covers the outermost level."""
    parts = [spec["root"], *spec.get("components", {}).values()]
    for part in parts:
        for task in part.get("dag", {}).get("tasks", {}).values():
            task["cachingOptions"] = {}
