"""What training a grid will take: peak memory and disk from the shapes, before anything is allocated.

memory = weights + moments of every SAE, which stay
       + gradients and working space of one SAE at a time, the hungriest
       + the batch at every hook point, and what the stream holds
"""

from collections.abc import Mapping
from typing import NamedTuple

from sae.autoencoder.architectures.gated import Gated
from sae.autoencoder.architectures.jumprelu import JumpReLU
from sae.autoencoder.architectures.relu import ReLU
from sae.autoencoder.architectures.topk import TopK
from sae.autoencoder.sparsity import Sparsity, find_architecture
from sae.errors import UserError
from sae.kernels.cpu import CHUNK_BYTES, CHUNK_ROWS
from sae.kernels.moments import BYTES_PER_PARAMETER
from sae.kernels.operands import Precision
from sae.train.checkpoint import KEEP
from sae.train.grid import SAESpec
from sae.train.initialise import sample_rows
from sae.train.settings import TrainSettings

FIXED_BYTES = 32 * 2**20
"""Buffers of the libraries underneath, and memory their allocators keep."""
DISK_REMEDY = "use fewer or narrower SAEs (sae.d_sae, harvest.hook_names), or train.moments=float8"
ENTRY_BYTES = 72
"""Of one selected entry while a step runs: position and value twice over (by token and by latent), activation and
its gradients."""
NEAR = 2.0
"""Entries looked at per active latent, where a threshold's neighbourhood is looked at too (jumprelu, batch_topk)."""
START_BYTES = 16
"""Of one pre-activation while its order statistic is found."""
DEAD_SHARE = 0.1
"""Part of the latents that is taken to be dead at a time, once training lasts long enough for any to be. While more
are, a step takes more memory than estimated: copies of their rows, and their gradients."""
DENSE_FROM = 0.15
"""Target density above which jumprelu is taken to go the dense way; kernels differ."""
NESTED = 6
"""Stages that a nested reconstruction is taken to have."""
DENSE_COPIES = 6
"""[batch d_sae] fp32 matrices alive at once on the dense path."""


