"""Random faults in the processes, servers and disks of a run, and their effect on the result."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil

from cli.services import BUCKET, object_storage, run_process
from cli.services import local_services as service_settings
from model import storage
from model.errors import TERMINATED

KILLS, STEPS, EVERY = 30, 80, 10
MPLUG = str(Path(sys.executable).with_name("mplug"))
KINDS = ("SIGKILL", "SIGKILL", "SIGTERM", "S3 down for 20 s", "MLflow down for 60 s", "cache disk full for 15 s")
CACHE_BYTES = 64 * 2**20
Run = subprocess.Popen[str]


class Rig:
    """An S3 server, an MLflow server, a small disk for the cache, and runs that use all three."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder, self.overrides = folder, overrides
        self.mlflow_port = service_settings(folder / "s3").mlflow_port
        self.tracking = f"http://127.0.0.1:{self.mlflow_port}"
        self.cache = folder / "cache"
        self.cache.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={CACHE_BYTES}", "tmpfs", str(self.cache)], check=True)
        os.environ["MPLUG_CACHE"] = str(self.cache)

    def mlflow(self) -> Any:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.mlflow_port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
        ]
        return run_process(command, self.folder / "mlflow.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})

    def start(self, trial: int) -> Run:
        settings = [
            *self.overrides,
            f"output=s3://{BUCKET}/root",
            f"training.steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "optim.warmup_steps=2",
            "training.log_every=1",
            "data.batch_size=16",
            f"trial={trial}",
            "data.workers=1",
            "training.precision=fp32",
            f"tracking.uri={self.tracking}",
            "watchdog.silence_s=10",
        ]
        return subprocess.Popen(
            [MPLUG, "train", "tiny_pretraining", "--processes", "2", *settings],
            stdout=subprocess.PIPE,
            stderr=(self.folder / f"trial-{trial}.log").open("a"),
            text=True,
        )

    def points(self) -> list[dict[str, Any]]:
        """Entries logged by the processes of a run so far, from their journals."""
        journals = sorted((self.cache / "journal").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        lines = [json.loads(line) for path in journals for line in path.read_text().splitlines() if line.endswith("}")]
        return [point for point in lines if "perf/step_s" in point]


def kills(folder: Path, overrides: list[str], count: int = KILLS) -> dict[str, Any]:
    """Injects one fault per run at a random time, and requires the result of an undisturbed run."""
    rig = Rig(folder, overrides)
    rng = random.Random(0)
    try:
        with object_storage(folder / "s3"), _Server(rig) as server:
            _end(rig, rig.start(1))  # loads the shards into the cache
            shutil.rmtree(rig.cache / "journal")
            start = time.time()
            weights, losses, last_step_at = _end(rig, rig.start(2))
            duration_s = last_step_at - start
            rows = []
            for number in range(count):
                moment_s = rng.uniform(1, 0.9 * duration_s)
                row = _hit(rig, server, rng, KINDS[number % len(KINDS)], number + 3, moment_s)
                row["same weights"] = row.pop("weights") == weights
                row["complete series"] = row.pop("series") == losses
                row["delay, s"] = round(row.pop("took, s") - duration_s, 1)
                rows.append(row)
                print(json.dumps(row, ensure_ascii=False), flush=True)
    finally:
        _kill_tree_below(os.getpid())  # restarted servers
        subprocess.run(["umount", "-l", str(rig.cache)])
    good = sum(row["same weights"] and row["complete series"] for row in rows)
    summary: dict[str, Any] = {"kills": count, "same weights and complete series": good}
    summary["undisturbed, s"] = round(duration_s, 1)
    for kind in dict.fromkeys(KINDS):
        hit = [row for row in rows if row["kind"] == kind]
        summary[kind] = {
            "runs": len(hit),
            "steps done again": [row["steps done again"] for row in hit],
            "delay of the last step, s": [row["delay, s"] for row in hit],
        }
    return summary


class _Server:
    """MLflow, which can be killed and restarted."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def __enter__(self) -> "_Server":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.__exit__(None, None, None)

    def up(self) -> None:
        self.context = self.rig.mlflow()
        self.child = self.context.__enter__()

    def down(self) -> None:
        _kill_tree(self.child.pid)


def _hit(rig: Rig, server: _Server, rng: random.Random, kind: str, trial: int, moment_s: float) -> dict[str, Any]:
    shutil.rmtree(rig.cache / "journal", ignore_errors=True)
    start, run = time.time(), rig.start(trial)
    time.sleep(moment_s)
    assert run.poll() is None, (rig.folder / f"trial-{trial}.log").read_text()
    before, hit_at = max((point["step"] for point in rig.points()), default=0), time.time()
    who = _do(rig, server, rng, kind, run)
    if kind == "SIGTERM":
        run.wait()
    if run.poll():  # otherwise it continues, or had finished before the disk was available again
        assert run.returncode in (-signal.SIGKILL, TERMINATED), run.returncode  # a cluster restarts both
        run = rig.start(trial)
    weights, series, last_step_at = _end(rig, run)
    # every process has a journal
    again = {point["step"] for point in rig.points() if point["time_ms"] / 1000 > hit_at and point["step"] <= before}
    return {
        "kind": kind,
        "who": who,
        "step": before,
        "weights": weights,
        "series": series,
        "at, s": round(moment_s, 1),
        "steps done again": len(again),
        "took, s": last_step_at - start,
    }


def _do(rig: Rig, server: _Server, rng: random.Random, kind: str, run: Run) -> str:
    if kind == "SIGKILL":
        victim = rng.choice([psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)])
        name = " ".join(victim.cmdline())[-60:]
        victim.kill()
        if victim.pid == run.pid:
            time.sleep(5)
        return name
    if kind == "SIGTERM":
        run.send_signal(signal.SIGTERM)
        return "launcher"
    if kind.startswith("S3"):
        _pause("weed", 20)
    elif kind.startswith("MLflow"):
        server.down()
        time.sleep(60)
        server.up()
    else:
        filler = rig.cache / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        time.sleep(15)
        filler.unlink()
    return ""


def _pause(name: str, seconds: float) -> None:
    """Kills a server and restarts it with the same command."""
    for child in psutil.Process().children(recursive=True):
        if child.status() != psutil.STATUS_ZOMBIE and child.name() == name:
            command, environment, place = child.cmdline(), child.environ(), child.cwd()
            child.kill()
            child.wait()
            time.sleep(seconds)
            subprocess.Popen(command, env=environment, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            break


def _kill_tree(pid: int) -> None:
    _kill_tree_below(pid)
    psutil.Process(pid).kill()


def _kill_tree_below(pid: int) -> None:
    for child in psutil.Process(pid).children(recursive=True):
        child.kill()


def _end(rig: Rig, run: Run) -> tuple[str, list[tuple[int, float]], float]:
    """Hash of the final weights, the loss series in MLflow, and the Unix time of the last step."""
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, (run.returncode, out)
    weights = hashlib.sha256(storage.read(f"{out.strip()}/model.safetensors")).hexdigest()
    client = mlflow.MlflowClient(rig.tracking)
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment is not None
    (shown,) = client.search_runs([experiment.experiment_id], f"tags.model_uri = '{out.strip()}'")
    found = client.get_metric_history(shown.info.run_id, "train/loss")
    assert shown.info.status == "FINISHED"
    last_step_at = max(point.timestamp for point in found) / 1000
    return weights, sorted((point.step, point.value) for point in found), last_step_at
