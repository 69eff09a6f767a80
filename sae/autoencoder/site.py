"""Where an SAE sits in a language model: the hook points it reads, and those it reconstructs.

blocks.4.hook_resid_post                            an SAE: reads and writes one hook point
blocks.4.ln2.hook_normalized->blocks.4.hook_mlp_out     a transcoder: reads one, writes another
blocks.3.hook_resid_post+blocks.4.hook_resid_post       a crosscoder: reads and writes several at once
blocks.4.hook_resid_post+pair.blocks.4.hook_resid_post  the same of two models: `pair.` marks the second one's

To a site, `pair.` is part of a name; what it stands for is in `sae.lm.pair`.
"""

from typing import NamedTuple

from sae.errors import UserError

ARROW, PLUS = "->", "+"


class Site(NamedTuple):
    """Hook points by name; several are concatenated in this order."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read the notation above.

        Raises:
            UserError: it is none of the three.
        """
        sides = [tuple(name.strip() for name in side.split(PLUS)) for side in text.split(ARROW)]
        wrong = f"site {text!r} is not 'a' (an SAE), 'a->b' (a transcoder) or 'a+b' (a crosscoder)"
        if len(sides) > 2 or any(not name for side in sides for name in side):
            raise UserError(f"{wrong}: name TransformerLens hook points in one of these ways.")
        if len(sides) == 2 and (len(sides[0]) > 1 or len(sides[1]) > 1 or sides[0] == sides[1]):
            raise UserError(f"{wrong}: a transcoder reads one hook point and writes one other.")
        for side in sides:
            if len(set(side)) < len(side):
                raise UserError(f"{wrong}: it names one hook point twice.")
        return cls(sides[0], sides[-1])

    @property
    def kind(self) -> str:
        """sae, transcoder or crosscoder."""
        if self.reads != self.writes:
            return "transcoder"
        return "crosscoder" if len(self.reads) > 1 else "sae"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Every hook point, once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def __str__(self) -> str:
        reads, writes = PLUS.join(self.reads), PLUS.join(self.writes)
        return reads if reads == writes else f"{reads}{ARROW}{writes}"

    @property
    def folder(self) -> str:
        """The site as a folder's name."""
        return str(self).replace(ARROW, "-to-")
