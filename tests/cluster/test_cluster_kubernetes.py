"""The Kubernetes manifests against the published schemas, and the script that their containers start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import REPOSITORY, environment, free_port
from kubeflow_trainer_api import models

from megatron_hyperrouter.errors import ConfigError, DataError, HostError

FOLDER = REPOSITORY / "examples" / "cluster" / "kubernetes"
SCHEMAS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if document["kind"] in SCHEMAS
]


def job_of(name: str) -> dict[str, Any]:
    """The job template in a manifest."""
    (found,) = [
        document["spec"].get("template", document)["spec"]["replicatedJobs"][0]["template"]["spec"]
        for document in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
        if document["kind"] != "TrainJob"
    ]
    return dict(found)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_manifest_fits_its_schema_and_has_no_field_that_it_does_not_know(document: dict[str, Any]) -> None:
    """Parsing and writing a manifest again would lose fields that the schema does not know."""
    read = SCHEMAS[document["kind"]].from_dict(document)
    assert without_none(read.to_dict()) == document


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_a_job_restarts_only_where_that_helps_and_has_time_and_memory(name: str) -> None:
    job = job_of(name)
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    refused = [error.exit_status for error in (ConfigError, DataError, HostError)]
    assert rule["onExitCodes"]["values"] == [*refused, 42]  # the last one: examples/cluster/node.sh
    script = (REPOSITORY / "examples" / "cluster" / "node.sh").read_text()
    patience = int(script.split("--shutdown-timeout ")[1].split()[0])
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > patience
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    (claim,) = yaml.safe_load_all((FOLDER / "volume.yaml").read_text())
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_master_is_the_first_pod_of_the_headless_service() -> None:
    """JobSet calls a pod JOBSET-REPLICATEDJOB-JOB-POD, below the subdomain of its network."""
    (document,) = yaml.safe_load_all((FOLDER / "jobset.yaml").read_text(encoding="utf-8"))
    (container,) = job_of("jobset.yaml")["template"]["spec"]["containers"]
    address = next(each["value"] for each in container["env"] if each["name"] == "PET_MASTER_ADDR")
    name, spec = document["metadata"]["name"], document["spec"]
    assert address == f"{name}-{spec['replicatedJobs'][0]['name']}-0-0.{spec['network']['subdomain']}"


@pytest.mark.parametrize(("dry_run", "status"), [(2, 42), (3, 42), (5, 42), (1, 1), (137, 137)])
def test_a_check_that_fails_for_another_reason_ends_no_job(tmp_path: Path, dry_run: int, status: int) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {dry_run}\n")
    (tmp_path / "python").chmod(0o755)
    script = REPOSITORY / "examples" / "cluster" / "node.sh"
    path = f"{tmp_path}:/usr/bin:/bin"
    assert subprocess.run(["bash", str(script)], env=environment(PATH=path), check=False).returncode == status


@pytest.mark.processes
@pytest.mark.parametrize(
    ("more", "status"),
    [
        pytest.param(["--moe-router-topk", "9"], 42, id="refused"),
        pytest.param([], 0, id="trains", marks=pytest.mark.by_hand),
    ],
)
def test_a_node(tmp_path: Path, more: list[str], status: int) -> None:
    """With one node of one rank: an exit status that torchrun would replace by 1 ends the job."""
    script = REPOSITORY / "examples" / "cluster" / "node.sh"
    config = ["--config", "examples/quickstart.yaml", "--mock-data", "--expert-model-parallel-size", "1"]
    config += "--tokenizer-type NullTokenizer --vocab-size 64 --train-iters 2 --seq-length 32".split()
    config += ["--lr-warmup-iters", "0"]
    done = subprocess.run(
        ["bash", str(script), "--run-dir", str(tmp_path / "run"), *config, "--eval-interval", "0", *more],
        env=environment(
            PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
            PET_NNODES="1",
            PET_NPROC_PER_NODE="1",
            PET_NODE_RANK="0",
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=str(free_port()),
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists() == (status == 0)
