"""Attacks on any callable `x -> logits`; they know nothing of models."""

from advmoe.attacks.autoattack import autoattack, square
from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.attacks.pgd import (
    ascend,
    cross_entropy_loss,
    dlr_loss,
    kl_loss,
    margin_loss,
    pgd,
    probability_margin_loss,
    trades_attack,
)

__all__ = [
    "Attack",
    "AttackPart",
    "Proposals",
    "ascend",
    "autoattack",
    "cross_entropy_loss",
    "dlr_loss",
    "kl_loss",
    "margin_loss",
    "pgd",
    "probability_margin_loss",
    "square",
    "trades_attack",
]
