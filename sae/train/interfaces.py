"""What the trainer is handed: a stream of activations and a sink for metrics. Duck types, so it imports neither."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ActivationBatch(Protocol):
    """What a stream yields."""

    @property
    def acts(self) -> Mapping[str, Tensor]:
        """Hook name -> [batch d_in], any float type."""


@runtime_checkable
class Stream(Protocol):
    """An endless, resumable source of activation batches."""

    batch_tokens: int

    @property
    def d_in(self) -> Mapping[str, int]:
        """Hook name -> width."""

    def next_batch(self) -> ActivationBatch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Position, in plain JSON types."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


@runtime_checkable
class MetricSink(Protocol):
    """Where metrics go. Logging never changes the result."""

    def log(self, metrics: Mapping[str, float], step: int) -> Any:
        """Record named numbers at a step."""
