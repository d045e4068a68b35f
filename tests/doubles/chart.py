"""The Helm chart, rendered by Helm's own library, and what Kubernetes would say of what comes out.

``python -m tests.doubles.chart`` writes ``configs/kuberay/farm.yaml`` anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

CHART = Path(__file__).parents[2] / "configs/helm/lazyfarm"
RENDERED = CHART.parents[1] / "kuberay/farm.yaml"
VALUES = RENDERED.with_name("values.yaml")
#: The oldest that the chart takes, and the newest that is known.
VERSIONS = ("1.28", kubernetes_validate.latest_version())
NAMESPACE = "builds"

_HEADER = """\
# A farm on KubeRay without Helm: what configs/helm/lazyfarm makes of values.yaml beside this. Change the hosts, then
# `kubectl create namespace builds`, the Secret `lazyfarm` as docs/operations.md says, and
# `kubectl -n builds apply -f farm.yaml`.
"""


def render(values: Mapping[str, Any]) -> dict[str, str]:
    """Render the chart; return what each template gives, by its name.

    Raises:
        helm_python.HelmError: the values are not the chart's, or a template refuses them.
    """
    with helm_python.Chart.load(CHART) as chart:
        # Helm's library checks a schema on its own, the command in passing.
        chart.validate_schema(dict(values))
        made = chart.render(dict(values), name="lazyfarm", namespace=NAMESPACE)
    return {name.rpartition("/")[2]: text for name, text in made.items()}


def documents(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Render the chart; return the objects, each found good by Kubernetes' and KubeRay's schemas."""
    made = [each for text in _manifests(values) for each in yaml.safe_load_all(text) if each]
    for version in VERSIONS:
        for each in made:
            check(each, version)
    return made


def check(document: Mapping[str, Any], version: str) -> None:
    """Check an object strictly, by the schemas of a Kubernetes: no field that it doesn't know.

    Raises:
        kubernetes_validate.ValidationError: it is not what Kubernetes or KubeRay take.
    """
    if document["kind"] == "RayCluster":
        for part in _parts(document):
            kubernetes_validate.validate(part, version, strict=True)
    else:
        kubernetes_validate.validate(dict(document), version, strict=True)


def manifests(values: Mapping[str, Any]) -> str:
    """Return what ``kubectl apply`` takes."""
    return _HEADER + "".join(f"---\n{text.strip()}\n" for text in _manifests(values))


def _manifests(values: Mapping[str, Any]) -> list[str]:
    return [text for name, text in sorted(render(values).items()) if name.endswith(".yaml") and text.strip()]


#: Fields of ray.io/v1 with what they hold, since no package has its schemas. They agree with KubeRay's API reference
#: (docs/reference/api.md) of 1.5, where ``authOptions``, ``upgradeStrategy``, ``resources`` and ``labels`` are new; all
#: else is in that of 1.4, too.
_FIELDS: dict[str, dict[str, type]] = {
    "cluster": {
        "autoscalerOptions": dict,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "gcsFaultToleranceOptions": dict,
        "headGroupSpec": dict,
        "headServiceAnnotations": dict,
        "managedBy": str,
        "rayVersion": str,
        "suspend": bool,
        "upgradeStrategy": dict,
        "workerGroupSpecs": list,
    },
    "head": {
        "enableIngress": bool,
        "headService": dict,
        "labels": dict,
        "rayStartParams": dict,
        "resources": dict,
        "serviceType": str,
        "template": dict,
    },
    "workers": {
        "groupName": str,
        "idleTimeoutSeconds": int,
        "labels": dict,
        "maxReplicas": int,
        "minReplicas": int,
        "numOfHosts": int,
        "rayStartParams": dict,
        "replicas": int,
        "resources": dict,
        "scaleStrategy": dict,
        "suspend": bool,
        "template": dict,
    },
}


def _parts(cluster: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check what is KubeRay's own of a cluster; return its Pod templates as objects that Kubernetes itself knows."""
    assert cluster.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    groups = [("head", spec["headGroupSpec"]), *(("workers", group) for group in spec["workerGroupSpecs"])]
    for kind, part in (("cluster", spec), *groups):
        for name, value in part.items():
            assert name in _FIELDS[kind], f"KubeRay's {kind} has no {name}"
            assert type(value) is _FIELDS[kind][name], f"{kind}.{name} is a {type(value).__name__}"
    for kind, group in groups:
        assert all(type(value) is str for value in group["rayStartParams"].values()), kind
        assert group["template"]["spec"]["containers"], kind
    template = [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": cluster["metadata"]}]
    return [{**template[0], "template": group["template"]} for _, group in groups]


if __name__ == "__main__":
    RENDERED.write_text(manifests(yaml.safe_load(VALUES.read_text())))
