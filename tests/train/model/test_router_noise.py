"""Router noise is uniform, independent of the batch's split, and different at every place."""

import torch

from train.model.router_noise import mix, noise_key, uniform_noise


def key(seed: int, layer: int) -> torch.Tensor:
    return noise_key(seed, layer, torch.device("cpu"))


def test_noise_does_not_depend_on_the_split() -> None:
    positions = torch.arange(100, 108)
    whole = uniform_noise(positions, 8 * 16, 32, key(3, 1))
    parts = [uniform_noise(part, 2 * 16, 32, key(3, 1)) for part in positions.split(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_differs_with_seed_layer_position_token_and_column() -> None:
    positions = torch.tensor([5, 5 + (1 << 32), 6])
    noise = uniform_noise(positions, 3 * 4, 8, key(1, 0))
    assert noise.unique().numel() == noise.numel()
    for other in (dict(seed=2, layer=0), dict(seed=1, layer=1)):
        assert (uniform_noise(positions, 3 * 4, 8, key(**other)) != noise).all()


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniform_noise(torch.arange(64), 64 * 32, 64, key(17, 2))
    assert noise.min() >= 0 and noise.max() < 1
    shares = torch.histc(noise, 16, 0, 1) / noise.numel()
    assert (shares * 16 - 1).abs().max() < 0.02
    centred = noise - 0.5
    for along in (0, 1):
        neighbours = (centred * centred.roll(1, along)).mean() * 12
        assert neighbours.abs() < 0.01


def test_mixing_is_a_bijection_as_far_as_it_was_tried() -> None:
    assert mix(torch.arange(1 << 16)).unique().numel() == 1 << 16
