"""Where the steps of a pipeline run on a cluster, and with what; the local runner leaves all of it aside.

Settings, credentials and user are those of k8s/: see its README.
"""

from kfp import kubernetes
from kfp.dsl import PipelineTask

CONFIG, SECRET = "mplug-config", "mplug-s3"
CONFIG_KEYS = ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL")
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
USER = 10001
retries = 3
"""Of a step that has failed; the local runner's user is there, and does not wait for what will fail again."""


def place(task: PipelineTask, image: str) -> PipelineTask:
    """A step in `image` that reaches the bucket, and is tried again where trying again may help."""
    task.set_container_image(image)
    if retries:
        # the backend leaves it out inside loops (kubeflow/pipelines#13897); there, steps try again what they call.
        # Argo counts backoff_max_duration from the first start, and ends what runs longer: it bounds nothing here
        task.set_retry(num_retries=retries, backoff_duration="60s", backoff_factor=2, backoff_max_duration="2592000s")
    task.set_env_variable("HOME", "/tmp")
    task.set_env_variable("MPLUG_CACHE", "/cache")
    kubernetes.use_config_map_as_env(task, CONFIG, {key: key for key in CONFIG_KEYS})
    kubernetes.use_secret_as_env(task, SECRET, {key: key for key in SECRET_KEYS}, optional=True)
    kubernetes.empty_dir_mount(task, volume_name="cache", mount_path="/cache")
    kubernetes.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    return task


def give(task: PipelineTask, *, cpu: str, memory: str, shm: str = "") -> PipelineTask:
    """Cores and memory, and of it what goes through /dev/shm."""
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    if shm:
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=shm)
    return task


def on_gpu(
    task: PipelineTask, gpus: int, node_selector: dict[str, str], tolerations: list[dict[str, str]]
) -> PipelineTask:
    """Steps that compute: so many GPUs, on nodes with these labels, whose taints are tolerated."""
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    return give(task, cpu="8", memory="48Gi", shm="16Gi")
