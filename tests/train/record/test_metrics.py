import pytest

from train.record import metrics


def test_every_key_of_the_module_is_described_once() -> None:
    keys = {value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}
    assert sorted(metric.key for metric in metrics.METRICS) == sorted(keys)


@pytest.mark.parametrize(
    ("key", "template"),
    [
        ("loss/train", metrics.LOSS),
        ("loss/validation/code", metrics.LOSS_VALIDATION),
        ("bits_per_byte/validation/prose-en", metrics.BITS_PER_BYTE),
        ("experts/39/dead", metrics.EXPERT_DEAD),
    ],
)
def test_keys_are_found_by_their_template(key: str, template: str) -> None:
    found = metrics.find_metric(key)
    assert found is not None
    assert found.key == template


@pytest.mark.parametrize("key", ["loss/trains", "loss/validation", "experts/1/2/dead", "step", "time/epoch"])
def test_other_keys_are_not(key: str) -> None:
    assert metrics.find_metric(key) is None
    assert metrics.translate(key) is None


def test_composers_keys_become_ours() -> None:
    assert metrics.translate("loss/train/language") == metrics.LOSS
    assert metrics.translate("metrics/validation/code/token_loss") == metrics.validation_loss("code")
    assert metrics.translate(metrics.GRADIENT_NORM) == metrics.GRADIENT_NORM


def test_names_in_a_template() -> None:
    keys = ["loss/validation/code", "loss/validation/prose", "loss/train"]
    assert metrics.match_names(metrics.LOSS_VALIDATION, keys) == {"code": keys[0], "prose": keys[1]}
    assert metrics.of_layer(metrics.EXPERT_IDLEST, 3) == "experts/3/idlest"
