"""The PodTemplate of k8s/base, with an image like that of an overlay."""

from typing import Any

import yaml

from tests.helpers.paths import ROOT

FILE = ROOT / "k8s" / "base" / "training" / "pod-template.yaml"


def pod_template(**resources: dict[str, str]) -> dict[str, Any]:
    """`requests` replaces requests and limits if it is given."""
    template: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    container = template["template"]["spec"]["containers"][0]
    container["image"] = "registry.example/training:1"
    if resources:
        container["resources"] = resources
    return template


CPU = pod_template()
GPU = pod_template(requests={"cpu": "96", "memory": "500Gi"}, limits={"memory": "500Gi", "nvidia.com/gpu": "8"})