class Plan(NamedTuple):
    """Bytes, in all; see the module's formula."""

    weights: int
    moments: int
    gradients: int
    workspace: int
    batch: int
    checkpoints: int
    """On disk: the kept checkpoints and the one being written."""
    saved: int
    """On disk: the finished SAEs."""

    @property
    def memory(self) -> int:
        """Peak memory of training, beyond what the process holds already and what the stream reads."""
        return self.weights + self.moments + self.gradients + self.workspace + self.batch + FIXED_BYTES

    @property
    def disk(self) -> int:
        """Most on disk at once, besides the activation store."""
        return max(self.checkpoints, self.checkpoints - self.checkpoints // (KEEP + 1) + self.saved)


def plan(
    specs: list[SAESpec], d_in: Mapping[str, int], settings: TrainSettings, kernels: str, precision: Precision
) -> Plan:
    """Add up what a grid needs.

    Args:
        specs: the SAEs.
        d_in: width of each hook point.
        settings: shared settings.
        kernels: name of the kernels that will run (see `sae.kernels.pick`).
        precision: of the encoder product.
    """
    width = {spec: Width.of(spec, d_in) for spec in specs}
    matrices = [spec.d_sae * width[spec].both for spec in specs]
    weights, moments = 4 * sum(matrices), BYTES_PER_PARAMETER[settings.moments] * sum(matrices)
    steps = [_step(spec, width[spec], settings, kernels, precision) for spec in specs]
    widths = [d_in[name] for name in dict.fromkeys(name for spec in specs for name in spec.site.hooks)]
    joined = [Width.of(spec, d_in).both for spec in specs if spec.site.kind == "crosscoder"]
    gradients, workspace = max(steps, key=sum)
    start = max(_start(spec) for spec in specs)
    workspace = max(workspace, start - gradients)
    return Plan(
        weights,
        moments,
        gradients,
        workspace,
        # As the stream gives it, and scaled; a crosscoder's sources side by side once more.
        4 * settings.batch_tokens * (2 * sum(widths) + max(joined, default=0) // 2),
        (KEEP + 1) * (weights + moments),
        weights,
    )


class Width(NamedTuple):
    """Of what an SAE reads and writes."""

    read: int
    write: int

    @classmethod
    def of(cls, spec: SAESpec, d_in: Mapping[str, int]) -> "Width":
        """Add up the hook points of the site."""
        return cls(sum(d_in[name] for name in spec.site.reads), sum(d_in[name] for name in spec.site.writes))

    @property
    def both(self) -> int:
        """Numbers a latent has in the two matrices."""
        return self.read + self.write


def _step(spec: SAESpec, width: Width, settings: TrainSettings, kernels: str, precision: Precision) -> tuple[int, int]:
    """Gradients, and working space beside them, of one SAE's step at its fullest."""
    batch, d_sae = settings.batch_tokens, spec.d_sae
    gradients = 4 * d_sae * width.both
    if kernels == "reference":
        return gradients, 4 * batch * d_sae * DENSE_COPIES
    stages = _stages(spec)
    # Centred inputs; then reconstructions, error and its gradient, at every stage.
    tokens = 4 * batch * (width.read + 3 * stages * width.write)
    low = precision is not Precision.float32
    search = d_sae * width.read * (precision.dtype.itemsize if low else 0)
    row_bytes = d_sae * precision.dtype.itemsize
    chunk = min(batch * row_bytes, max(CHUNK_BYTES, CHUNK_ROWS * row_bytes))
    near = 1.0 if issubclass(find_architecture(spec.architecture), TopK) else NEAR
    entries = int(ENTRY_BYTES * near * spec.l0 * batch)
    matrix = 4 * batch * d_sae * DENSE_COPIES if _may_be_dense(spec) else _auxk(spec, width, settings)
    # The search is over before the first gradient is made, but allocators keep what it took for the next one.
    return gradients, tokens + search + chunk + entries + matrix


def _stages(spec: SAESpec) -> int:
    """Stages of a nested reconstruction, about; 1 for all others."""
    return NESTED if find_architecture(spec.architecture).levels is not Sparsity.levels else 1


def _start(spec: SAESpec) -> int:
    """Working space while thresholds are set, before the first step."""
    if find_architecture(spec.architecture).initialise is Sparsity.initialise:
        return 0
    return START_BYTES * sample_rows(spec.d_sae) * spec.d_sae


def _may_be_dense(spec: SAESpec) -> bool:
    """Architectures that start dense, or know no sparse path."""
    architecture = find_architecture(spec.architecture)
    many = issubclass(architecture, JumpReLU) and spec.l0 > DENSE_FROM * spec.d_sae
    return issubclass(architecture, ReLU | Gated) or many or architecture.select is Sparsity.select


def _auxk(spec: SAESpec, width: Width, settings: TrainSettings) -> int:
    """Working space of the auxiliary loss: rows of dead latents, their gradients, and their pre-activations."""
    possible = settings.total_tokens > settings.dead_after and settings.auxk_alpha > 0
    if not possible or not find_architecture(spec.architecture).uses_auxk:
        return 0
    n_dead = int(DEAD_SHARE * spec.d_sae)
    return 4 * n_dead * (2 * width.both + 3 * settings.batch_tokens)


def check_memory(plan: Plan, available: int, what: str) -> None:
    """Refuse a grid that cannot fit.

    Args:
        plan: what it needs.
        available: bytes free on the device.
        what: the device, for the message.

    Raises:
        UserError: with the setting that would make room.
    """
    if plan.memory <= available:
        return
    missing = plan.memory - available
    if missing <= plan.moments * 3 // 4 and plan.moments >= 2 * plan.weights:  # they are fp32 now
        remedy = "train.moments=float8"
    elif missing <= (plan.workspace + plan.batch) * 3 // 4:
        remedy = "a smaller train.batch_tokens"
    else:
        remedy = "fewer or narrower SAEs (sae.d_sae, harvest.hook_names)"
    raise UserError(
        f"training these SAEs would take {plan.memory / 1e9:.1f} GB and {what} has {available / 1e9:.1f} GB free: use "
        f"{remedy}."
    )
