"""Text in options, variables and arguments reaches ranks as words: no shell on the way takes it for more."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.submit import hosts, kubernetes, slurm
from launch.submit.__main__ import main
from launch.submit.job import check_job, check_words
from tests.launch.submit.test_submit import JOB, RECIPE, ROOT
from train.recipe.errors import UserError

HOSTILE = (
    "a\ntouch {mark}",
    "$(touch {mark})",
    "`touch {mark}`",
    "x;touch {mark}",
    "x y",
    "'",
    "-oProxyCommand=x",
    "a\\b",
)
"""Text that a shell, a scheduler or a remote shell would take for more than a word."""


@pytest.mark.parametrize(
    "option",
    [
        "partition",
        "account",
        "cluster",
        "gpu_type",
        "interface",
        "hosts",
        "image",
        "mounts",
        "claims",
        "resources",
    ],
)
def test_a_value_of_several_words_is_refused_in_one_line(option: str, tmp_path: Path) -> None:
    for text in (form.format(mark=tmp_path / "mark") for form in HOSTILE):
        values: dict[str, Any] = {
            "hosts": (*JOB.hosts, text),
            "mounts": ("/data", text if text[0] == "-" else f"/{text}"),
            "claims": {"data": text if text[0] == "-" else f"/{text}"},
            "resources": {text: "1"},
        }
        with pytest.raises(UserError) as raised:
            check_words(replace(JOB, **{option: values.get(option, text)}))
        assert raised.value.key.startswith("--") and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"--resource: '8 \$\(x\)' is not valid"):
        check_words(replace(JOB, resources={"rdma/ib": "8 $(x)"}))
    with pytest.raises(UserError, match="--workdir"):
        check_words(replace(JOB, workdir="/a b"))
    with pytest.raises(UserError, match="--env"):
        check_job(replace(JOB, environment={"A=$(x)": "1"}))


def test_common_names_are_taken() -> None:
    check_job(
        replace(
            JOB,
            overrides=(),
            partition="gpu-h100,gpu_2",
            account="team/llm.2026",
            interface="^lo,docker0",
            image="registry.example.com:5000/team/finegrain@sha256:0123abcd",
            mounts=("/shared/Größe_1.5@x", "/"),
            hosts=(*(f"10.0.0.{n}" for n in range(7)), "fe80::1%eth0"),
            resources={"rdma/ib": "8", "example.com/memory": "1.5Gi"},
        )
    )
    check_words(replace(JOB, image="/shared/finegrain+24.sqsh"))


@pytest.mark.parametrize("launcher", ["slurm", "hosts"])
def test_values_of_variables_and_arguments_run_nothing(launcher: str, tmp_path: Path) -> None:
    """The rendered script is run, with everything that it starts replaced by `env`."""
    texts = tuple(form.format(mark=tmp_path / "mark") for form in HOSTILE)
    job = replace(
        JOB,
        overrides=tuple(f"name={text}" for text in texts),
        environment={f"V{number}": text for number, text in enumerate(texts)},
        workdir=str(tmp_path),
        image="",
    )
    text = slurm.render(job) if launcher == "slurm" else hosts.render(job, "composer")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stub = tmp_path / ".venv/bin/python"
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >words\nenv -0 >variables\n')
    stub.chmod(0o755)
    script = f"scontrol() {{ echo n1; }}; set -- ; {text}"
    subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"},
        check=True,
    )
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words[-len(texts) :] == list(job.overrides)
    found = dict(line.split("=", 1) for line in (tmp_path / "variables").read_text().split("\0") if line)
    if launcher == "hosts":
        found = dict(word.split("=", 1) for word in shlex.split(found["VARIABLES"]))
    assert [found[f"V{number}"] for number in range(len(texts))] == list(texts)
    assert not (tmp_path / "mark").exists()


def test_a_hosts_name_is_one_word_of_the_remote_line(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "REMOTE_SHELL": f"bash {ROOT / 'launch/submit/here.sh'}",
        "WORKDIR": str(tmp_path),
        "RANKS_PER_NODE": "1",
        "MASTER_PORT": "1",
        "LAUNCHER": "composer",
        "SAVE_SECONDS": "1",
        "VARIABLES": "",
    }
    for form in HOSTILE[1:4]:
        step = ["bash", ROOT / "launch/submit/ssh_step.sh", form.format(mark=tmp_path / "mark"), "x.yaml"]
        subprocess.run(step, env=environment, capture_output=True, check=False, timeout=60)
        assert not (tmp_path / "mark").exists()
    step = ["bash", ROOT / "launch/submit/ssh_step.sh", "n1,-oProxyCommand=x", "x.yaml"]
    refused = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "would take it for an option" in refused.stderr


def test_kubernetes_expands_nothing_of_ours() -> None:
    """By Kubernetes' own rules: $$ is $, $(NAME) is a variable's value, any other $ stays."""
    texts = ("$(MASTER_ADDR)-x", "$$(A)", "$A$$B", "$", "$$", "a$(")
    job = replace(JOB, overrides=tuple(f"name={text}" for text in texts), environment={"T": "".join(texts)})
    (container,) = kubernetes.pod_spec(job)["containers"]

    def expanded(text: str) -> str:
        return re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else "EXPANDED", text)

    assert [expanded(word) for word in container["command"][-len(texts) :]] == list(job.overrides)
    (value,) = (each["value"] for each in container["env"] if each["name"] == "T")
    assert expanded(value) == "".join(texts)


def test_a_submitted_file_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main([RECIPE, "--nodes", "8", "--workdir", "/finegrain", "--env", "SITE=x"]) == 0
    (file,) = (tmp_path / "runs/submitted").iterdir()
    assert file.stat().st_mode & 0o077 == 0
