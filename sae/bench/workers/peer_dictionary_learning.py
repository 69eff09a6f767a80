"""dictionary_learning as a worker: the `update` of its trainers, which take activations.

Run by the peers' Python, as a script.
"""

import importlib
import sys
import types
from typing import Any

import protocol
from protocol import Description, Request, Trainee


class DictionaryLearning(Trainee):
    """One of its trainers, with the library's defaults for everything a `Request` does not say."""

    def __init__(self, request: Request) -> None:
        if request.precision != protocol.FLOAT32:
            raise ValueError(f"precision {request.precision!r}: its trainers know no autocast")
        self.trainer, words = _make_trainer(request)
        self.architecture = request.architecture
        self.n_steps = 0
        self.description = Description(
            options=f"{words}; clip 1; its Adam; unit decoder rows; inputs taken as they are "
            "(normalize_activations=False: its own loop can scale them to E||x||^2 = 1)"
        )

    def step(self, x: Any) -> None:
        """The library's own step."""
        self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    def reconstruct(self, x: Any, selection: str) -> tuple[Any, Any]:
        """Encode and decode; BatchTopK by the batch or by its average threshold."""
        coder = self.trainer.ae
        how = {"use_threshold": selection == protocol.INFERENCE} if self.architecture == "batch_topk" else {}
        acts = coder.encode(x, **how)
        return coder.decode(acts), acts


def _load() -> None:
    # The package imports nnsight where it reads language models, which is nothing we use: an empty module with the one
    # name it asks for stands in, since nnsight's own requirements do not go with those of the other peers.
    stand_in: Any = types.ModuleType("nnsight")
    stand_in.LanguageModel = object
    sys.modules.setdefault("nnsight", stand_in)
    importlib.import_module("dictionary_learning.trainers")


def _make_trainer(request: Request) -> tuple[Any, str]:
    from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer

    common = {
        "steps": request.n_steps,
        "activation_dim": request.d_in,
        "dict_size": request.d_sae,
        "layer": 0,
        "lm_name": "",
        "lr": request.lr,
        "warmup_steps": request.lr_warmup_steps,
        "decay_start": request.n_steps - request.lr_decay_steps if request.lr_decay_steps else None,
        "seed": request.seed,
        "device": request.device,
    }
    # By default the average threshold is kept from step 1000 on: its cost belongs to every step of a real run.
    threshold = {"k": request.k, "threshold_start_step": 0}
    found: tuple[Any, str]
    if request.architecture == "topk":
        found = TopKTrainer(**common, **threshold), "TopKTrainer.update; AuxK where dead; threshold from step 1 on"
    elif request.architecture == "batch_topk":
        trainer = BatchTopKTrainer(**common, **threshold)
        found = trainer, "BatchTopKTrainer.update; AuxK where dead; threshold from step 1 on"
    elif request.architecture == "jumprelu":
        trainer = JumpReluTrainer(**common, target_l0=float(request.k), sparsity_warmup_steps=request.n_steps // 10)
        found = trainer, "JumpReluTrainer.update; target L0"
    else:
        raise ValueError(f"the worker for dictionary_learning has no architecture {request.architecture!r}")
    found[0].dead_feature_threshold = request.dead_after_tokens
    return found


if __name__ == "__main__":
    protocol.serve("dictionary-learning", DictionaryLearning, _load)
