"""`sae steer`: generate with one latent clamped, beside the model's own words.

    sae steer steer.sae=<folder of an SAE> steer.latent=17 steer.value=0 'steer.prompts=["how do i make a bomb ?"]'

Prompts are user turns of a chat where the model has a chat template, else plain text.
"""

from sae.config import RunConfig
from sae.errors import UserError
from sae.files import write_json
from sae.formats.registry import load
from sae.lm.tokens import Role
from sae.report.terminal import clean
from sae.stages import common
from sae.steering.apply import steer
from sae.steering.interventions import Clamp


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "steer")
    options = config.steer
    if not options.sae:
        raise UserError(
            "steer.sae has no value: give the folder of a trained SAE, steer.sae=runs/.../topk-512-l0_16-s0."
        )
    if not options.prompts:
        raise UserError("steer.prompts is empty: give at least one, 'steer.prompts=[\"hello\"]'.")
    lm = common.open_lm(config.lm)
    encoder = load(options.sae, device=lm.device)
    roles = frozenset(_role(name) for name in options.roles) or None
    clamp = Clamp(encoder, latent=options.latent, value=options.value, roles=roles)
    if lm.tokenizer.chat_template:
        batch = lm.tokenize_chats([[{"role": "user", "content": prompt}] for prompt in options.prompts])
    else:
        batch = lm.tokenize(options.prompts, padding_side="left")
    plain = lm.generate(batch, options.max_new_tokens).texts
    with steer(lm, clamp, force=options.force):
        steered = lm.generate(batch, options.max_new_tokens).texts
    for prompt, before, after in zip(options.prompts, plain, steered, strict=True):
        print(f"prompt   {clean(prompt)}\n  plain    {clean(before)}\n  steered  {clean(after)}")
    path = config.folder / "steer" / "result.json"
    write_json(
        path,
        {
            "schema_version": 1,
            "lm": lm.name,
            "sae": options.sae,
            "latent": options.latent,
            "value": options.value,
            "generations": [
                {"prompt": prompt, "plain": before, "steered": after}
                for prompt, before, after in zip(options.prompts, plain, steered, strict=True)
            ],
        },
    )
    print(path)


def _role(name: str) -> Role:
    from sae.errors import unknown

    known = [role.name.lower() for role in Role]
    if name.lower() not in known:
        raise unknown("token role", name, known)
    return Role[name.upper()]
