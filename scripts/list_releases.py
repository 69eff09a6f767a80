"""Write sae/formats/releases.json: published SAEs by repository, from the list of pretrained SAEs that SAELens ships.

    .venv/bin/python scripts/list_releases.py .venv-peers/lib/python3*/site-packages/sae_lens/pretrained_saes.yaml

Kept are facts only: where a release lies, in which format, of which model, and one folder as an example.
"""

import json
import sys
from pathlib import Path

import yaml

FORMATS = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1",
    "dictionary_learning_1": "dictionary_learning",
    "qwen_scope": "qwen_scope",
    "goodfire": "goodfire",
    "deepseek_r1": "deepseek_r1",
    "mwhanna_transcoder": "mwhanna",
}

# The list names the base model.
LM_NAMES = {"google/gemma-scope-9b-it-res": "google/gemma-2-9b-it"}


def main() -> None:
    """Read the list, write the table."""
    releases = yaml.safe_load(Path(sys.argv[1]).read_text())
    found: dict[str, dict[str, str]] = {}
    for about in releases.values():
        kind = about.get("conversion_func")
        if kind not in FORMATS or "/" not in about["repo_id"]:
            continue
        saes, repo = about["saes"], about["repo_id"]
        lm_name = LM_NAMES.get(repo, about["model"])
        found.setdefault(repo, {"format": FORMATS[kind], "lm_name": lm_name, "example": saes[len(saes) // 2]["path"]})
    path = Path(__file__).resolve().parent.parent / "sae" / "formats" / "releases.json"
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print(f"{path}: {len(found)} repositories")


if __name__ == "__main__":
    main()
