"""What stands beside a behaviour's causal test, as `sae behavior` writes it, with numbers that tests know."""

import math
from typing import Any

PARTED = "a reply that two judges read differently"


def rate(share: float, n: int = 256) -> dict[str, float]:
    """Return a rate with its Wilson interval."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"rate": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


def interval(estimate: float, half: float = 0.05, n: int = 64) -> dict[str, float]:
    """Return an estimate with its interval."""
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "n": n}


def cost(kl: float, *, lookalikes: float = 0.1) -> dict[str, Any]:
    """Return what an intervention changes."""
    return {
        "own": {"kl": kl, "ce": -kl / 2, "n_tokens": 544},
        "text": {"kl": 3 * kl, "ce": kl, "n_tokens": 3297},
        "lookalikes": rate(lookalikes, 50),
        "facts": rate(0.9, 100),
        "choices": None,
    }


def rival(
    method: str, restored: float, kl: float, add: float | None, add_kl: float = 0.1, **more: Any
) -> dict[str, Any]:
    """Return one method's record; on the fronts it is where `more` says so."""
    return {
        "method": method,
        "detail": f"about {method}",
        "position": "-1",
        "auroc": interval(0.9),
        "ablate_rate": rate(1 - restored),
        "ablate_restored_rate": rate(restored),
        "add_rate": None if add is None else rate(add),
        "add_degenerate_rate": None if add is None else rate(0.01),
        "add_scale": None if add is None else 2.0,
        "remove_cost": cost(kl),
        "add_cost": None if add is None else cost(add_kl),
        "on_remove_front": False,
        "on_add_front": False,
    } | more


def rivals() -> dict[str, Any]:
    """Return four methods: the chosen latents, a worse one, an equal one and one that cannot be added."""
    found = [
        rival("latents", 0.91, 0.01, 0.93, 0.3, on_remove_front=True),
        rival("latent", 0.2, 0.001, 0.5, 0.1, on_remove_front=True, on_add_front=True),
        rival("difference_of_means", 0.92, 0.04, 0.94, 0.2, on_remove_front=True, on_add_front=True),
        rival("difference_of_means_everywhere", 0.90, 0.05, None),
    ]
    return {one["method"]: one for one in found}


def controls(share: float, p: float, mean: float = 0.01, n: int = 20) -> dict[str, Any]:
    """Return where ablation and clamp stand among random draws."""
    one = {"draws": [1 - mean] * n, "degenerate": [0.0] * n, "observed": 1 - share, "success": [mean] * n}
    one |= {"observed_success": share, "percentile": 100.0, "p": p, "n_prompts": 64}
    return {"ablate": one, "clamp": one | {"draws": [mean] * n, "observed": share}}


def evidence() -> dict[str, Any]:
    """Return everything beside the causal test."""
    methods = rivals()
    sides = {name: {"remove": one["remove_cost"], "add": one["add_cost"]} for name, one in methods.items()}
    pair = {"first": 17, "second": 402, "alone_first": interval(-0.1), "alone_second": interval(-0.2)}
    family = {"family": "length", "kind": "surface", "auroc": interval(0.72), "flagged": True, "l2": 1.0, "rates": {}}
    words = family | {"family": "words", "kind": "content", "auroc": interval(0.95), "flagged": False}
    audit = {"rows": [family | {"direction": "longer"}, words | {"direction": "has to"}], "bar": 0.6}
    milder = {"rows": [family | {"direction": "longer", "auroc": interval(0.55), "flagged": False}], "bar": 0.6}
    size = {"margin": interval(3.0), "degenerate": rate(0.0)}
    latent = {"output_score": interval(0.2), "output_probability": interval(0.01), "typical": 8.0}
    return {
        "found": True,
        "n_tested": 3072,
        "n_significant": 71,
        "n_significant_shuffled": 0,
        "n_records": {
            split: {"positives": 60, "negatives": 58, "positive_topics": 6, "negative_topics": 7}
            for split in ("find", "select", "report")
        },
        "dropped_positives": 9,
        "dropped_negatives": 42,
        "unfiltered_base_rate": rate(0.82),
        "unfiltered_clamp_base_rate": rate(0.09),
        "null_share": rate(0.0, 50),
        "null_share_protocol": rate(0.0, 50),
        "decoy_share": 0.0,
        "rivals": methods,
        "side_effects": {"none": {"remove": cost(0.0, lookalikes=0.3), "add": None}} | sides,
        "sizes": [
            size | {"latents": [17, 402, 88][:n], "behavior": rate(1 - 0.3 * n), "restored": rate(0.3 * n)}
            for n in range(4)
        ],
        "interactions": {
            "latents": [17, 402, 88],
            "pairs": [
                pair | {"together": interval(-0.9), "interaction": interval(-0.6)},
                pair | {"second": 88, "together": interval(-0.3), "interaction": interval(0.0)},
            ],
            "hydras": [
                {"latent": 402, "partner": 17, "alone": interval(-0.05), "without_partner": interval(-0.8)},
            ],
        },
        "candidates": {
            "scores": [
                latent
                | {
                    "latent": number,
                    "ranked": number != 7,
                    "input_score": 0.9,
                    "gradient": -effect,
                    "integrated": -1.5 * effect,
                    "ablation_effect": interval(-effect),
                }
                for number, effect in ((17, 1.0), (402, 0.5), (7, 0.1))
            ],
            "agreement_sampled": {name: {"rho": 1.0, "p": 0.01, "n": 48} for name in ("gradient", "integrated")},
            "agreement_listed": {name: {"rho": 0.5, "p": 0.7, "n": 3} for name in ("gradient", "integrated")},
        },
        "confounds": {
            "flagged": ["length"],
            "audit": audit,
            "balance": {
                "method": "match",
                "features": ["length"],
                "counts": {"find": {"positives": [100, 80], "negatives": [100, 90]}},
                "n_changed": 0,
            },
            "after": {"flagged": [], "audit": milder},
        },
        "provenance": {
            "name": "xstest",
            "files": [
                {"name": "prompts", "location": "data/xstest.csv", "sha256": "ab" * 32, "licence": "CC-BY-4.0"}
                | {"citation": "arXiv:2308.01263", "url": "https://example.org/xstest", "n_rows": 450}
            ],
            "sources": [
                {"name": "unsafe", "file": "prompts", "n_rows": 450, "n_kept": 200, "dropped": {"safe": 250}},
            ],
            "left_out": [],
        },
        "judges": {
            "n": 512,
            "rates": {
                name: {verdict: rate(share, 512) for verdict, share in shares}
                for name, shares in (
                    ("opening", (("behavior", 0.5), ("alternative", 0.5), ("degenerate", 0.0))),
                    ("texts", (("behavior", 0.5), ("alternative", 0.4), ("degenerate", 0.1))),
                )
            },
            "pairs": [
                {"first": "opening", "second": "texts", "kappa": interval(0.83), "n_apart": 51}
                | {"examples": [{"prompt": "p", "completion": PARTED, "first": "alternative", "second": "degenerate"}]}
            ],
            "topic": {"own": rate(0.6, 512), "other": 0.1, "p": 0.001},
        },
        "dose_range": [-0.5, 1.2],
        "dose_correlation": {"rho": 0.94, "p": 0.0007, "n": 9},
        "dose_correlation_all": {"rho": 0.81, "p": 0.0049, "n": 13},
    }
