"""Options that differ by site: directives, set-up, secrets, queues, tolerations, folders, memory."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan.hardware import GPUS
from launch.plan.step import make_plan
from launch.submit import hosts, kubernetes, slurm
from launch.submit.__main__ import main
from launch.submit.job import Job
from launch.submit.placement import check_memory
from launch.submit.site import check_mounts, check_site, toleration
from train.main import main as train
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "yamls/dbrx-moe-a.yaml")
TOO_LARGE = ["training.global_batch_sequences=6144", "training.microbatch_sequences=96"]
JOB = Job(RECIPE, name="moe-a", nodes=8, workdir="/finegrain")


def test_directives_are_added_and_gres_takes_the_place_of_gpus() -> None:
    job = replace(JOB, directives={"qos": "high", "gres": "gpu:h100:8", "exclude": "n[1-3,7]", "hold": ""})
    check_site(job, "slurm")
    lines = slurm.render(job).splitlines()
    for directive in ("qos=high", "gres=gpu:h100:8", "exclude=n[1-3,7]", "hold"):
        assert f"#SBATCH --{directive}" in lines
    assert not any("gpus-per-node" in line for line in lines)
    assert "#SBATCH --gpus-per-node=8" in slurm.render(JOB).splitlines()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"directives": {"qos": "a b"}}, "--sbatch: qos='a b' is not valid"),
        ({"directives": {"qos": "a\n#SBATCH --uid=0"}}, "--sbatch: qos"),
        ({"directives": {"a b": "c"}}, "--sbatch: a b"),
        ({"directives": {"nodes": "9"}}, "--sbatch: nodes has an option; use --nodes"),
        ({"directives": {"signal": "KILL@1"}}, "--sbatch: signal is fixed"),
        ({"secrets": {"TOKEN": "abc"}}, "--secret: TOKEN has a value, which would be in a file"),
        ({"secrets": {"A B": ""}}, "--secret: 'A B' is not a variable name"),
        ({"environment": {"HF_TOKEN": "abc"}}, "--env: HF_TOKEN looks like a secret"),
        ({"namespace": "a b"}, "--namespace: 'a b'"),
        ({"queue": "$(x)"}, "--queue: '$(x)'"),
        ({"tolerations": ("gpu=yes:Never",)}, "--toleration: 'gpu=yes:Never' is not valid"),
    ],
)
def test_what_is_not_one_value_is_refused_in_one_line(changed: dict[str, object], error: str) -> None:
    with pytest.raises(UserError) as found:
        check_site(replace(JOB, **changed), "slurm")  # type: ignore[arg-type]
    assert str(found.value).startswith(error) and "\n" not in str(found.value)


@pytest.mark.parametrize("launcher", ["slurm", "hosts"])
def test_the_set_up_is_read_before_the_ranks_start(launcher: str, tmp_path: Path) -> None:
    setup = tmp_path / "it's set-up.sh"
    setup.write_text('export MODULE=loaded; : "$UNSET"\n')
    job = replace(JOB, setup=str(setup), workdir=str(tmp_path), hosts=tuple(f"h{n}" for n in range(8)))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stub = tmp_path / ".venv/bin/python"
    stub.write_text('#!/bin/bash\necho "$MODULE" >seen\necho "$VARIABLES" >variables\n')
    stub.chmod(0o755)
    text = slurm.render(job) if launcher == "slurm" else hosts.render(job, "composer")
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    script = ["bash", "-c", f"scontrol() {{ echo n1; }}; set -- ; {text}"]
    subprocess.run(script, cwd=tmp_path, env=environment, check=True)
    if launcher == "slurm":
        assert (tmp_path / "seen").read_text() == "loaded\n"
        return
    words = dict(word.split("=", 1) for word in shlex.split((tmp_path / "variables").read_text()))
    assert words["SETUP"] == str(setup)
    (tmp_path / "composer").write_text('#!/bin/bash\necho "$MODULE"\n')
    (tmp_path / "composer").chmod(0o755)
    of_node = {"NODES": "1", "NODE_RANK": "0", "RANKS_PER_NODE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    step = tmp_path / "launch/submit/node.sh"
    step.parent.mkdir(parents=True)
    step.write_text((ROOT / "launch/submit/node.sh").read_text())
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SETUP": str(setup)}
    command = ["bash", step, "x.yaml"]
    ran = subprocess.run(command, env=path | of_node, capture_output=True, text=True, check=True)
    assert ran.stdout == "loaded\n"


def test_kubernetes_fills_in_secrets_and_knows_namespace_queue_and_taints() -> None:
    job = replace(
        JOB,
        image="i",
        secrets={"HF_TOKEN": "hub/token"},
        namespace="team",
        queue="nightly",
        tolerations=("nvidia.com/gpu:NoSchedule", "team=llm"),
    )
    check_site(job, "kubernetes")
    manifest, pod = kubernetes.manifest(job), kubernetes.pod_spec(job)
    assert manifest["metadata"]["namespace"] == "team"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "nightly"}
    reference = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert reference in pod["containers"][0]["env"]
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "llm"},
    ]
    assert toleration("a=b:NoExecute")["effect"] == "NoExecute"
    with pytest.raises(UserError, match="HF_TOKEN names no key of a secret; write NAME=SECRET/KEY"):
        check_site(replace(job, secrets={"HF_TOKEN": "hub"}), "kubernetes")


def test_a_secret_that_is_not_set_is_named_and_no_file_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    words = [RECIPE, "--nodes", "8", "--secret", "HF_TOKEN"]
    assert main(words) == 2
    assert "HF_TOKEN is not set here; export HF_TOKEN first" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert main(words) == 0
    (file,) = (tmp_path / "runs/submitted").iterdir()
    assert "#SBATCH --export=ALL" in file.read_text() and "verysecret" not in file.read_text()


def test_runs_and_shards_of_containers_must_be_on_a_mount() -> None:
    job = replace(JOB, image="i", mounts=("/shared",))
    recipe = load_recipe(RECIPE, ["runs_dir=/shared/runs", "data.shards=/shared/shards"])
    check_mounts(job, recipe, "kubernetes")
    with pytest.raises(UserError, match=r"runs_dir: /finegrain/runs is on no mount: .*--claim"):
        check_mounts(job, load_recipe(RECIPE, ["data.shards=/shared/shards"]), "kubernetes")
    with pytest.raises(UserError, match=r"data\.shards: /sharedx/s is on no mount"):
        check_mounts(job, load_recipe(RECIPE, ["runs_dir=/shared/r", "data.shards=/sharedx/s"]), "kubernetes")
    # pyxis mounts the checkout, and without an image nothing is in a container.
    own = load_recipe(RECIPE, ["runs_dir=runs", "data.shards=shards"])
    check_mounts(job, own, "slurm")
    check_mounts(JOB, own, "kubernetes")


def test_the_planner_is_asked() -> None:
    recipe = load_recipe(RECIPE, [])
    plan = make_plan(recipe, 64, GPUS["h100"])
    share = f"{plan.fullest.memory.total / GPUS['h100'].memory_bytes:.0%}"
    line = f"plan: the peak of a step takes {share} of an H100's memory"
    assert plan.fits and check_memory(JOB, recipe) == [line]
    large = load_recipe(RECIPE, TOO_LARGE)
    assert not make_plan(large, 64, GPUS["h100"]).fits
    (line,) = check_memory(JOB, large)
    assert re.fullmatch(
        r"warning: plan: .* takes \d+% .*; (training\.microbatch_sequences)=(\d+) by .*", line
    )
    key, value = re.findall(r"([\w.]+)=(\d+) by", line)[0]
    assert make_plan(load_recipe(RECIPE, [*TOO_LARGE, f"{key}={value}"]), 64, GPUS["h100"]).fits
    assert check_memory(replace(JOB, gpu_type="B999"), recipe) == []


def test_a_dry_run_takes_the_number_of_ranks_and_asks_the_planner(capfd: pytest.CaptureFixture[str]) -> None:
    assert train([RECIPE, *TOO_LARGE, "--dry-run", "--ranks", "64"]) == 0
    said = capfd.readouterr().out
    assert "= 64 ranks x" in said
    assert check_memory(JOB, load_recipe(RECIPE, TOO_LARGE)) == [f"warning: {said.splitlines()[-1]}"]
    assert train([RECIPE, "--dry-run", "--ranks", "64", "--gpu", "h999"]) == 2
    assert "--gpu: 'h999' is not known" in capfd.readouterr().err
    assert train([RECIPE, "--dry-run", "--ranks", "7"]) == 2
    assert "training.global_batch_sequences" in capfd.readouterr().err
    for option, value in (("--ranks", "7"), ("--gpu", "h100")):
        assert train([RECIPE, option, value]) == 2
        assert f"{option}: is for --dry-run" in capfd.readouterr().err
