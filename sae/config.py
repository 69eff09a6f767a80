"""Typed configuration of every stage: one tree of dataclasses, filled from `configs/*.yaml` by Hydra.

Every stage composes the same `RunConfig` and reads its own sections, so an override means the same thing wherever
it is given. Groups (`lm=`, `data=`, `sae=`, `contrast=`, `experiment=`) choose presets; single keys
(`sae.d_sae=[512,2048]`) change one value. Values are checked here, when the dataclass is built; nothing in this
file imports torch.
"""

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from sae.errors import UserError, unknown
from sae.files import shipped

MISSING = "???"  # OmegaConf's mark for "must be given"
# What lies below these keys is checked where it is used.
FREE = ("sae.options.", "sae.options=", "behavior.files.", "behavior.files=")
BALANCES = ("none", "match", "strip")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


class Packing(enum.Enum):
    """How documents become rows of tokens."""

    auto = "auto"  # chats: document; running text: concat
    concat = "concat"  # documents joined and cut into full rows: running text
    document = "document"  # one document a row: chats


class Stream(enum.Enum):
    """Where training reads activations from."""

    store = "store"  # shards on disk, written once by `sae harvest`
    live = "live"  # the language model, run as training goes


class WandbMode(enum.Enum):
    """Where metrics go besides `metrics.jsonl`."""

    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class LMConfig:
    """The language model."""

    name: str = MISSING  # "organism", a local folder, or a Hugging Face name
    device: str = "auto"
    dtype: str = "float32"
    chat_template: str | None = None  # a Jinja template, or a path to one, for a model that ships none
    pair: str | None = None  # a second model with the same tokenizer; its hook points are pair.<name>
    library: str = "auto"  # whose hook points: transformer_lens, transformers, or the first that knows the model
    device_map: Any = None  # shard the model: auto, balanced, or {module path: device}, in place of lm.device
    quantize: str | None = None  # int8 or nf4: quantise the weights while loading (needs bitsandbytes)


@dataclass
class DataConfig:
    """The text whose activations are cached."""

    path: str = MISSING  # "organism", a file or folder (.txt .jsonl .parquet), or a Hugging Face dataset
    kind: str = "auto"
    text_field: str = "text"
    split: str = "train"
    packing: Packing = Packing.auto
    ctx_len: int = 128
    n_tokens: int = 1_000_000  # tokens kept for training (text), fewer when the text ends first
    n_eval_tokens: int = 20_000  # held-out tokens, from other documents than the training tokens
    include_special: bool = False  # let BOS, EOS and the like reach the SAE
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.ctx_len >= 4, f"data.ctx_len={self.ctx_len} is too short: give at least 4 tokens.")
        _require(
            self.n_tokens >= 1,
            f"data.n_tokens={self.n_tokens} leaves nothing to train on: give a positive number.",
        )
        _require(self.n_eval_tokens >= 1, f"data.n_eval_tokens={self.n_eval_tokens} leaves nothing to test on.")
        _require(self.seed >= 0, f"data.seed={self.seed} is negative: give 0 or more.")


@dataclass
class HarvestConfig:
    """Running the language model and writing the activation store."""

    hook_names: list[str] = field(
        default_factory=list
    )  # TransformerLens names; [] = resid_post at 1/4, 1/2, 3/4 of the depth
    batch_tokens: int = 8_192  # tokens in one forward pass of the language model
    shard_tokens: int = 262_144  # tokens in one shard, all hook points together
    dtype: str = "bfloat16"  # of the store: bfloat16, float16, float32, or int8 (half of bfloat16, see docs)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.batch_tokens >= 1, f"harvest.batch_tokens={self.batch_tokens} must be at least 1.")
        _require(self.shard_tokens >= 1, f"harvest.shard_tokens={self.shard_tokens} must be at least 1.")
        _require(
            self.dtype in ("bfloat16", "float16", "float32", "int8"),
            f"harvest.dtype={self.dtype!r} is not a storage type: use bfloat16, float16, float32 or int8.",
        )
        _require(self.seed >= 0, f"harvest.seed={self.seed} is negative: give 0 or more.")


