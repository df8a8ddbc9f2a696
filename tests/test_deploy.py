"""Files of `deploy/`: they parse, and name what is there."""

from __future__ import annotations

import re

import pytest
import yaml
from fixtures_repository import ROOT

from listen.commands import serve

DEPLOY = ROOT / "deploy"
COMPOSE = ("compose.yaml", "compose.replicas.yaml")


def arguments(command: str | list[str]) -> list[str]:
    """Words of a command of the server, with a value for each variable."""
    return command if isinstance(command, list) else re.sub(r"\$\{.*?\}", "value", command).split()


def check_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["listen serve", *words])
    parsed = serve.parse_arguments()
    assert (parsed.engine, parsed.dtype) == ("vllm", "bfloat16") and parsed.engine_url.startswith("http://vllm")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_start_the_server_with_arguments_that_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = yaml.safe_load((DEPLOY / name).read_text())["services"]
    ours = {key: service for key, service in services.items() if key.startswith("listen")}
    assert ours
    for service in ours.values():
        check_arguments(arguments(service["command"]), monkeypatch)
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        host = re.search(r"--engine-url http://([\w-]+):8000", service["command"])[1]
        assert (
            host in services and host in service["depends_on"] and "--enable-prompt-embeds" in services[host]["command"]
        )


def test_nginx_knows_every_replica() -> None:
    services = yaml.safe_load((DEPLOY / "compose.replicas.yaml").read_text())["services"]
    named = set(re.findall(r"server (\S+):8000", (DEPLOY / "nginx.conf").read_text()))
    assert named == {name for name in services if name.startswith("listen")}


def test_the_manifest_has_probes_and_services_that_meet_their_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())]
    pods = {d["metadata"]["name"]: d["spec"]["template"] for d in documents if d["kind"] == "Deployment"}
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    assert pods.keys() == services.keys() == {"vllm", "listen"}
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        assert services[name]["selector"].items() <= pod["metadata"]["labels"].items()
        assert services[name]["ports"][0]["targetPort"] in [port["name"] for port in container["ports"]]
    check_arguments(pods["listen"]["spec"]["containers"][0]["args"], monkeypatch)


def test_the_image_runs_the_command_and_installs_an_extra_that_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    setup, pinned = (ROOT / "setup.py").read_text(), (ROOT / "requirements.txt").read_text()
    assert "[serve]" in text and '"serve": [' in setup
    assert f"torch=={re.search('ARG TORCH=(.*)', text)[1]}\n" in pinned
    assert 'ENTRYPOINT ["listen", "serve"' in text
