"""Rendered jobs, checked by the systems' own parsers and shellcheck, and run where possible."""

import json
import os
import shlex
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from launch.restart.history import STOPPED_STATUS
from launch.submit import hosts, kubernetes, mcli, skypilot, slurm
from launch.submit.__main__ import main
from launch.submit.environment import describe, environment
from launch.submit.job import Device, Job, check_job
from launch.submit.placement import check_placement
from train.health.environment import TABLE
from train.recipe.errors import UserError
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.schema import Phase
from train.record.process import HOST_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "yamls/dbrx-moe-a.yaml")
AWKWARD = "start.weights=/data/it's here/$HOME"
JOB = Job(
    RECIPE,
    overrides=("training.clip_norm=0.5", AWKWARD),
    name="moe-a",
    nodes=8,
    image="example/finegrain:1",
    mounts=("/data", "/runs"),
    claims={"shards-claim": "/shards"},
    resources={"rdma/ib": "8"},
    environment={"SITE": 'it\'s "quoted" $here'},
    interface="eth0",
    workdir="/finegrain",
    hosts=tuple(f"h{n}" for n in range(8)),
)


def last_words(text: str) -> list[str]:
    """Returns the recipe and its overrides as a shell reads them from a rendered line."""
    line = next(line for line in text.splitlines() if RECIPE in line)
    return shlex.split(line.removesuffix("&").strip())[-3:]


@pytest.mark.parametrize("render", [slurm.render, lambda job: hosts.render(job, "torchrun")])
def test_scripts_are_sound_shell_and_keep_every_word(render: Any, tmp_path: Path) -> None:
    text = render(JOB)
    assert last_words(text) == JOB.arguments
    script = tmp_path / "script.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_steps_pass_shellcheck() -> None:
    subprocess.run(["shellcheck", *(ROOT / "launch/submit").glob("*.sh")], check=True)