@dataclass
class SAEGridConfig:
    """The grid of autoencoders: every combination is trained, at every hook point, from one stream."""

    architecture: list[str] = field(default_factory=lambda: ["topk"])
    d_sae: list[int] = field(default_factory=lambda: [1024])
    l0: list[float] = field(default_factory=lambda: [16.0])
    seed: list[int] = field(default_factory=lambda: [0])
    control: list[str] = field(
        default_factory=lambda: ["none"]
    )  # none | random | frozen_decoder | soft_frozen_decoder | frozen_encoder
    sites: list[str] = field(
        default_factory=list
    )  # a->b transcodes, a+b crosses; [] = each hook point, with lm.pair crossed with the second model's
    skip: bool = False  # transcoders also map input to output linearly
    options: dict[str, Any] = field(default_factory=dict)  # of the architectures: each takes its own


# What the trainer knows by name (a test keeps these equal to `sae.train.settings`, which this file must not import).
TRAIN_NAMES = {
    "encoder_dtype": ("auto", "float32", "bfloat16", "bfloat16_rescored"),
    "moments": ("float32", "bfloat16", "float8"),
    "kernels": ("auto", "reference", "torch", "cpp", "triton"),
    "centre": ("geometric_median", "mean", "zero"),
}


@dataclass
class TrainConfig:
    """The training loop. Rates and fractions are per SAE; tokens are activations at one hook point."""

    stream: Stream = Stream.store
    total_tokens: int = 2_000_000
    batch_tokens: int = 2_048
    live_buffer_tokens: int = 131_072  # a live stream shuffles within windows of this size
    lr: float | None = None  # None: 2.7 / sqrt(d_in) / (d_sae * steps)^(1/4) for each SAE
    lr_warmup_steps: int | None = None  # None: 1000 or 5% of the run, whichever is shorter
    lr_decay_fraction: float = 0.2
    adam_betas: list[float] | None = None  # None: the architecture's
    sparsity_warmup_steps: int | None = None  # of penalties; None: 5000 or 10% of the run, whichever is shorter
    start: str = ""  # a trained SAE's folder, or a run's train folder, to go on from; "" starts afresh
    centre: str = "geometric_median"  # what b_dec starts at: geometric_median | mean | zero
    clip: float = 1.0
    auxk_alpha: float = 1 / 32
    k_aux: int | None = None  # dead latents per token in the auxiliary loss; None: half the width
    dead_after_tokens: int | None = None  # None: 10 million or 5% of the run, whichever is less
    encoder_dtype: str = "auto"  # auto | float32 | bfloat16 | bfloat16_rescored; auto: bfloat16 where it is in hardware
    moments: str = "float32"  # of Adam: float32 | bfloat16 | float8
    kernels: str = "auto"  # auto | triton | cpp | torch | reference
    checkpoint_seconds: float = 300.0
    log_every: int = 50
    seed: int = 0  # of the order in which later epochs read the stream
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in TRAIN_NAMES.items():
            if getattr(self, name) not in known:
                raise unknown(f"train.{name}", getattr(self, name), list(known))
        betas = self.adam_betas
        _require(betas is None or len(betas) == 2, f"train.adam_betas={betas} must be two numbers.")
        _require(self.batch_tokens >= 2, f"train.batch_tokens={self.batch_tokens} must be at least 2.")
        _require(
            self.total_tokens >= self.batch_tokens,
            f"train.total_tokens={self.total_tokens} is less than one batch of {self.batch_tokens}: raise it.",
        )
        _require(self.seed >= 0, f"train.seed={self.seed} is negative: give 0 or more.")
        _require(
            self.live_buffer_tokens >= 1, f"train.live_buffer_tokens={self.live_buffer_tokens} must be at least 1."
        )


