"""Checks of constructor arguments that several layers share."""


def check_heads(dim: int, num_heads: int) -> None:
    """ValueError unless `num_heads` heads of one width have `dim` channels together."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must be a positive divisor of the {dim} channels")


def hidden_width(dim: int, ratio: float, name: str) -> int:
    """`dim` channels times `ratio`, rounded down; ValueError with the ratio's `name` if none is left."""
    width = int(dim * ratio)
    if width < 1:
        raise ValueError(f"{name}={ratio} of {dim} channels leaves none; take at least 1 / {dim}")
    return width
