"""The manifests of deploy/kubernetes, which the chart renders, against what a server has: routes, flags, ports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kunserve.api.app import ROUTES
from kunserve.command.arguments import parse_args
from kunserve.command.flags import ADMIN_KEY_VARIABLE, API_KEY_VARIABLES

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PATHS = {(route.method, route.path) for route in ROUTES}
ENVIRONMENT = {*API_KEY_VARIABLES, ADMIN_KEY_VARIABLE, "HF_TOKEN", "POD_IP"}
# Of InferencePool in inference.networking.k8s.io/v1: the fields that a pool has to have
POOL = {"selector", "targetPorts", "endpointPickerRef"}


def objects(path: Path) -> dict[str, dict[str, Any]]:
    """All objects of a file by their kind; each is there once."""
    documents = [each for each in yaml.safe_load_all(path.read_text()) if each]
    found = {each["kind"]: each for each in documents}
    assert len(found) == len(documents)
    return found


def pod_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = objects(path)["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def test_every_file_of_values_has_its_manifests() -> None:
    names = [path.name for path in sorted((DEPLOY / "values").glob("*.yaml"))]
    assert [path.name for path in FILES] == names and len(names) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_server_takes_the_arguments(path: Path) -> None:
    _, container = pod_of(path)
    pod_args = [argument.replace("$(POD_IP)", "10.0.0.1") for argument in container["args"]]
    config = parse_args(pod_args)
    assert (config.host, config.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert config.log_json
    assert {each["name"] for each in container["env"]} <= ENVIRONMENT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_probes_ask_for_what_there_is(path: Path) -> None:
    _, container = pod_of(path)
    probes = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    # A server that loads its model is neither ready nor sick: until the start-up probe passes no other one is asked.
    assert probes == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert {("GET", probe) for probe in probes.values()} <= PATHS
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    ports = {port["name"] for port in container["ports"]}
    assert {container[name]["httpGet"]["port"] for name in probes} <= ports
    assert {port["targetPort"] for port in objects(path)["Service"]["spec"]["ports"]} <= ports


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pod_drains_before_it_is_killed(path: Path) -> None:
    pod, container = pod_of(path)
    [command, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = parse_args(["m", *(a for a in container["args"] if a.startswith("--shutdown"))]).shutdown_timeout_s
    assert command == "sleep" and pod["terminationGracePeriodSeconds"] >= int(seconds) + drain_s + 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_everything_selects_the_pods_and_nobody_is_root(path: Path) -> None:
    found = objects(path)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]]
    selectors += [found[kind]["spec"]["selector"]["matchLabels"] for kind in ("PodDisruptionBudget",)]
    if "InferencePool" in found:
        selectors.append(found["InferencePool"]["spec"]["selector"]["matchLabels"])
    if "ServiceMonitor" in found:  # it selects the Service
        assert found["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items() <= (
            found["Service"]["metadata"]["labels"].items()
        )
        [endpoint] = found["ServiceMonitor"]["spec"]["endpoints"]
        assert ("GET", endpoint["path"]) in PATHS
        assert endpoint["port"] in {port["name"] for port in found["Service"]["spec"]["ports"]}
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    pod, container = pod_of(path)
    image = (DEPLOY / "Dockerfile").read_text()
    assert pod["securityContext"]["runAsNonRoot"] and f"--uid {pod['securityContext']['runAsUser']} " in image
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    replicas = found["Deployment"]["spec"].get("replicas")
    least = found["ScaledObject"]["spec"]["minReplicaCount"] if replicas is None else replicas
    assert found["PodDisruptionBudget"]["spec"]["minAvailable"] < least  # else no node can be drained


def test_the_pool_the_route_and_the_picker_fit_together() -> None:
    found = objects(DEPLOY / "kubernetes" / "gateway.yaml")
    _, container = pod_of(DEPLOY / "kubernetes" / "gateway.yaml")
    pool, route = found["InferencePool"], found["HTTPRoute"]
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1" and pool["spec"].keys() == POOL
    assert pool["spec"]["endpointPickerRef"].keys() == {"kind", "name", "port", "failureMode"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert pool["spec"]["targetPorts"] == [{"number": ports["http"]}]
    [rule] = route["spec"]["rules"]
    [backend] = rule["backendRefs"]
    assert (backend["group"], backend["kind"], backend["name"]) == (
        "inference.networking.k8s.io",
        "InferencePool",
        pool["metadata"]["name"],
    )
    prefix = rule["matches"][0]["path"]["value"]
    assert sum(path.startswith(prefix) for _, path in PATHS) >= 8
    picker = yaml.safe_load(found["ConfigMap"]["data"]["picker.yaml"])
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in picker["plugins"]}
    [profile] = picker["schedulingProfiles"]
    assert {each["pluginRef"] for each in profile["plugins"]} == plugins.keys() - {"single-profile-handler"}
    # What the picker's index assumes is what the server is told.
    precise, config = plugins["precise-prefix-cache-scorer"], parse_args(container["args"])
    assert config.http.kv_events is not None and config.engine.enable_prefix_caching
    assert precise["tokenProcessorConfig"]["blockSize"] == config.engine.block_size
    socket_port = precise["kvEventsConfig"]["podDiscoveryConfig"]["socketPort"]
    assert config.http.kv_events.endpoint.endswith(f":{socket_port}") and ports["kv-events"] == socket_port
    assert config.http.kv_events.topic.startswith(precise["kvEventsConfig"]["topicFilter"])


def test_a_drop_can_happen_behind_the_picker() -> None:
    picker = yaml.safe_load(objects(DEPLOY / "kubernetes" / "gateway.yaml")["ConfigMap"]["data"]["picker.yaml"])
    held_back = picker["saturationDetector"]
    assert held_back["kvCacheUtilThreshold"] >= 1.0 and held_back["queueDepthThreshold"] > 1_000_000


def test_gpus_keys_and_tokens_reach_the_pod() -> None:
    _, container = pod_of(DEPLOY / "kubernetes" / "gpus.yaml")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8 and container["resources"]["requests"]["cpu"] == "16"
    secrets = {
        each["name"]: each["valueFrom"]["secretKeyRef"]["key"]
        for each in container["env"]
        if "secretKeyRef" in each["valueFrom"]
    }
    assert secrets == {"KUNSERVE_API_KEY": "api", "KUNSERVE_ADMIN_KEY": "admin", "HF_TOKEN": "token"}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_have_the_extras_that_flags_of_the_manifests_need(name: str) -> None:
    flags = {argument.partition("=")[0] for path in FILES for argument in pod_of(path)[1]["args"]}
    needed = {"--kv-events-config": "kv-events", "--otlp-traces-endpoint": "otel"}
    assert flags >= needed.keys()
    [extras] = re.findall(r"'\.\[([\w,-]+)\]'", (DEPLOY / name).read_text())
    assert set(extras.split(",")) >= set(needed.values()) | ({"cuda"} if "cuda" in name else set())


def test_templates_name_no_value_that_is_not_there() -> None:
    values = yaml.safe_load((DEPLOY / "chart" / "values.yaml").read_text())
    for path in (DEPLOY / "chart" / "templates").iterdir():
        for name in re.findall(r"\.Values\.([\w.]+)", path.read_text()):
            value: Any = values
            for part in name.split("."):
                assert part in value, f"{path.name}: {name}"
                value = value[part]