@dataclass
class EvalConfig:
    """Evaluation on the held-out tokens."""

    batch_tokens: int = 4_096  # tokens in one forward pass with logits, padding included
    splice: bool = True  # CE and KL with the reconstruction spliced in
    saes: list[str] = field(
        default_factory=list
    )  # SAEs (all that sae.load opens) instead of the run's, into eval/given/
    force: bool = False  # evaluate SAEs that were trained on another model, too
    labels: str = ""  # suites probing (JSON lines: text, label, maybe group) and judges (replies, see docs/judges.md)
    judge: str = ""  # suite judges: folder of a fitted judge to measure, too (scripts/fit_judge.py makes one)
    judge_url: str = ""  # suite judges: an OpenAI-compatible address whose model judges, too; "" uses no network
    judge_model: str = ""  # suite judges: what that model is called there
    judge_key_env: str = ""  # suite judges: the NAME of the environment variable that holds the key
    position: str = "last"  # suite probing: read a text at its last token, or take the mean over its tokens
    ks: list[int] = field(default_factory=lambda: [1, 2, 5])  # suite probing: latents of a probe
    bin_width: int = 1  # suite position: positions a point of the curves
    meta_steps: int = 1_500  # suite geometry: training steps of a meta-SAE; 0 leaves it out
    seed: int = 0  # of splits, draws and intervals

    def __post_init__(self) -> None:
        _require(self.batch_tokens >= 1, f"eval.batch_tokens={self.batch_tokens} must be at least 1.")
        _require(
            bool(self.judge_url) == bool(self.judge_model),
            "eval.judge_url and eval.judge_model go together: give both, or neither.",
        )
        # Values are not repeated: a key or password put here by mistake must not reach a log.
        named = not self.judge_key_env or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.judge_key_env)
        _require(bool(named), "eval.judge_key_env is no name of an environment variable: give the name, never the key.")
        if self.position not in ("last", "mean"):
            raise unknown("eval.position", self.position, ["last", "mean"])
        _require(bool(self.ks) and min(self.ks) >= 1, f"eval.ks={self.ks} must be numbers of latents, from 1.")
        _require(self.bin_width >= 1, f"eval.bin_width={self.bin_width} must be at least 1.")
        _require(self.meta_steps >= 0, f"eval.meta_steps={self.meta_steps} is negative: give 0 or more.")
        _require(self.seed >= 0, f"eval.seed={self.seed} is negative: give 0 or more.")


@dataclass
class BehaviorConfig:
    """Finding and proving the latents behind a behaviour."""

    contrast: list[str] = field(  # names, or paths (docs/contrast-sets.md)
        default_factory=lambda: ["refusal", "deception"]
    )
    saes: list[str] = field(default_factory=list)  # SAEs (all that sae.load opens) to search instead of the run's
    files: dict[str, str] = field(default_factory=dict)  # data files of contrast sets, by the name a set gives them
    root: str = ""  # a folder that holds the data files of contrast sets
    balance: str = "none"  # none | match (drop prompts) | strip (endings): what is done about confounds
    lookalikes: str = ""  # a contrast set whose negatives (report split) only look like the behaviour, such as xstest
    choices: str = ""  # a JSON-lines file of multiple-choice questions: question, choices, answer (an index)
    balance_features: list[str] = field(default_factory=list)  # what is balanced; [] = what the audit flags
    positions: list[int] = field(  # where latents and directions are read, counted from the prompt's end
        default_factory=lambda: [-1]
    )
    filter: bool = True  # leave out prompts on which the model does not do what the label says
    max_latents: int = 5
    n_random: int = 200  # draws per control
    n_prompts: int = 256  # prompts per class and split, at most
    n_prompts_random: int = 64  # prompts per class for each random draw
    null_runs: int = 50  # rankings of shuffled labels, which should report nothing
    max_new_tokens: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            bool(self.positions) and max(self.positions) < 0,
            f"behavior.positions={self.positions}: give numbers like -1, the prompt's last token, and -2.",
        )
        _require(self.n_random >= 1, f"behavior.n_random={self.n_random}: controls need at least one draw.")
        _require(self.null_runs >= 0, f"behavior.null_runs={self.null_runs} is negative: give 0 for none.")
        if self.balance not in BALANCES:
            raise unknown("behavior.balance", self.balance, list(BALANCES))
        _require(self.seed >= 0, f"behavior.seed={self.seed} is negative: give 0 or more.")
        _require(self.max_latents >= 1, f"behavior.max_latents={self.max_latents} must be at least 1.")


@dataclass
class CircuitConfig:
    """The graph of parts behind a behaviour; checked by `sae.weights.circuits.circuit.CircuitSettings`."""

    share: float = 0.85  # of the behaviour's margin that the graph keeps
    corrupt: str = "auto"  # what prompts are compared with: paired | mean | auto (paired where prompts have partners)
    attention: str = "heads"  # nodes: heads | whole
    n_neurons: int = 64  # neurons that are nodes of their own; 0 = every MLP whole
    n_steps: int = 5  # of EAP-IG; 0 = EAP
    n_prompts: int = 32  # prompts on which the behaviour is due, a split
    n_random: int = 20  # random graphs of the same size
    n_checked: int = 10  # strongest edges measured by path patching
    sae: str = ""  # an SAE after a block, whose latents are nodes
    latents: list[int] = field(default_factory=list)  # which
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            bool(self.sae) == bool(self.latents),
            "circuit.sae and circuit.latents go together: give both, or neither.",
        )


