"""The toy model of superposition: five sparse features in two dimensions, x -> ReLU(W' W x + b).

python tests/support/superposition.py 0 1 2     # how well its parts are found from these seeds
"""

import sys

import torch
from torch import nn

from sae.lm.matrices import Matrix
from sae.weights.decomposition.settings import DecompositionSettings
from sae.weights.decomposition.target import Target

SETTINGS = {
    "components": 20, "gates": "each", "hidden": 16, "steps": 2000, "lr": 0.01, "layerwise_matrices": 2,
    "faithfulness": 1.0, "sparsity": 3e-3, "p_start": 1.0, "p_end": 0.5,
}  # fmt: skip


class Superposition(nn.Module):
    """The two layers have matrices of their own, so that each can be decomposed."""

    def __init__(self, n_features: int = 5, d_hidden: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        W = (0.5 * torch.randn(d_hidden, n_features, generator=generator)).requires_grad_(True)
        b = torch.zeros(n_features, requires_grad=True)
        optimiser = torch.optim.Adam([W, b], lr=0.02)
        for _ in range(1500):
            x = features(512, n_features, generator)
            loss = ((x @ W.t() @ W + b).relu() - x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.embed = nn.Linear(n_features, d_hidden, bias=False)
        self.unembed = nn.Linear(d_hidden, n_features)
        with torch.no_grad():
            self.embed.weight.copy_(W)
            self.unembed.weight.copy_(W.t())
            self.unembed.bias.copy_(b)
        self.loss = float(loss.detach())

    def forward(self, x):
        return self.unembed(self.embed(x)).relu()


def features(n, n_features, generator, probability=0.05):
    """Features in [0, 1], each there with a small probability."""
    there = torch.rand(n, n_features, generator=generator) < probability
    return torch.rand(n, n_features, generator=generator) * there


class SuperpositionTarget(Target):
    """Mean square error of the outputs."""

    def __init__(self, model: Superposition, batch_rows: int = 512, probability: float = 0.05) -> None:
        self.root, self.batch_rows, self.probability = model, batch_rows, probability
        self.matrices = [
            Matrix("embed.weight", 0, "", model.embed.weight, 0),
            Matrix("unembed.weight", 0, "", model.unembed.weight, 0),
        ]

    def draw(self, generator):
        return features(self.batch_rows, self.root.embed.in_features, generator, self.probability)

    def outputs(self, batch):
        return self.root(batch)

    def divergence(self, clean, now):
        return (clean - now).square().mean()

    def truth(self):
        """Each feature's column of the first matrix, and its row of the second, as matrices of rank one."""
        one = torch.eye(self.root.embed.in_features)
        W, V = self.root.embed.weight.detach(), self.root.unembed.weight.detach()
        return {
            "embed.weight": torch.stack([W * row for row in one]),
            "unembed.weight": torch.stack([V * row[:, None] for row in one]),
        }


def main(seeds) -> None:
    """Print how well each matrix's parts are found from several seeds of the decomposition."""
    from sae.weights.decomposition.known import match
    from sae.weights.decomposition.train import decompose

    target = SuperpositionTarget(Superposition(), batch_rows=384)
    for seed in seeds:
        found = decompose(target, DecompositionSettings(**SETTINGS, seed=seed))
        for name, true in target.truth().items():
            print(seed, name, *(f"{value:.3f}" for value in match(found.pieces(name), true)), flush=True)


if __name__ == "__main__":
    main(map(int, sys.argv[1:] or ["0", "1", "2"]))
