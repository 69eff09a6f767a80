"""Which device to compute on, asked for by name."""

from sae.errors import UserError, unknown

KNOWN = ["auto", "cpu", "cuda", "cuda:0"]


def pick_device(name: str) -> str:
    """Check a device's name; "auto" is CUDA if there is one, else the CPU.

    Raises:
        UserError: an unknown name, or a device this machine does not have. Apple's "mps" is refused: it has no
            float64, which the statistics are kept in.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, KNOWN) from None
    if device.type not in ("cpu", "cuda"):
        raise unknown("device", name, KNOWN)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices found): use 'cpu' or 'auto'."
        )
    return name
