"""Where the steps of a pipeline run on a cluster, and with what; the local runner leaves all of it aside.

Settings, credentials and user are those of k8s/: see its README. The size of a step is a parameter of its pipeline; the
defaults on a cluster are in the ConfigMap `mplug-pipelines` of its overlay (cluster_defaults.py).
"""

from kfp import kubernetes
from kfp.dsl import PipelineTask
from kfp.dsl.pipeline_channel import PipelineChannel

from components.jobs.run_end import NAMESPACE, WORKFLOW
from model.pipeline_run import RUN_ID

CONFIG, SECRET = "mplug-config", "mplug-s3"
CONFIG_KEYS = ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL")
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
USER = 10001
SIZES = {
    "download_cpu": "4", "download_memory": "8Gi", "shard_cpu": "30", "shard_memory": "60Gi",
    "train_cpu": "500m", "train_memory": "2Gi", "evaluate_cpu": "8", "evaluate_memory": "48Gi",
}  # fmt: skip
"""Defaults where a run names no others, and no cluster does."""


def place(task: PipelineTask, image: str) -> PipelineTask:
    """A step in `image` that reaches the bucket.

    Without `set_retry`: Kubeflow Pipelines merges Argo's policy OnError into it, which repeats no exit code; with the
    policy Always it repeats what is permanent as well. `mplug pipeline retry` repeats a step that has failed.
    """
    task.set_container_image(image)
    task.set_env_variable("HOME", "/tmp")
    task.set_env_variable("MPLUG_CACHE", "/cache")
    kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
    kubernetes.use_field_path_as_env(task, WORKFLOW, "metadata.labels['workflows.argoproj.io/workflow']")
    kubernetes.use_field_path_as_env(task, NAMESPACE, "metadata.namespace")
    kubernetes.use_config_map_as_env(task, CONFIG, {key: key for key in CONFIG_KEYS})
    kubernetes.use_secret_as_env(task, SECRET, {key: key for key in SECRET_KEYS}, optional=True)
    kubernetes.empty_dir_mount(task, volume_name="cache", mount_path="/cache")
    kubernetes.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    return task


def set_resources(task: PipelineTask, *, cpu: str, memory: str, gpus: int | None = None) -> PipelineTask:
    """Cores, memory and GPUs of a step, as values or parameters; its loaders may fill /dev/shm up to its memory."""
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    if gpus is not None:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
    kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")
    # kfp 2.17 does not pass a parameter into a loop that only resources use, and the driver ends with "parent DAG does
    # not have input parameter"
    channels = [value for value in (cpu, memory, gpus) if isinstance(value, PipelineChannel)]
    task.register_pipeline_channels(channels)
    return task


def set_nodes(task: PipelineTask, node_selector: dict[str, str], tolerations: list[dict[str, str]]) -> PipelineTask:
    """On nodes with these labels, whose taints are tolerated."""
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    return task
