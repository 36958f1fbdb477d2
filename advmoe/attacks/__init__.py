"""Attacks on any callable `x -> logits`; they know nothing of models."""

from advmoe.attacks.pgd import ascend, cross_entropy_loss, kl_loss, margin_loss, pgd, trades_attack

__all__ = ["ascend", "cross_entropy_loss", "kl_loss", "margin_loss", "pgd", "trades_attack"]