@dataclass
class WiringConfig:
    """The parts that write and read latents."""

    sae: str = ""  # an SAE in the residual stream; "" = what `sae behavior` found in this run
    latents: list[int] = field(default_factory=list)  # of it
    n_prompts: int = 64  # of each class, of the report split
    n_top: int = 10  # parts listed on each side; writers among them are ablated, too
    position: int = -1  # the token whose pre-activation is taken apart, from the prompt's end
    null: str = "random"  # what weights are compared with: random directions, or other latents
    n_null: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            bool(self.sae) == bool(self.latents),
            "wiring.sae and wiring.latents go together: give both, or neither.",
        )
        _require(
            self.position < 0, f"wiring.position={self.position} is counted from the prompt's end: give -1 or less."
        )
        for name in ("n_prompts", "n_top", "n_null"):
            _require(getattr(self, name) >= 1, f"wiring.{name}={getattr(self, name)} must be at least 1.")


@dataclass
class SteerConfig:
    """Generating with one latent clamped, or with a saved recipe, from the command line."""

    sae: str = ""  # folder of a trained SAE
    latent: int = 0
    value: float = 0.0
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 48
    roles: list[str] = field(default_factory=list)  # [] = every token; else e.g. [assistant, first_response]
    recipe: str = ""  # folder of interventions to apply, in place of sae, latent, value and roles
    save: str = ""  # folder to write what was applied to, as a recipe
    force: bool = False  # use an SAE that was trained, or a recipe that was written, for another model


@dataclass
class DecompositionConfig:
    """Taking a small model's matrices apart (method=decomposition); checked by `DecompositionSettings`."""

    folder: str = ""  # a finished decomposition of this model to use; "" makes one, for all behaviours of the run
    components: int = 0  # of each matrix; 0: as many as its smaller side is long
    gates: str = "shared"  # what says how components matter: shared (a network a matrix) | each (one a component)
    hidden: int = 64  # width of these networks
    steps: int = 1_000
    batch: int = 8  # prompts a step
    n_prompts: int = 256  # prompts of each class and contrast set that it is trained on, at most
    lr: float = 3e-3
    faithfulness: float = 10.0  # weights of the losses (docs/weights.md)
    stochastic: float = 1.0
    layerwise: float = 1.0
    layerwise_matrices: int = 1  # matrices drawn for it a step
    sparsity: float = 1e-3
    p_start: float = 2.0  # power of the sparsity penalty, at the first step and at the last
    p_end: float = 0.9
    n_measured: int = 64  # components taken out one by one, those of the largest gradient
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "n_prompts", "n_measured"):
            value = getattr(self, name)
            _require(value >= 1, f"localize.decomposition.{name}={value} must be at least 1.")


