"""Adam's moments in less memory: bf16 or 8 bits, with stochastic rounding.

A moment that moves by 0.1% a step (beta2 = 0.999) cannot move at all in a format whose numbers are 0.4% apart, if it
is rounded to nearest. Rounding up or down at random, with the probability that keeps the mean, lets it follow. The
random bits are a hash of (seed, step, element), the very same in all kernels: they do not depend on the order of work,
on the number of threads, or on what else draws random numbers.

8-bit moments are minifloats times a scale per row (the row's largest value):
    exp_avg      sign, 4 bits of exponent, 3 of mantissa   (values down to 2^-15 of the row's largest)
    exp_avg_sq   5 bits of exponent, 3 of mantissa         (down to 2^-31; never negative)
Smaller magnitudes are rounded, at random again, to 0 or to the smallest one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

KINDS = ("float32", "bfloat16", "float8")
"""How moments can be kept."""
_MASK = 0xFFFFFFFF
MANTISSA_BITS = 3
EXPONENT_BITS = {"exp_avg": 4, "exp_avg_sq": 5}
BYTES_PER_PARAMETER = {"float32": 8, "bfloat16": 4, "float8": 2}
"""Of both moments of a matrix. A parameter and its gradient take 8 more, the scales of float8 8 a row."""


@dataclass
class Moments:
    """First and second moment of one matrix [rows d]."""

    kind: str
    exp_avg: Tensor
    """[rows d] fp32, bf16, or uint8 codes."""
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    """[rows] fp32, for 8-bit codes only."""
    exp_avg_sq_scale: Tensor | None = None

    @classmethod
    def zeros(cls, kind: str, like: Float[Tensor, "rows d"]) -> "Moments":
        """Moments before the first step."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.uint8}[kind]

        def empty() -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        def scale() -> Tensor | None:
            return torch.zeros(len(like), device=like.device) if kind == "float8" else None

        return cls(kind, empty(), empty(), scale(), scale())

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, for checkpoints."""
        named = {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "exp_avg_scale": self.exp_avg_scale,
            "exp_avg_sq_scale": self.exp_avg_sq_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def read(self) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
        """Both moments in fp32."""
        if self.kind == "float8":
            assert self.exp_avg_scale is not None
            assert self.exp_avg_sq_scale is not None
            return (
                decode8(self.exp_avg, self.exp_avg_scale, EXPONENT_BITS["exp_avg"], signed=True),
                decode8(self.exp_avg_sq, self.exp_avg_sq_scale, EXPONENT_BITS["exp_avg_sq"], signed=False),
            )
        return self.exp_avg.float(), self.exp_avg_sq.float()

    def part(self, start: int, stop: int) -> "Moments":
        """The same moments, of some of the rows."""
        scales = (
            scale if scale is None else scale[start:stop] for scale in (self.exp_avg_scale, self.exp_avg_sq_scale)
        )
        return Moments(self.kind, self.exp_avg[start:stop], self.exp_avg_sq[start:stop], *scales)

    def write(
        self, exp_avg: Float[Tensor, "rows d"], exp_avg_sq: Float[Tensor, "rows d"], seed: int, first: int = 0
    ) -> None:
        """Store both moments.

        Args:
            exp_avg: the first moment, fp32.
            exp_avg_sq: the second.
            seed: of this step; decides the rounding.
            first: number of the first element in its matrix, where these are some of its rows.
        """
        if self.kind == "float32":
            self.exp_avg.copy_(exp_avg)
            self.exp_avg_sq.copy_(exp_avg_sq)
        elif self.kind == "bfloat16":
            self.exp_avg.copy_(round_bfloat16(exp_avg, random_bits(exp_avg, seed, first)))
            self.exp_avg_sq.copy_(round_bfloat16(exp_avg_sq, random_bits(exp_avg_sq, seed + 1, first)))
        else:
            assert self.exp_avg_scale is not None
            assert self.exp_avg_sq_scale is not None
            self.exp_avg_scale.copy_(exp_avg.abs().amax(1))
            self.exp_avg_sq_scale.copy_(exp_avg_sq.amax(1))
            bits = EXPONENT_BITS["exp_avg"]
            self.exp_avg.copy_(
                encode8(exp_avg, self.exp_avg_scale, bits, random_bits(exp_avg, seed, first), signed=True)
            )
            bits, noise = EXPONENT_BITS["exp_avg_sq"], random_bits(exp_avg_sq, seed + 1, first)
            self.exp_avg_sq.copy_(encode8(exp_avg_sq, self.exp_avg_sq_scale, bits, noise, signed=False))


def step_seed(seed: int, step: int) -> int:
    """Seed of one matrix's rounding in one step, 32 bits; the next one is left for its second moment."""
    return (mix(seed * 0x9E3779B9 + step) * 2) & _MASK


