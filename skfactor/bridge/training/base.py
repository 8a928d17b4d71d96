"""`TrainingMethod`: what a compression method does while its network is trained."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skfactor.bridge.result import CompressionResult

__all__ = ["TrainingMethod"]


class TrainingMethod:
    """Base of the methods that take part in training: a network, a penalty, and what is done after steps and epochs.

    A user's own loop needs five lines of it::

        method = SomeMethod(model, ...)                    # a copy is prepared; `model` is never changed
        optimizer = SGD(method.model.parameters(), ...)    # any optimizer, any loop
        loss = criterion(method.model(x), y) + method.penalty()
        loss.backward(); optimizer.step(); method.after_step()
        method.after_epoch()                               # at the end of every epoch
        result = method.finish()                           # plain layers, and a file: a CompressionResult

    Attributes
    ----------
    model : Module
        The network to train. Its parameters are those that an optimizer gets.
    """

    model: nn.Module

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters as an optimizer takes them, those of the method itself included.

        A method whose own parameters (a mixture, step sizes) want another learning rate says so here.
        """
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def penalty(self) -> torch.Tensor:
        """Differentiable scalar that is added to the loss; 0 where the method has none."""
        return torch.zeros((), device=next(self.model.parameters()).device)

    def after_step(self) -> None:
        """Called after each step of the optimizer: pins what must not move."""

    def after_epoch(self) -> None:
        """Called after each epoch: refreshes assignments, advances schedules."""

    def finish(self) -> CompressionResult:
        """The compressed network with plain layers, as `skfactor.compress` gives it; `model` stays as it is."""
        raise TypeError(f"{type(self).__name__} does not define finish()")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `load_state_dict` needs to go on with the same result: tensors and plain values."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