def test_slurm_asks_for_what_the_job_says() -> None:
    text = slurm.render(replace(JOB, spare_nodes=2, hours=1.5, partition="gpu"))
    directives = {line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {
        "--nodes=10",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=01:30:00",
        "--signal=B:TERM@300",
        "--requeue",
        "--no-kill",
        "--partition=gpu",
    } <= directives
    assert "--nodes 8 --" in text  # of 10, the supervisor uses 8
    without = slurm.render(replace(JOB, device=Device.cpu))
    assert "--gpus-per-node" not in without and "--no-kill" not in without and "NCCL_DEBUG" not in without


STUBS = {
    "sinfo": "exit 0",
    "scontrol": 'echo "NodeName=$3 NodeAddr=10.0.0.7 Port=1"',
    "srun": 'printf "%s\\n" "$@" > srun-words; while [ "$1" != bash ]; do shift; done; exec "$@"',
    "python": 'echo "image $*"',
    ".venv/bin/python": 'echo "checkout $*"',
}
"""SLURM's commands and two Pythons, as far as the step calls them."""


@pytest.mark.parametrize(
    ("container", "cpus", "python", "binding"),
    [
        ("", "192", "checkout", ["--cpus-per-task=24", "--cpu-bind=cores"]),
        (
            "--container-image=/shared/finegrain.sqsh",
            "192",
            "image",
            ["--cpus-per-task=24", "--cpu-bind=cores"],
        ),
        ("", "2", "checkout", []),
    ],
    ids=["checkout", "image", "fewer CPUs than ranks"],
)
def test_a_slurm_step_binds_its_ranks_and_the_image_wins(
    container: str, cpus: str, python: str, binding: list[str], tmp_path: Path
) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RANKS_PER_NODE": "8", "SLURM_JOB_ID": "77"}
    step = subprocess.run(
        ["bash", ROOT / "launch/submit/srun_step.sh", "n1,n2", "yamls/X.yaml", "name=a b"],
        cwd=tmp_path,
        env=environment | {"CONTAINER_ARGUMENTS": container, "SLURM_CPUS_ON_NODE": cpus},
        capture_output=True,
        text=True,
        check=True,
    )
    assert step.stdout == f"{python} train/main.py yamls/X.yaml name=a b\n"
    words = (tmp_path / "srun-words").read_text().split("\n")
    assert [word for word in words if "cpu" in word] == binding
    assert {"--nodes=2", "--ntasks=16", "--distribution=block:block"} <= set(words)


def test_slurms_port_is_not_one_that_the_kernel_hands_out() -> None:
    (line,) = (line for line in slurm.render(JOB).splitlines() if "MASTER_PORT" in line)
    ports = [
        int(subprocess.check_output(["bash", "-c", f"SLURM_JOB_ID={job}; {line}; echo $MASTER_PORT"]))
        for job in (1, 9999, 19999, 123456)
    ]
    assert ports == [20001, 29999, 29999, 23456] and max(ports) < 32768


@pytest.mark.parametrize("device", Device)
def test_kubernetes_knows_every_field(device: Device) -> None:
    client = pytest.importorskip("kubernetes.client")
    job = replace(JOB, device=device)
    api = client.ApiClient()

    # The client drops fields that its models do not know, which the round trip shows.
    parsed = api.deserialize(json.dumps(kubernetes.job_spec(job)), "V1JobSpec", "application/json")
    assert api.sanitize_for_serialization(parsed) == kubernetes.job_spec(job)
    assert yaml.safe_load(kubernetes.render(job)) == kubernetes.manifest(job)


def test_kubernetes_names_the_first_pod_as_master_and_stops_at_a_mistake() -> None:
    spec = kubernetes.manifest(JOB)["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    # JobSet names pods JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
    assert variables["MASTER_ADDR"] == "moe-a-node-0-0.moe-a" and spec["network"]["subdomain"] == "moe-a"
    assert pod["containers"][0]["command"][-3:] == JOB.arguments
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "8"}
    # Records and messages name the pod's node.
    (host,) = (v["valueFrom"] for v in pod["containers"][0]["env"] if v["name"] == HOST_VARIABLE)
    assert host == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8 and job["backoffLimit"] == 0
    (claim,) = (v for v in pod["volumes"] if "persistentVolumeClaim" in v)
    assert claim["persistentVolumeClaim"] == {"claimName": "shards-claim"}
    assert {"name": claim["name"], "mountPath": "/shards"} in pod["containers"][0]["volumeMounts"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [USAGE_STATUS, STOPPED_STATUS]


@pytest.mark.skipif(
    "FINEGRAIN_JOBSET_CRD" not in os.environ, reason="FINEGRAIN_JOBSET_CRD names no file of JobSet's CRD"
)
@pytest.mark.parametrize("device", Device)
def test_jobset_knows_every_field(device: Device) -> None:
    """Against config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset."""
    crd = yaml.safe_load(Path(os.environ["FINEGRAIN_JOBSET_CRD"]).read_text())
    manifest = yaml.safe_load(kubernetes.render(replace(JOB, device=device, records="/runs/a.restarts")))
    group, version = manifest["apiVersion"].split("/")
    assert (crd["spec"]["group"], crd["spec"]["names"]["kind"]) == (group, manifest["kind"])
    (found,) = (each for each in crd["spec"]["versions"] if each["name"] == version)
    assert list(Draft202012Validator(strict(found["schema"]["openAPIV3Schema"])).iter_errors(manifest)) == []


def strict(schema: Any) -> Any:
    """Returns a CRD's schema that rejects unlisted fields, which the server would drop."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def test_mcli_knows_every_field() -> None:
    """Needs an environment with mosaicml-cli, PyYAML and OmegaConf, which is not locked."""
    models = pytest.importorskip("mcli", reason="mosaicml-cli is not installed: not part of the lock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = models.RunConfig.from_dict(yaml.safe_load(mcli.render(JOB)))
    assert config.compute["gpus"] == 64 and config.compute["nodes"] == 8
    assert last_words(config.command) == JOB.arguments


@pytest.mark.parametrize(
    "gpu,name",
    [("H100", "h100_80gb"), ("H200", "h200_141gb"), ("L40S", "l40s"), ("h200_141gb", "h200_141gb")],
)
def test_mcli_asks_for_the_gpu(gpu: str, name: str) -> None:
    assert mcli.configuration(replace(JOB, gpu_type=gpu))["compute"]["gpu_type"] == name


def test_skypilot_knows_every_field() -> None:
    """Needs an environment with skypilot, which is not locked."""
    sky = pytest.importorskip("sky", reason="skypilot is not installed: not part of the lock")
    task = sky.Task.from_yaml_config(yaml.safe_load(skypilot.render(JOB)))
    assert task.num_nodes == 8
    (resources,) = task.resources
    assert resources.accelerators == {"H100": 8}
    assert {PREEMPTED_STATUS, HANG_STATUS} <= set(resources.job_recovery["recover_on_exit_codes"])
    assert last_words(task.run) == JOB.arguments


@pytest.mark.parametrize("system", ["kubernetes", "mcli", "skypilot"])
def test_systems_that_restart_by_themselves_are_told_where_the_log_is(
    system: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        RECIPE,
        "name=mine",
        "runs_dir=/runs",
        "data.remote=s3://bucket/shards",
        "--on",
        system,
        "--nodes",
        "8",
        "--image",
        "i",
        "--render",
        *(["--claim", "runs=/runs"] if system == "kubernetes" else []),
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "/runs/mine.restarts" in text and "LOOK_BACK" in text


def test_environment_has_a_reason_each_and_the_users_wins() -> None:
    assert all(v.reason for v in TABLE)
    for device in Device:
        names = [v.name for v in TABLE if v.device in (None, device.value)]
        assert len(names) == len(set(names))
    found = environment(replace(JOB, environment={"NCCL_DEBUG": "INFO"}))
    assert found["NCCL_DEBUG"] == "INFO" and found["GLOO_SOCKET_IFNAME"] == "eth0"
    assert not any("NCCL" in name for name in environment(Job(RECIPE, device=Device.cpu)))
    assert describe() in (ROOT / "docs/cluster.md").read_text(), "python -m launch.submit --environment-table"


def test_placement_by_counting_nodes() -> None:
    """Compares the formula with a count over the mesh that the ranks build."""
    from train.recipe.sizes import shard_degree

    recipe = load_recipe(RECIPE, ["training.global_batch_sequences=6144", "training.microbatch_sequences=1"])
    for gpus in (4, 6, 8):
        for expert in (2, 4, 8, 16):
            layout = replace(recipe.parallelism, replicate=1, expert=expert)
            job, world = replace(JOB, nodes=8, gpus_per_node=gpus), 8 * gpus
            if world % expert:
                continue
            shard = shard_degree(layout, world)
            mesh = [[s * expert + e for e in range(expert)] for s in range(shard)]
            spans = {len({rank // gpus for rank in group}) for group in mesh}
            placed = replace(recipe, parallelism=layout)
            if spans == {1}:
                assert "within a node" in check_placement(job, placed)[0]
            elif len(spans) == 1:
                assert f"span {max(spans)} nodes" in check_placement(job, placed)[0]
            else:
                with pytest.raises(UserError, match=r"parallelism\.expert.*boundary"):
                    check_placement(job, placed)


def test_placement_of_the_phase_in_which_the_most_ranks_share_sequences() -> None:
    def lines(context: int) -> str:
        phases = [Phase(tokens=512), Phase(tokens=512, context=context), Phase(tokens=512, context=1)]
        recipe = load_recipe(RECIPE)
        placed = replace(recipe, data=replace(recipe.data, phases=phases))
        return "\n".join(check_placement(replace(JOB, nodes=2, gpus_per_node=4), placed))

    assert "placement: groups of 4 that share sequences stay within a node" in lines(4)
    assert "warning: groups of 8 that share sequences cross nodes" in lines(8)
    assert "share sequences" not in lines(1)


def test_placement_of_an_exchange_once_per_node() -> None:
    recipe = load_recipe(RECIPE, ["training.global_batch_sequences=64", "training.microbatch_sequences=1"])
    job = replace(JOB, nodes=4, gpus_per_node=4)

    def placed(local: int | None) -> list[str]:
        layout = replace(recipe.parallelism, expert=8, exchange_node_ranks=local)
        return check_placement(job, replace(recipe, parallelism=layout))

    assert "exchange_node_ranks=4 would send it once per node" in placed(None)[0]
    assert "tokens cross the network once per node" in placed(4)[0]
    with pytest.raises(UserError, match=r"exchange_node_ranks: takes 8 ranks for a node, .*; set it to 4"):
        placed(8)


@pytest.mark.parametrize(
    "changed,key",
    [
        ({"nodes": 0}, "--nodes"),
        ({"hours": 0}, "--hours"),
        ({"name": "A_b"}, "--name"),
        ({"environment": {"a-b": "1"}}, "--env"),
        ({"nodes": 9}, "--hosts"),
        ({"mounts": ("data",)}, "--mount"),
        ({"claims": {"shards": "data"}}, "--claim"),
        ({"claims": {"A_b": "/data"}}, "--claim"),
        ({"nodes": 5, "hosts": ()}, "training.global_batch_sequences"),
        ({"overrides": ("on_existing=overwrite",)}, "on_existing"),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        check_job(replace(JOB, **({"overrides": ()} | changed)))
    assert error.value.key == key and error.value.remedy


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RECIPE, "--on", "kubernetes", "--nodes", "8", "--render"]) == USAGE_STATUS
    assert "--image" in capsys.readouterr().err
    for option, value in (("--image", "i"), ("--partition", "p"), ("--claim", "a=/b"), ("--mount", "/d")):
        words = ["--on", "composer", "--hosts", "h", "--nodes", "1", option, value, "--render"]
        assert main([RECIPE, *words]) == USAGE_STATUS
        assert f"{option}: composer does not use it; it is for" in capsys.readouterr().err
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/bash\ncat "$1" >got\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main([RECIPE, "--nodes", "8"]) == 0
    (kept,) = (tmp_path / "runs/submitted").glob("dbrx-moe-a-*.sbatch")
    assert kept.read_text() == (tmp_path / "got").read_text()
    capsys.readouterr()
    assert main([RECIPE, "--nodes", "8", "--render"]) == 0
    assert capsys.readouterr().out == kept.read_text()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main([RECIPE, "--nodes", "8", "--on", "skypilot"]) == USAGE_STATUS
    assert "sky: not found" in capsys.readouterr().err
