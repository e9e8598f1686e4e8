"""Known faults of an exchange of tokens once per node, for :mod:`launch.verify.faults`."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from train.model.node_exchange import OverNode

_arrive = OverNode.arrive
_pass_back = OverNode.pass_back


def drop_row() -> AbstractContextManager[Any]:
    """Loses the last row that each rank's experts are sent from inside their node."""

    def arrive(self: OverNode) -> Tensor:
        rows_ND = _arrive(self)
        is_left_N1 = torch.ones_like(rows_ND[:, :1])
        is_left_N1[-1:] = 0
        return rows_ND * is_left_N1

    return mock.patch.object(OverNode, "arrive", arrive)


def weigh_twice() -> AbstractContextManager[Any]:
    """Applies each expert's weight on its node and once more."""

    def pass_back(self: OverNode) -> None:
        self.weights_YK = self.weights_YK.square()
        _pass_back(self)

    return mock.patch.object(OverNode, "pass_back", pass_back)


def lose_gradients_of_weights() -> AbstractContextManager[Any]:
    """Sends no gradient of the experts' weights back from their node."""

    def pass_back(self: OverNode) -> None:
        if self.weights_YK.requires_grad:
            self.weights_YK.register_hook(torch.zeros_like)
        _pass_back(self)

    return mock.patch.object(OverNode, "pass_back", pass_back)
