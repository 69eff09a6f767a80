"""Setting the located parameters to zero, or back to those of a reference model.

Without scores given, parameters are scored here, to first order, by what setting them does (SNIP-like; Lee et al.
1810.02340, as a difference of behaviour and utility in Wei et al. 2402.05162):

    score = [(W - B) * d margin / dW]+ / mean of it  -  |(W - B) * d CE / dW| / mean of it

with B zero or the reference. The first part is how far the behaviour's mean margin falls; parameters whose removal
would raise it are left alone. The second is how much the model's own replies to harmless prompts depend on the
parameter, as a mean over prompts, so that they do not cancel. Both are first-order, so parameters are taken in rounds,
and what is left is scored anew before each.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sae.errors import UserError
from sae.files import read_tensors
from sae.lm.matrices import Matrix, block_matrices
from sae.weights import attribution
from sae.weights.attribution import Scores
from sae.weights.differences import normalized_difference
from sae.weights.mitigate.choose import Weights, Work
from sae.weights.objective import Objective, margin_objective, reply_objective

N_UTILITY = 64  # harmless prompts scored
_BISECTIONS = 60
_STOP = 2.0  # times the budget: larger shares only cost more


def prune(work: Work) -> None:
    """Take ever larger shares of the blocks' matrices."""
    lm, settings = work.lm, work.settings
    matrices = block_matrices(lm)
    base = None if work.reference is None else _checked(matrices, work.reference)
    scores = None if work.scores is None else _checked(matrices, work.scores)
    score = functools.partial(behavior_minus_utility, *_objectives(work, matrices), base)
    total = sum(matrix.parameter.numel() for matrix in matrices)
    taken = {matrix.name: torch.zeros_like(matrix.parameter, dtype=torch.bool) for matrix in matrices}
    for number, fraction in enumerate(settings.fractions, start=1):
        found = scores if scores is not None else score()
        wanted = round(fraction * total) - sum(int(mask.sum()) for mask in taken.values())
        for name, mask in top(found, taken, wanted).items():
            taken[name] |= mask
        with torch.no_grad():
            for matrix in matrices:
                then = torch.zeros_like(matrix.parameter) if base is None else base[matrix.name].to(matrix.parameter)
                matrix.parameter.copy_(torch.where(taken[matrix.name], then, matrix.parameter))
        n_taken = sum(int(mask.sum()) for mask in taken.values())
        tried = work.chooser.offer({"fraction": n_taken / total, "n_parameters": n_taken, "rounds": number})
        work.progress("pruning", number, len(settings.fractions))
        if not tried.kl <= _STOP * settings.budget:
            break


def _checked(matrices: list[Matrix], given: Weights) -> dict[str, Tensor]:
    """Values for every matrix.

    Raises:
        UserError: one is missing, or of another shape.
    """
    for matrix in matrices:
        found = given.get(matrix.name)
        if found is None:
            raise UserError(f"there are no values for {matrix.name!r}: they are of another model.")
        if found.shape != matrix.parameter.shape:
            raise UserError(
                f"{matrix.name!r} is {list(matrix.parameter.shape)}, but values of {list(found.shape)} were given: "
                "they are of another model."
            )
    return {matrix.name: given[matrix.name].to(matrix.parameter.device) for matrix in matrices}


def scores_file(place: Path | str) -> tuple[Path, str]:
    """Where scores lie, and the method after a colon, if one is named."""
    path, colon, method = str(place).rpartition(":")
    return (Path(path), method) if colon and not Path(place).exists() else (Path(place), "")


def read_scores(place: Path | str) -> dict[str, Tensor]:
    """Scores of parameters by matrix, from a safetensors file or a folder that holds one.

    Files that `sae localize` writes with `localize.save_weights=true` have several methods' scores: `file:method` takes
    one's.

    Raises:
        UserError: no such file, several in the folder, or several methods and none of them named.
    """
    path, method = scores_file(place)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{str(path)!r} has {names} for scores: name one safetensors file.")
        path = found[0]
    tensors = read_tensors(path)
    methods = list(dict.fromkeys(name.split("/")[0] for name in tensors if "/" in name))
    if not methods and not method:
        return tensors
    if method not in methods and (method or len(methods) != 1):
        raise UserError(
            f"{str(path)!r} has scores of {', '.join(methods) or 'no named method'}: say which, "
            f"scores={path}:{methods[0] if methods else '...'}"
        )
    start = f"{method or methods[0]}/"
    return {name.removeprefix(start): values for name, values in tensors.items() if name.startswith(start)}


def _objectives(work: Work, matrices: list[Matrix]) -> tuple[Objective, Objective]:
    """The behaviour's margin, and the cross entropy of harmless replies."""
    lm, case, rows = work.lm, work.case, work.settings.batch_prompts
    kept = case.retain.first(N_UTILITY).passage(lm.pad_id)
    return margin_objective(lm, case.positives, matrices, rows), reply_objective(lm, kept, matrices, rows)


def behavior_minus_utility(margin: Objective, kept: Objective, base: Weights | None) -> Scores:
    """Score every parameter of the objectives' matrices; see the head of this file."""
    behavior = {name: values.clamp_min_(0) for name, values in attribution.taylor(margin, base).items()}
    return normalized_difference(behavior, attribution.sensitivity(kept, base))


def top(scores: Mapping[str, Tensor], taken: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Masks of the n parameters of largest score that are not taken yet; fewer where ties would make them more.

    A threshold is searched by counting, which needs no copy of all scores in one tensor.
    """
    free = {name: values.masked_fill(taken[name], -torch.inf) for name, values in scores.items()}
    finite = [values[values > -torch.inf] for values in free.values()]
    low = min((float(values.min()) for values in finite if values.numel()), default=0.0)
    high = max((float(values.max()) for values in finite if values.numel()), default=0.0)
    low -= abs(low) * 1e-6 + 1e-12  # "above", so that all of them can be taken
    if sum(int((values > low).sum()) for values in free.values()) > n:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = sum(int((values > middle).sum()) for values in free.values())
            if above > n:
                low = middle
            else:
                high = middle
        low = high
    return {name: values > low for name, values in free.items()}
