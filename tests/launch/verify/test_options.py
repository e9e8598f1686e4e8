"""The command line selects the checks, and refuses options that none of them reads."""

from argparse import ArgumentParser, Namespace

import pytest

from launch.verify.options import CHECKS, add_arguments, bind_count, choose_checks
from train.recipe.errors import UserError


def parse(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    add_arguments(parser)
    options = parser.parse_intermixed_args(bind_count(arguments))
    choose_checks(options)
    return options


@pytest.mark.parametrize(
    ("given", "checks"),
    [
        ([], ["layouts"]),
        (["--resume"], ["resume"]),
        (["--export", "--layouts"], ["layouts", "export"]),
        (["--faults"], ["faults"]),
        (["--rollback"], ["rollback"]),
        (["--all"], list(CHECKS)),
    ],
)
def test_checks_are_those_asked_for(given: list[str], checks: list[str]) -> None:
    for arguments in (["r.yaml", "seed=1", *given], [*given, "r.yaml", "seed=1"]):
        options = parse(arguments)
        assert (options.recipe, options.overrides, options.checks) == ("r.yaml", ["seed=1"], checks)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--faults", "7", "r.yaml"], 7),
        (["r.yaml", "--faults"], 50),
        (["--faults", "r.yaml"], 50),
        (["--all", "r.yaml"], 50),
        (["--all", "--faults=3", "r.yaml"], 3),
        # launch.drill, which is now `launch.verify --faults`, had a count of that name.
        (["--faults", "r.yaml", "--faults", "9"], 9),
    ],
)
def test_faults_may_be_counted(arguments: list[str], count: int) -> None:
    options = parse(arguments)
    assert (options.recipe, options.faults) == ("r.yaml", count)


@pytest.mark.parametrize(
    ("arguments", "key", "check"),
    [
        (["--kills", "3"], "--kills", "--resume"),
        (["--resume", "--worlds", "2"], "--worlds", "--layouts"),
        (["--rollback", "--inject", "local-norm"], "--inject", "--layouts"),
        (["--resume", "--seed", "0"], "--seed", "--faults"),
        (["--only", "NaN"], "--only", "--faults"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(arguments: list[str], key: str, check: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(["r.yaml", *arguments])
    assert refused.value.key == key and check in refused.value.remedy


@pytest.mark.parametrize("arguments", [["--faults", "0"], ["--faults", "-3"], ["--resume", "--kills", "0"]])
def test_counts_are_at_least_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["r.yaml", *arguments])
    assert "must be at least 1" in capsys.readouterr().err
