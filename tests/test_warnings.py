"""Deprecated calls of our own fail tests; those of other packages do not."""

import warnings

import pytest

DEPRECATIONS = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]


@pytest.mark.parametrize("category", DEPRECATIONS)
@pytest.mark.parametrize(
    "module", ["train.layout.mesh", "data.loader", "launch.plan.text", "tests.fake_world"]
)
def test_a_deprecated_call_of_ours_is_an_error(category: type[Warning], module: str) -> None:
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", [*DEPRECATIONS, UserWarning])
@pytest.mark.parametrize("module", ["torch.nn", "datasets.load", "trainer.run"])
def test_one_of_another_package_is_not(category: type[Warning], module: str) -> None:
    warnings.warn_explicit("old", category, "file.py", 1, module=module)


def test_the_caller_is_recognised_by_its_module() -> None:
    with pytest.raises(FutureWarning):
        warnings.warn("old", FutureWarning, stacklevel=1)


def test_torch_names_itself_as_the_place_of_some() -> None:
    message = "Slicing a flattened dim from root mesh will be deprecated in PT 2.11. "
    with pytest.raises(UserWarning):
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module="torch.distributed.device_mesh")
