#!/usr/bin/env python3
"""Builds every overlay, alone and with each component, and validates the result and the jobs: k8s/validate.py

It uses the strict schemas of three versions of Kubernetes, those of PyTorchJob and TrainJob, and the rules in
components/jobs/rules.py. Kinds of other projects (Kueue, Volcano, Prometheus) are listed but have no schema here. Needs
kubectl, but no cluster.
"""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from components.jobs import rules

HERE = Path(__file__).resolve().parent
VERSIONS = ("1.30", "1.34", "1.37")
SCHEMAS = {kind: HERE / "schemas" / f"{kind.lower()}.json" for kind in ("PyTorchJob", "TrainJob", "TrainingRuntime")}
"""From training-operator 1.9 and Trainer 2.3, made strict: without descriptions, unknown fields are errors."""
FOREIGN = {
    "ClusterQueue",
    "LocalQueue",
    "ResourceFlavor",
    "Queue",
    "PodMonitor",
    "ServiceMonitor",
    "PrometheusRule",
}
Document = dict[str, Any]


def main() -> None:
    found: list[str] = []
    for name, documents in builds():
        problems = [problem for document in documents for problem in check(document)]
        foreign = sorted({document["kind"] for document in documents} & FOREIGN)
        unchecked = f", without a schema: {', '.join(foreign)}" if foreign else ""
        print(f"{'ok ' if not problems else 'BAD'} {name}: {len(documents)} objects{unchecked}")
        found += [f"{name}: {problem}" for problem in problems]
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


def builds() -> Iterator[tuple[str, list[Document]]]:
    """Everything that users apply: each overlay, alone and with each component, and each job."""
    for overlay in sorted((HERE / "overlays").iterdir()):
        yield f"overlays/{overlay.name}", kustomize(overlay)
        for component in sorted((HERE / "components").iterdir()):
            known = yaml.safe_load((overlay / "kustomization.yaml").read_text()).get("components", [])
            if f"../../components/{component.name}" not in known:
                yield f"overlays/{overlay.name} + {component.name}", with_component(overlay, component)
    for folder in ("operator", "kueue", "volcano"):
        yield folder, kustomize(HERE / folder)
    for job in sorted((HERE / "jobs").glob("*.yaml")):
        yield f"jobs/{job.name}", list(yaml.safe_load_all(job.read_text(encoding="utf-8")))


def with_component(overlay: Path, component: Path) -> list[Document]:
    folder = Path(tempfile.mkdtemp(dir=HERE, prefix=".build-"))
    try:
        lines = {"resources": [f"../overlays/{overlay.name}"], "components": [f"../components/{component.name}"]}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "mplug", **lines}))
        return kustomize(folder)
    finally:
        shutil.rmtree(folder)


def kustomize(folder: Path) -> list[Document]:
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"error: {folder} cannot be built: {built.stderr.strip()}")
    return list(yaml.safe_load_all(built.stdout))


def check(document: Document) -> list[str]:
    """Violations of schema and rules. Most objects are equal in every build, and are checked once."""
    return _check(json.dumps(document, sort_keys=True))


@cache
def _check(text: str) -> list[str]:
    document = json.loads(text)
    name = f"{document['kind']} {document['metadata']['name']}"
    if document["kind"] in SCHEMAS:
        found = [
            f"{name}: {'.'.join(map(str, error.path))}: {error.message[:200]}" for error in schema_errors(document)
        ]
    elif document["kind"] in FOREIGN:
        found = []
    else:
        found = [
            f"{name}: Kubernetes {version}: {problem}" for version in VERSIONS for problem in core(document, version)
        ]
    return found + rules.problems(document)


def core(document: Document, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(copy.deepcopy(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


def schema_errors(document: Document) -> Iterator[jsonschema.ValidationError]:
    schema = json.loads(SCHEMAS[document["kind"]].read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema).iter_errors(document)


if __name__ == "__main__":
    main()
