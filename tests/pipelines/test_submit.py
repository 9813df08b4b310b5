from collections.abc import Iterator

import kfp_server_api
import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from typer.testing import CliRunner

from cli.pipeline import pipeline
from model.errors import OutageError, StageError
from pipelines.follow_run import follow_run, retry_run, step_names
from pipelines.kfp_host import Host
from pipelines.submit import submit_run
from tests.helpers.fake_kfp import FakeKfp, fake_kfp

GIVEN = {
    "source": "s3://x",
    "decoder": "s3://y",
    "image": "registry.example/training:2",
    "code_version": "1",
    "nodes": 2,
}


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKfp]:
    monkeypatch.setattr("pipelines.kfp_host.time.sleep", lambda _seconds: None)  # of all modules
    monkeypatch.setenv("KUBECONFIG", "/none")
    with fake_kfp() as fake:
        yield fake


def start(host: Host, **options: object) -> str:
    return submit_run(host, "pretrain", GIVEN, run_name="pretrain", experiment="mplug-video", **options)  # type: ignore[arg-type]


def test_a_run_contains_pipeline_platform_and_arguments(kfp: FakeKfp) -> None:
    run_id = start(Host(url=kfp.url), service_account="launcher")
    (run,) = kfp.runs
    json_format.ParseDict(run.pipeline_spec["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(run.pipeline_spec["platform_spec"], pipeline_spec_pb2.PlatformSpec())
    assert run.runtime_config["parameters"] == GIVEN
    assert (run.run_id, run.service_account, run.display_name) == (run_id, "launcher", "pretrain")


def test_an_experiment_is_created_once_and_found_on_any_page(kfp: FakeKfp) -> None:
    kfp.experiments = [
        kfp_server_api.V2beta1Experiment(experiment_id=name, display_name=name)
        for name in ("a", "b", "c", "mplug-video")
    ]
    start(Host(url=kfp.url))
    assert kfp.runs[0].experiment_id == "mplug-video"
    start(Host(url=kfp.url, namespace="team"))
    start(Host(url=kfp.url, namespace="team"))
    assert [item.namespace for item in kfp.experiments[4:]] == ["team"]
    assert kfp.runs[1].experiment_id == kfp.runs[2].experiment_id == "e4"


def test_every_request_has_the_authentication_header(kfp: FakeKfp) -> None:
    start(Host(url=kfp.url, token="secret", headers={"kubeflow-userid": "me@example.org"}))
    assert kfp.headers["authorization"] == "Bearer secret"
    assert kfp.headers["kubeflow-userid"] == "me@example.org"


def test_no_cache_disables_caching_at_any_depth(kfp: FakeKfp) -> None:
    start(Host(url=kfp.url), caching=False)
    spec = kfp.runs[0].pipeline_spec["pipeline_spec"]
    tasks = [
        task
        for part in (spec["root"], *spec["components"].values())
        for task in part.get("dag", {}).get("tasks", {}).values()
    ]
    assert len(tasks) > 8
    assert all(task["cachingOptions"] == {} for task in tasks)


def test_waiting_survives_outages_and_ends_with_the_run(kfp: FakeKfp) -> None:
    run_id = start(Host(url=kfp.url))
    kfp.faults = [503, 0, 500, 429, 0, 0]
    follow_run(Host(url=kfp.url), run_id)
    assert kfp.states == ["SUCCEEDED"]


def test_a_failed_run_names_its_steps_and_no_nodes_of_argo(kfp: FakeKfp) -> None:
    run_id = start(Host(url=kfp.url))
    kfp.states = ["RUNNING", "FAILED"]
    kfp.failed_steps = ["train", "gate", "executor(0)", "iteration-iterations(1:1)(0)", "train-driver(0)", "root(0)"]
    with pytest.raises(StageError, match=r"ended as FAILED\. Failed: gate, train\. http://.*/#/runs/details/r0"):
        follow_run(Host(url=kfp.url), run_id)


def test_only_failed_runs_can_be_retried(kfp: FakeKfp) -> None:
    run_id = start(Host(url=kfp.url))
    with pytest.raises(StageError, match=r"400 .*cannot be retried"):
        retry_run(Host(url=kfp.url), run_id)


@pytest.mark.parametrize("version", ["2.4.1", "v2.15.2", "1.8.5"])
def test_an_old_backend_is_rejected_before_submission(kfp: FakeKfp, version: str) -> None:
    kfp.version = version
    with pytest.raises(StageError, match=f"must be 2.16 or newer, {kfp.url} is {version}"):
        start(Host(url=kfp.url))
    assert kfp.runs == kfp.experiments == []


@pytest.mark.parametrize("version", ["", "unknown", "dev"])
def test_an_unknown_backend_version_is_a_warning(kfp: FakeKfp, version: str, caplog: pytest.LogCaptureFixture) -> None:
    kfp.version = version
    assert start(Host(url=kfp.url))
    assert "version of Kubeflow Pipelines is unknown" in caplog.text


def test_the_steps_of_all_pipelines_are_known() -> None:
    assert step_names() >= {"start-run", "download", "shard", "train", "evaluate", "gate", "register", "finish-run"}
    assert not [name for name in step_names() if "loop" in name or "stages" in name]


@pytest.mark.parametrize("code", [401, 403])
def test_a_rejected_request_has_a_remedy(kfp: FakeKfp, code: int) -> None:
    kfp.faults = [code]
    with pytest.raises(StageError, match="Pass --token or --header"):
        start(Host(url=kfp.url))


def test_a_lost_response_does_not_submit_twice(kfp: FakeKfp) -> None:
    """After a lost response, it is unknown whether a run was created."""
    kfp.faults = [0, 0, 0, 503]
    with pytest.raises(OutageError):
        start(Host(url=kfp.url))
    assert kfp.runs == []


def test_submit_prints_the_link_and_rejects_missing_arguments(kfp: FakeKfp) -> None:
    items = [f"{key}={value}" for key, value in GIVEN.items() if key != "code_version"]
    ended = CliRunner().invoke(pipeline, ["submit", "pretrain", *items, "--host", kfp.url, "--wait"])
    assert ended.exit_code == 0, ended.output
    assert f"{kfp.url}/#/runs/details/r0" in ended.output
    assert len(kfp.runs[0].runtime_config["parameters"]["code_version"]) == 12
    fixed = CliRunner().invoke(pipeline, ["submit", "pretrain", *items, "overrides=[name=x]", "--host", kfp.url])
    assert "name is set by the pipeline" in str(fixed.exception)
    incomplete = CliRunner().invoke(pipeline, ["submit", "pretrain", "source=x", "--host", kfp.url])
    assert "decoder must be given" in str(incomplete.exception)
