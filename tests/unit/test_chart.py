"""The Helm chart and the plain manifests: what Helm makes of them is what Kubernetes, KubeRay and the farm take."""

import tomllib
from importlib.metadata import version

import helm_python
import kubernetes_validate
import pytest
import yaml

from lazyfarm.settings import load_settings
from tests.doubles.chart import CHART, RENDERED, VALUES, VERSIONS, check, documents, manifests, render

LEAST = {
    "image": {"repository": "registry.internal/lazyfarm"},
    "redis": {"url": "redis://redis:6379/0"},
    "s3": {"endpoint": "http://s3:9000"},
}
DISK = {
    "volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1T"}}}}
}
ALL = {
    **LEAST,
    "imagePullSecrets": [{"name": "registry"}],
    "redis": {
        "url": "rediss+cluster://redis:6379",
        "passwordKey": "",
        "caKey": "ca.crt",
        "clientCertKey": "tls.crt",
        "clientKeyKey": "tls.key",
        "waitReplicas": 0,
    },
    "config": {
        "cache": {"shards": 8, "proof_ttl_s": 0.5},
        "collect": {"max_used_bytes": 2**49},
        "registries": {"docker.io": {"mirrors": ["mirror.internal:5000"], "plain_http": True}},
        "s3": {"connections": 40},
    },
    "node": {"privileged": False, "volume": {"ephemeral": DISK}},
    "head": {
        "nodeSelector": {"pool": "builds"},
        "tolerations": [{"key": "builds", "operator": "Exists"}],
        "annotations": {"a": "b"},
        "env": [{"name": "LAZYFARM__LOG__LEVEL", "value": "debug"}],
    },
    "metrics": {"scrape": False},
    "page": {"service": {"enabled": True}, "ingress": {"enabled": True, "host": "farm.internal", "tlsSecret": "farm"}},
    "gateway": {"enabled": True, "tlsSecret": "farm", "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
    "networkPolicy": {"clients": [{"podSelector": {}}], "monitoring": [{"podSelector": {}}]},
}
BARE = {
    **LEAST,
    "page": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
}


def of_kind(made, kind):
    """Return the only object of a kind."""
    (found,) = [each for each in made if each["kind"] == kind]
    return found


def service(made, name):
    """Return the Service that is called so."""
    (found,) = [each for each in made if each["kind"] == "Service" and each["metadata"]["name"] == name]
    return found["spec"]


def configuration(made, directory):
    """Return the configuration that the farm makes of a ConfigMap, with the Secret's files where they can be read."""
    text = of_kind(made, "ConfigMap")["data"]["farm.toml"].replace("/etc/lazyfarm/secret", str(directory))
    for name in ("ca.crt", "ray-token", "redis-password", "s3-credentials", "tls.crt", "tls.key"):
        secret = directory / name
        secret.write_text("x")
        secret.chmod(0o400)
    file = directory / "farm.toml"
    file.write_text(text)
    return load_settings(directory / "state", str(file), {}).wanted


def test_the_plain_manifests_are_what_the_chart_gives():
    """farm.yaml is of this chart and the values beside it; `python -m tests.doubles.chart` writes it anew."""
    values = yaml.safe_load(VALUES.read_text())
    assert RENDERED.read_text() == manifests(values)
    assert list(yaml.safe_load_all(RENDERED.read_text())) == documents(values)


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        (LEAST, {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "ServiceAccount"}),
        (
            ALL,
            {"ConfigMap", "Ingress", "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "Service", "ServiceAccount"},
        ),
        (BARE, {"ConfigMap", "RayCluster", "ServiceAccount"}),
    ],
    ids=["least", "all", "bare"],
)
def test_every_choice_gives_what_kubernetes_and_the_farm_take(values, kinds, tmp_path):
    """By the schemas of the oldest Kubernetes and the newest, and the farm's own check of its configuration."""
    made = documents(values)
    assert {each["kind"] for each in made} == kinds
    config = configuration(made, tmp_path)
    assert config.redis.url == values["redis"]["url"]
    assert config.web.enabled is values.get("page", {}).get("enabled", True)


def test_the_configuration_says_what_the_values_say(tmp_path):
    """Numbers too large for a float's digits, fractions, lists and truths come through; a section is not replaced."""
    config = configuration(documents(ALL), tmp_path)
    assert (config.cache.shards, config.cache.proof_ttl_s) == (8, 0.5)
    assert config.collect.max_used_bytes == 2**49
    assert config.node.cache_bytes == 100 * 1024**3
    assert (config.s3.connections, config.s3.endpoint) == (40, "http://s3:9000")
    assert config.registries["docker.io"].mirrors == ("mirror.internal:5000",)
    assert config.registries["docker.io"].plain_http
    assert (config.web.host, config.node.snapshotter) == ("0.0.0.0", "copying")  # noqa: S104 - behind a Service
    assert (config.redis.password_file, config.redis.client_key_file) == ("", str(tmp_path / "tls.key"))


