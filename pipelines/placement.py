"""Kubernetes settings of pipeline steps: image, environment, resources, nodes. The local runner ignores them.

Configuration, credentials and user are those of k8s/ (see its README). The resources of a step are parameters of its
pipeline, with defaults in the ConfigMap `mplug-pipelines` of an overlay (cluster_defaults.py).
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


def place(task: PipelineTask, image: str) -> PipelineTask:
    """Runs a step in `image`, with access to the bucket. Steps have no retries (model.restart_policy.STEP_RETRIES)."""
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
    """Sets CPU, memory and GPUs of a step, and mounts /dev/shm for its loaders, up to its memory."""
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    if gpus is not None:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
    kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")
    # kfp 2.17 does not pass a parameter into a loop if only resources use it; the driver then fails with "parent DAG
    # does not have input parameter"
    task.register_pipeline_channels([value for value in (cpu, memory, gpus) if isinstance(value, PipelineChannel)])
    return task


def set_nodes(task: PipelineTask, node_selector: dict[str, str], tolerations: list[dict[str, str]]) -> None:
    """Sets node selector and tolerations of a step."""
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
