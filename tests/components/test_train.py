"""The training step, with a cluster in memory instead of the operator."""

import threading
from pathlib import Path

from kfp.dsl import Model

from model.config.load import load_config
from model.config.schema import count_in_steps
from model.data.shards.reader import read_dataset_info
from model.training import attempts
from tests.helpers.fake_kube import FakeKube
from tests.helpers.pod_templates import CPU


def test_a_pipeline_step_trains_on_the_cluster(kube: FakeKube, shards: dict[str, str], tmp_path: Path) -> None:
    from components.train import train

    kube.put("podtemplates", CPU)

    def act() -> None:
        """Acts as the operator and the pods."""
        (created,) = kube.wait_for("pytorchjobs")
        container = created["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
        config = load_config(container["args"][1], container["args"][2:])
        config = count_in_steps(config, read_dataset_info(config.data.shards)["clips"]["train"])
        attempts.finish_attempt(attempts.run_folder(config), attempts.Attempt(key="k", model="the/model"))
        kube.conclude("pytorchjobs", created["metadata"]["name"], "Succeeded")

    threading.Thread(target=act, daemon=True).start()
    uri = train.python_func(
        config="tiny_pretraining",
        shards=shards,
        root=str(tmp_path),
        decoder="s3://d",
        tokenizers={},
        pretrained="",
        init="scratch",
        nodes=2,
        processes=0,
        image="registry.example/training:2",
        namespace="mplug",
        deadline_hours=1.0,
        overrides=["training.steps=9", "optim.warmup_steps=1"],
        tracking={"uri": "http://m", "pipeline": "r1"},
        code_version="abc",
        model=(artifact := Model(uri="")),
    )
    assert uri == artifact.uri == "the/model"
    (job,) = kube.wait_for("pytorchjobs")
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example/training:2"
    assert {"tracking.uri=http://m", "tracking.pipeline=r1", "code_version=abc", f"output={tmp_path}"} <= set(
        container["args"]
    )
    assert job["spec"]["runPolicy"]["activeDeadlineSeconds"] == 3600