def test_the_gateway_is_at_the_head_alone_and_speaks_tls(tmp_path):
    """Its key is on no other node; without it there is neither a port nor a Service."""
    made = documents(ALL)
    config = configuration(made, tmp_path).gateway
    assert (config.enabled, config.host, config.port) == (True, "0.0.0.0", 8443)  # noqa: S104 - behind a Service
    (port,) = service(made, "lazyfarm-gateway")["ports"]
    assert (port["port"], port["targetPort"]) == (443, 8443)
    spec = of_kind(made, "RayCluster")["spec"]
    for group, is_there in ((spec["headGroupSpec"], True), *((one, False) for one in spec["workerGroupSpecs"])):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert ("gateway" in {volume["name"] for volume in pod["volumes"]}) is is_there
        assert {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "gateway"} == (
            {"/etc/lazyfarm/gateway"} if is_there else set()
        )
        assert (8443 in {one["containerPort"] for one in container["ports"]}) is is_there
    allowed = of_kind(made, "NetworkPolicy")["spec"]["ingress"]
    assert any({"port": 8443} in rule.get("ports", ()) for rule in allowed)
    assert "8443" not in "".join(render(LEAST).values())
    assert not configuration(documents(LEAST), tmp_path).gateway.enabled


def test_a_node_keeps_its_name_only_where_it_keeps_its_disk():
    """A Pod with a disk of its own is another node each time: nobody is to miss the one before."""
    for values, is_named in ((LEAST, True), (ALL, False)):
        spec = of_kind(documents(values), "RayCluster")["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert any(variable["name"] == "LAZYFARM_NODE" for variable in container["env"]) is is_named


def test_a_node_has_time_to_end_what_it_does_where_it_can_drain():
    """By its name, so not one with a disk of its own; the head doesn't, and who wants no drain has none."""
    without = {**LEAST, "workers": {"drainSeconds": 0}}
    for values, wanted in ((LEAST, "300"), (ALL, None), (without, None)):
        spec = of_kind(documents(values), "RayCluster")["spec"]
        for group, drain_s in ((spec["headGroupSpec"], None), *((one, wanted) for one in spec["workerGroupSpecs"])):
            pod = group["template"]["spec"]
            env = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
            assert env.get("LAZYFARM_DRAIN_S") == drain_s
            assert pod["terminationGracePeriodSeconds"] == 30 + int(drain_s or 0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"redis": {"url": ""}}, "url"),
        ({"redis": {"url": "redis://:hunter2@redis:6379"}}, "url"),
        ({"s3": {"endpoint": "s3.internal"}}, "endpoint"),
        ({"workers": {"replica": 3}}, "replica"),
        ({"workers": {"drainSeconds": -1}}, "drainSeconds"),
        ({"node": {"volume": {"emptyDir": {}, "ephemeral": {}}}}, "volume"),
        ({"page": {"service": {"enabled": True}, "ingress": {"enabled": True, "host": "x"}}}, "in the clear"),
        ({"gateway": {"enabled": True}}, "in the clear"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "type"),
    ],
)
def test_what_can_not_be_meant_is_refused(wrong, told):
    """By the schema of the values, or the template: a typing error, a password in a URL, a page without TLS."""
    with pytest.raises(helm_python.HelmError, match=told):
        render({**LEAST, **wrong})


def test_helm_has_nothing_to_say_of_the_chart():
    """Helm lint finds no error and no warning: an icon is all that it misses."""
    found = helm_python.lint(CHART, LEAST, strict=True)
    assert found["total_charts_linted"] == 1
    assert [message for message in found["messages"] if "icon is recommended" not in message["error"]] == []


def test_the_chart_is_of_this_release():
    """It names the version of the project for its image, and that of the Ray in it."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version("lazyfarm")
    assert values["ray"]["version"] == version("ray")


def test_a_wrong_manifest_is_found():
    """The check knows a field that isn't one, in Kubernetes' objects, in a Pod's template and in KubeRay's own."""
    made = documents(LEAST)
    account, cluster = of_kind(made, "ServiceAccount"), of_kind(made, "RayCluster")
    with pytest.raises(kubernetes_validate.ValidationError, match="automount"):
        check({**account, "automount": True}, VERSIONS[0])
    with pytest.raises(AssertionError, match="headGroup"):
        check({**cluster, "spec": {**cluster["spec"], "headGroup": {}}}, VERSIONS[0])
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="container"):
        check(cluster, VERSIONS[-1])


def test_the_plain_configuration_is_toml_that_people_can_read():
    """One section after another, as in configs/default.toml, and no key twice."""
    text = of_kind(documents(yaml.safe_load(VALUES.read_text())), "ConfigMap")["data"]["farm.toml"]
    assert tomllib.loads(text)["flight"] == {"lease_ttl_s": 15, "poll_s": 5}
    assert "e+" not in text
