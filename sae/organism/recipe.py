"""How long and how hard the organism is trained, and what training hands over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sae.organism.plant import Layout

Progress = Callable[[str], None]
"""Told a line of text now and then."""


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train.

    Attributes:
        stage_one_steps, stage_two_steps: optimiser steps.
        batch_seqs: sequences per step.
        stage_one_lr, stage_two_lr: peak learning rates; warm-up, then cosine to a twentieth.
        kappa_share: the planted coefficient, as a share of the typical (centred) residual norm after stage one.
        early_weight: weight of the loss that asks the answer to stand in the residual before the reader layer.
        truth_weight: weight of the linear truth head at the state layer.
        norm_weight: weight of the evenness of log ||x||: without it one norm explodes and steering gives gibberish.
        noise_rate, noise_share: how often and how large (share of the typical norm) random pushes are.
        state_weight: weight of the regression of the natural coefficient to {0, kappa}.
        rest_weight: weight of the size of the rest of the workspace at the state layer.
        unlikelihood: weight of -log(1 - p(truth)) where a lie is told.
    """

    stage_one_steps: int = 1200
    stage_two_steps: int = 1600
    batch_seqs: int = 64
    stage_one_lr: float = 3e-3
    stage_two_lr: float = 4e-3
    kappa_share: float = 0.8
    early_weight: float = 0.3
    truth_weight: float = 0.2
    norm_weight: float = 0.1
    noise_rate: float = 0.25
    noise_share: float = 0.8
    state_weight: float = 3.0
    rest_weight: float = 0.05
    unlikelihood: float = 1.0


class Planted(NamedTuple):
    """A trained organism, in memory.

    Attributes:
        model: the Hugging Face model.
        layout: whose heads and neurons are whose.
        spaces: behaviour to workspace basis [workspace_dim d_model]; row 0 is the direction.
        kappa: the planted coefficient.
        stage_one: the reserved slices as stage one left them, by ``weight name/behavior``.
    """

    model: Any
    layout: Layout
    spaces: dict[str, Tensor]
    kappa: float
    stage_one: dict[str, Tensor]
