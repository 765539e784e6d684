#!/usr/bin/env python3
"""Render the Helm chart for the value files of deploy/values into deploy/kubernetes, and hold it against schemas.

    make test-chart                                   # render, compare with what is committed, validate
    python scripts/check/render_chart.py --write      # after a change of the chart or of a value file

Helm's own engine renders (helm-python-sdk), kubernetes-validate has the schemas of Kubernetes, and the npm packages
@kubernetes-models/* those of the custom resources. All are in an environment of their own: see the Makefile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
RELEASE, NAMESPACE = "kunserve", "default"
KUBERNETES = "1.34"
NODE_CHECK = """
import { readFileSync } from 'fs';
const models = {ServiceMonitor: 'prometheus-operator/monitoring.coreos.com/v1', ScaledObject: 'keda/keda.sh/v1alpha1',
  HTTPRoute: 'gateway-api/gateway.networking.k8s.io/v1'};
for (const object of JSON.parse(readFileSync(0))) {
  const module = await import(`@kubernetes-models/${models[object.kind]}`);
  new module[object.kind](object).validate();
}
"""
CUSTOM = ("ServiceMonitor", "ScaledObject", "HTTPRoute")
UNKNOWN = (
    "InferencePool",
)  # no registry that is used here has its schema: tests/deploy/test_kubernetes.py has the rules


def rendered(values: Path) -> str:
    """Return what Helm makes of the chart with a value file, as one stream of YAML documents."""
    with helm_python.Chart.load(str(DEPLOY / "chart")) as chart:
        found = chart.render(yaml.safe_load(values.read_text()), name=RELEASE, namespace=NAMESPACE)
    texts = [text.strip() for name, text in sorted(found.items()) if name.endswith(".yaml") and text.strip()]
    head = (
        f"# helm template {RELEASE} deploy/chart --values deploy/values/{values.name}: `make manifests` writes this.\n"
    )
    return head + "\n---\n".join(texts) + "\n"


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream of documents."""
    yield from (document for document in yaml.safe_load_all(text) if document)


def fault_of(each: dict[str, Any], node_modules: Path) -> str | None:
    """Return what the schema of an object says against it; None if nothing, or if there is no schema of its kind."""
    if each["kind"] in UNKNOWN:
        return None
    if each["kind"] in CUSTOM:
        command = ["node", "--input-type=module", "-e", NODE_CHECK]
        done = subprocess.run(
            command, input=json.dumps([each]), text=True, cwd=node_modules.parent, capture_output=True, check=False
        )
        return done.stderr if done.returncode else None
    try:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return None


def validate(text: str, node_modules: Path) -> None:
    """Exit with a fault if an object is not as its schema says, or if a schema takes one that is broken."""
    for each in objects(text):
        if (fault := fault_of(each, node_modules)) is not None:
            sys.exit(f"{each['kind']}: {fault}")
        if each["kind"] not in UNKNOWN and fault_of({**each, "metadata": 5, "spec": 5}, node_modules) is None:
            sys.exit(f"{each['kind']}: its schema takes anything")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write deploy/kubernetes")
    parser.add_argument("--node-modules", type=Path, default=Path(".chart/node_modules"))
    args = parser.parse_args()
    stale = []
    for values in sorted((DEPLOY / "values").glob("*.yaml")):
        text, path = rendered(values), DEPLOY / "kubernetes" / values.name
        validate(text, args.node_modules.absolute())
        if args.write:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(path.name)
        print(f"{values.name}: {', '.join(each['kind'] for each in objects(text))}")
    if stale:
        sys.exit(f"not as the chart renders: {', '.join(stale)}; run `make manifests`")


if __name__ == "__main__":
    main()
