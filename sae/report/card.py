"""The model card of an SAE on the Hugging Face hub: what it is, how well it does, how to open it."""

from collections.abc import Mapping
from typing import Any

from sae.report.terminal import markdown_table

FIGURES = {
    "l0": "mean latents active on a token",
    "fvu": "share of the variance that is not reconstructed, about the global mean",
    "cosine": "mean cosine of activation and reconstruction",
    "ce_recovered": "(CE_zero - CE_sae) / (CE_zero - CE_clean), spliced in",
    "delta_ce": "CE_sae - CE_clean, nats",
    "kl": "KL to the model without the SAE, nats",
    "dead_fraction": "latents that fired on no held-out token",
    "n_tokens": "held-out tokens",
}


def model_card(about: Mapping[str, Any], repo: str, folder: str, evaluation: Mapping[str, Any] | None) -> str:
    """Text of a repository's README.md.

    Args:
        about: the SAE's config, plain.
        repo: owner/name.
        folder: where in the repository it lies; "" is the top.
        evaluation: its record in `eval/result.json`; None where it was not evaluated.
    """
    place = f"{repo}:{folder}" if folder else repo
    fields = ("hook_name", "lm_name", "architecture", "d_in", "d_sae", "l0", "seed", "normalize")
    table = markdown_table([[name, str(about[name])] for name in fields if about.get(name) not in (None, "")], ["", ""])
    if evaluation is None:
        figures = "It was not evaluated."
    else:
        rows = [[name, evaluation.get(name), meaning] for name, meaning in FIGURES.items()]
        figures = markdown_table([row for row in rows if row[1] is not None], ["figure", "value", "meaning"])
    return (
        "---\nlibrary_name: sae\ntags:\n- sparse-autoencoder\n- interpretability\n---\n\n"
        f"# Sparse autoencoder: {about['hook_name']} of {about['lm_name']}\n\n{table}\n\n"
        f"## Evaluation\n\n{figures}\n\n"
        f'## Use\n\n```python\nimport sae\n\nencoder = sae.load("{place}")\n'
        "latent_acts = encoder.encode(activations)\n```\n"
    )
