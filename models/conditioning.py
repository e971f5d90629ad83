"""What a network is conditioned on, and the form of it that means "nothing"."""

import torch
from torch import Tensor


def class_labels(labels: Tensor | None) -> dict | None:
    """Labels [B] -> cond; None -> None."""
    return None if labels is None else {"labels": labels.long()}


def unconditional(cond: dict | None) -> dict:
    """The unconditional twin of a class condition: label -1. Raises ValueError where there is none to derive."""
    if cond is None or set(cond) != {"labels"}:
        raise ValueError("guidance needs an unconditional form: give `uncond`, since only class labels have one by themselves")
    return {"labels": torch.full_like(cond["labels"], -1)}


def concatenate(*conds: dict) -> dict:
    """Conditions of several batches -> the condition of the batches joined. Raises ValueError where they are of different kinds."""
    if any(set(cond) != set(conds[0]) for cond in conds):
        raise ValueError(f"conditions of different kinds cannot be joined: {', '.join(str(sorted(cond)) for cond in conds)}")
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}


def take(cond: dict | None, index) -> dict | None:
    """The rows `index` (a slice or a tensor) of a condition."""
    return None if cond is None else {key: value[index] for key, value in cond.items()}