@dataclass
class LocalizeConfig:
    """Finding the weights that carry the behaviours of `behavior.contrast`, and cutting them."""

    method: list[str] = field(default_factory=lambda: ["all"])  # docs/weights.md has their names
    # parameter, row, column, neuron, head, tensor, block, direction, or all
    level: list[str] = field(default_factory=lambda: ["parameter"])
    reference: str = ""  # a model of the same architecture (the base, say) to compare with and restore to, or stage_one
    mode: str = ""  # what cut weights become: zero, mean or restore; "" = restore with a reference, else zero
    fractions: list[float] = field(
        default_factory=lambda: [0.0003, 0.0006, 0.001, 0.003, 0.006, 0.012, 0.03, 0.1]
    )  # doses tried
    surgery: bool = True  # cut what is located; false only scores
    n_prompts: int = 64  # prompts a class to find and to choose on, at most
    n_report: int = 200  # prompts a class to report on, at most
    n_random: int = 5  # random sets cut beside each located one
    seeds: int = 5  # of methods that draw
    budget: int = 400  # evaluations a method that edits parts may take
    ig_steps: int = 16  # points on the path of integrated gradients
    rank: int = 16  # of ActSVD's subspaces
    block_rank: int = 4  # singular directions in a block of level=block
    n_blocks: int = 8  # of the leading ones, in each matrix
    adversary: bool = False  # look for masks on all else that undo what surgery says of a set: some minutes
    epsilons: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1])  # how far from 1 these masks may be
    attack_steps: int = 8  # of an attack, from each start
    attack_restarts: int = 2  # starts of an attack: no mask, then random ones
    null_runs: int = 0  # shuffles of the labels under which is located again; needs planted truth
    threshold: float = 0.001  # planted parts count from this share of the behaviour's margin
    batch_prompts: int = 64  # prompts in one backward pass, at most: fewer where their activations are large
    save_weights: bool = False  # also write the scores of single weights: each method as large as the model in float32
    decomposition: DecompositionConfig = field(default_factory=DecompositionConfig)

    def __post_init__(self) -> None:
        if self.mode not in ("", "zero", "mean", "restore"):
            raise unknown("localize.mode", self.mode, ["zero", "mean", "restore"])
        for name in (
            "n_prompts", "n_report", "seeds", "budget", "ig_steps", "rank", "batch_prompts", "block_rank", "n_blocks",
            "attack_steps", "attack_restarts",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"localize.{name}={value} must be at least 1.")
        for name in ("n_random", "null_runs"):
            value = getattr(self, name)
            _require(value >= 0, f"localize.{name}={value} is negative: give 0 for none.")
        _require(
            self.surgery or not self.adversary,
            "localize.adversary=true is about what surgery cuts: leave localize.surgery at true.",
        )
        _require(
            bool(self.epsilons) and all(0 < one <= 1 for one in self.epsilons),
            f"localize.epsilons={self.epsilons} must be above 0 and at most 1.",
        )
        _require(
            bool(self.fractions) and all(0 < one <= 1 for one in self.fractions),
            f"localize.fractions={self.fractions} must be shares of the weights, above 0 and at most 1.",
        )
        _require(0 <= self.threshold < 1, f"localize.threshold={self.threshold} must be a share from 0 to below 1.")


@dataclass
class MitigateConfig:
    """Taking a behaviour out of the weights."""

    method: list[str] = field(
        default_factory=lambda: ["all"]
    )  # prune, regularize, adversarial, finetune, orthogonalize
    keep: list[str] = field(default_factory=list)  # contrast sets that must stay as they are; [] = what is known
    budget: float = 0.05  # KL on harmless prompts, nats per token
    scores: str = ""  # prune: a safetensors file of parameters' scores; "" computes them
    reference: str = ""  # prune: a model without the behaviour to restore parameters to; "" sets them to zero
    steps: int = 100
    batch: int = 16
    lr: float | None = None  # None: 0.03 / d_model
    penalty: str = "fisher"  # regularize: fisher | l2
    strengths: list[float] = field(default_factory=lambda: [100.0, 1000.0])  # regularize: each is tried
    epsilon: float = 0.3  # adversarial: length of perturbations, in typical residuals
    relearn_steps: int = 50  # 0 leaves the check out
    relearn_examples: int = 16
    triggers: list[str] = field(default_factory=list)  # system lines that may bring the behaviour back
    n_prompts: int = 128  # of the report split, at most
    n_prompts_select: int = 64
    max_new_tokens: int = 24
    batch_prompts: int = 256  # prompts run at once
    save: bool = True  # write the mitigated models
    seed: int = 0


@dataclass
class ConvertConfig:
    """Writing an SAE in another format."""

    src: str = ""  # folder or file of an SAE in any format, or owner/repo:folder on the hub
    dst: str = ""  # folder to write
    format: str = ""  # of what is written: sae, saelens, sparsify, dictionary_learning
    src_format: str = ""  # of what is read; "" tells it by its files
    hook_name: str | None = None  # what the source's files do not say
    lm_name: str | None = None
    k: int | None = None
    layer: int | None = None
    scale: float | None = None
    push: str = ""  # owner/repo on the hub to upload what was written to, with a model card


@dataclass
class OrganismConfig:
    """Training the model organism anew, or measuring the one at `lm.name`."""

    action: str = "measure"  # measure | train
    out: str = ""  # "" = runs/<name>/organism/model
    twin: bool = False  # the unrouted twin: ordinary fine-tuning, no planting
    seed: int = 0
    n_per_cell: int = 500  # prompts in each cell of the behaviour table
    threads: int = 2  # torch threads while training: another number rounds differently, so gives another organism

    def __post_init__(self) -> None:
        _require(
            self.action in ("measure", "train"),
            f"organism.action={self.action!r} is not known: use measure or train.",
        )