def mix(value: int) -> int:
    """Hash 32 bits to 32 bits ("lowbias32" of C. Wellons' hash prospector)."""
    value &= _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def random_bits(like: Tensor, seed: int, first: int = 0) -> Int[Tensor, "rows d"]:
    """32 hashed bits for each element of a matrix: `mix(mix(seed) + index)`, index row-major (int64, 0 to 2^32 - 1).

    `first` is the index of the first element.
    """
    value = (torch.arange(first, first + like.numel(), device=like.device) + mix(seed)) & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return (value ^ (value >> 16)).view(like.shape)


def round_bfloat16(values: Float[Tensor, "rows d"], noise: Int[Tensor, "rows d"]) -> Tensor:
    """bf16, up or down at random: 16 random bits are added below the mantissa that stays, and the rest is cut off."""
    bits = values.contiguous().view(torch.int32).long() & _MASK
    kept = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(torch.int64)
    return _float(kept).to(torch.bfloat16)


def encode8(
    values: Float[Tensor, "rows d"],
    scale: Float[Tensor, " rows"],
    exponent_bits: int,
    noise: Int[Tensor, "rows d"],
    *,
    signed: bool,
) -> Tensor:
    """8-bit codes [rows d] (uint8) of `values / scale`, whose magnitudes are at most 1, rounded at random.

    Code c without its sign bit stands for the float with exponent c >> 3 and mantissa c & 7, the largest exponent
    being that of 1.0; code 0 is 0.
    """
    ratio = values.abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    bits = ratio.contiguous().view(torch.int32).long()
    drop = 23 - MANTISSA_BITS
    rounded = (bits + (noise & ((1 << drop) - 1))) >> drop
    # 1.0 has exponent 127; codes count down from there, so the largest exponent code stands for 127.
    largest = ((1 << exponent_bits) - 1) << MANTISSA_BITS
    code = rounded - (127 << MANTISSA_BITS) + largest
    smallest = _smallest(exponent_bits)
    # Below the smallest code: up to it, or down to 0, with the probability that keeps the mean. (Multiplied by a
    # constant, not divided: division by a constant is not rounded alike everywhere.)
    up = (noise & 0xFFFFFF).float() < ratio * (2**24 / smallest)
    code = torch.where(ratio < smallest, up.long(), code).clamp(0, largest)
    if signed:
        code = code | ((values < 0).long() << 7)
    return code.to(torch.uint8)


def decode8(
    codes: Tensor, scale: Float[Tensor, " rows"], exponent_bits: int, *, signed: bool
) -> Float[Tensor, "rows d"]:
    """Inverse of `encode8`."""
    code = codes.long()
    magnitude = code & 0x7F if signed else code
    largest = ((1 << exponent_bits) - 1) << MANTISSA_BITS
    value = _float((magnitude - largest + (127 << MANTISSA_BITS)) << (23 - MANTISSA_BITS))
    value = torch.where(magnitude == 0, 0.0, value) * scale[:, None]
    return torch.where(code >= 0x80, -value, value) if signed else value


def _smallest(exponent_bits: int) -> float:
    """What code 1 stands for."""
    return float(2.0 ** -((1 << exponent_bits) - 1)) * (1 + 2**-MANTISSA_BITS)


def _float(bits: Tensor) -> Tensor:
    """Floats with these 32 bits (given as int64)."""
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signed.to(torch.int32).view(torch.float32)