@dataclass
class LogConfig:
    """Metric sinks. `metrics.jsonl` is always written."""

    wandb: WandbMode = WandbMode.off
    project: str = "sae"


@dataclass
class BenchConfig:
    """Benchmarks: who takes part, and for how long."""

    peers: list[str] = field(default_factory=lambda: ["sae-lens", "sparsify", "dictionary_learning", "reference"])
    peers_env: str = ".venv-peers"  # the environment that holds the foreign ones; `make peers` makes it
    models: list[str] = field(default_factory=lambda: ["organism"])  # quality, rates: whose activations are learned
    text: str = ""  # quality, rates: what the models other than the organism read
    threads: int = 2
    repeats: int = 7  # turns each contestant takes
    turn_steps: int = 3  # timed steps in a turn
    warmup_steps: int = 4  # steps before the first turn
    steps: int = 2_000  # quality, memory, rates (which takes a quarter of them, too): training steps
    seeds: int = 3  # quality, rates: seeds of each contestant
    quick: bool = False  # toy sizes, to see that everything works
    docs: bool = False  # write docs/benchmarks.md and .json from the newest results


@dataclass
class RunConfig:
    """Everything a run needs; stages read their own sections."""

    name: str = "run"  # outputs go to <runs>/<name>/<stage>/
    runs: str = "runs"
    lm: LMConfig = field(default_factory=LMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    sae: SAEGridConfig = field(default_factory=SAEGridConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    circuit: CircuitConfig = field(default_factory=CircuitConfig)
    wiring: WiringConfig = field(default_factory=WiringConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    localize: LocalizeConfig = field(default_factory=LocalizeConfig)
    mitigate: MitigateConfig = field(default_factory=MitigateConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    organism: OrganismConfig = field(default_factory=OrganismConfig)
    log: LogConfig = field(default_factory=LogConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    suite: str = "train"  # what `sae bench` measures (all: everything), or `sae eval` (docs/evaluate.md)
    plugins: list[str] = field(default_factory=list)  # Python modules or files imported first, with architectures
    plan: bool = False  # sae train: only say what memory, disk and time it would take
    force: bool = False  # do a stage again although its output is there
    job: str = ""  # set by a multirun, and by `sae l0`: the job's folder inside the run's

    def __post_init__(self) -> None:
        bad = not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0")
        _require(not bad, f"name={self.name!r} is not a folder name: use letters, digits, '-' and '_'.")
        _require(
            len(self.name) <= 100, f"name={self.name[:20]!r}... is {len(self.name)} characters long: use 100 or fewer."
        )

    @property
    def folder(self) -> Path:
        """The run's folder; in a multirun, the job's folder inside it."""
        return Path(self.runs) / self.name / self.job

    @property
    def shared_folder(self) -> Path:
        """The run's folder, also inside a multirun: what all jobs may share lies here."""
        return Path(self.runs) / self.name


def keys(section: Any = RunConfig, prefix: str = "") -> list[str]:
    """Every configuration key, dotted."""
    found = []
    for item in fields(section):
        found.append(prefix + item.name)
        if is_dataclass(item.type):
            found += keys(item.type, f"{prefix}{item.name}.")
    return found


def register() -> None:
    """Give the schema to Hydra under the name `schema`, which `configs/run.yaml` builds on."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=RunConfig)


def build(config: Any) -> RunConfig:
    """Turn a composed Hydra config into a checked `RunConfig`.

    Raises:
        UserError: a mandatory value is missing or a value is out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    known = keys()
    for key in _given(OmegaConf.to_container(config)):
        # `+key=value` gets past Hydra's own check.
        if key not in known and not key.startswith(FREE):
            raise unknown("configuration key", key, known, "`sae <stage> --cfg job` prints every key.")
    try:
        built = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = str(error).split(":")[-1].strip()
        raise UserError(f"{key!r} has no value: give it on the command line, {key}=... .") from None
    assert isinstance(built, RunConfig)
    return built


def _given(section: Any, prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _given(value, f"{prefix}{name}.")


def configs_folder() -> Path:
    """The folder of YAML presets: the checkout's `configs/`, or the copy inside an installed wheel."""
    return shipped("configs/run.yaml").parent
