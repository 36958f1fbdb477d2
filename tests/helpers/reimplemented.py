"""AdvMoE written a second time, from the paper, in plain tensor code that imports torch alone. A ResNet's state is a
dictionary of tensors under the names of the package's; every expert is computed, and each image's own is picked.
"""

import torch
from torch.nn import functional as F


class Network:
    """An MoE-ResNet of 3x3 stem and basic blocks: `state` and the rows of each expert of `experts` in a bank."""

    def __init__(self, state, experts):
        self.state = {name: value.detach().clone() for name, value in state.items() if value.is_floating_point()}
        self.experts = experts
        self.pathways = []  # of every pass: the experts that each MoE layer chose, (N,) each

    def learnt(self, part):
        """The names of phi's (`routers`) or psi's (`experts`) parameters."""
        fixed = ("mean", "std", "running_mean", "running_var")
        names = [name for name in self.state if name.rsplit(".", 1)[1] not in fixed]
        return [name for name in names if ("router." in name) == (part == "routers")]

    def norm(self, name, x):
        """Batch norm: by the batch in training, where statistics move of the part that learns alone."""
        s, axes, shape = self.state, [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        if self.part is not None:
            batch_mean = x.sum(axes) / (count := x.numel() / x.shape[1])
            batch_var = ((x - batch_mean.view(shape)) ** 2).sum(axes) / count
            if ("router." in name) == (self.part == "routers"):
                s[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean.detach()
                s[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var.detach() * count / (count - 1)
            mean, var = batch_mean, batch_var
        scaled = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
        return scaled * s[f"{name}.weight"].view(shape) + s[f"{name}.bias"].view(shape)

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def plain_conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def image_scores(self, x):
        """Scores of all layers by the router that sees the image; of `router=image` one head for all."""
        for at, stride in ((0, 1), (3, 2), (6, 2), (9, 2)):
            if f"router.embedding.{at}.weight" in self.state:
                x = self.plain_conv(f"router.embedding.{at}", x, stride)
                x = self.norm(f"router.embedding.{at + 1}", x).clamp(min=0)
        return self.linear("router.heads", self.norm("router.norm", x.mean((2, 3))))

    def moe_conv(self, name, x, stride):
        """The chosen expert's output times 1 + p - stop_grad(p), p being its gate probability."""
        if self.ahead is None:
            pooled = self.norm(f"{name}.router.norm", x.mean((2, 3)))
            hidden = self.linear(f"{name}.router.hidden", pooled).clamp(min=0)
            scores = self.linear(f"{name}.router.scores", hidden)
        else:  # the heads of all layers side by side
            number, layer = self.experts, len(self.pathways[-1])
            first = layer * number if self.ahead.shape[1] > number else 0
            scores = self.ahead[:, first : first + number]
        choice, bank = scores.argmax(1), self.state[f"{name}.bank"]
        self.pathways[-1].append(choice)
        rows = bank.shape[0] // self.experts  # of disjoint halves, thirds ...
        each = [F.conv2d(x, bank[e * rows : (e + 1) * rows], stride=stride, padding=1) for e in range(self.experts)]
        y = sum(out * (choice == e).view(-1, 1, 1, 1) for e, out in enumerate(each))
        p = scores.exp()[torch.arange(len(x)), choice] / scores.exp().sum(1)
        return y * (1 + p - p.detach()).view(-1, 1, 1, 1)

    def logits(self, x, part=None):
        """Logits of pixels; with `part` in training, as while that part learns."""
        self.part = part
        self.pathways.append([])
        x = (x - self.state["normalize.mean"]) / self.state["normalize.std"]
        self.ahead = self.image_scores(x) if "router.heads.weight" in self.state else None
        x = self.norm("backbone.stem.1", self.plain_conv("backbone.stem.0", x)).clamp(min=0)
        block = 0
        while f"backbone.blocks.{block}.conv1.bank" in self.state:
            name = f"backbone.blocks.{block}"
            projected = f"{name}.shortcut.0.weight" in self.state
            stride = 2 if projected else 1
            y = self.norm(f"{name}.norm1", self.moe_conv(f"{name}.conv1", x, stride)).clamp(min=0)
            y = self.norm(f"{name}.norm2", self.moe_conv(f"{name}.conv2", y, 1))
            if projected:
                x = self.norm(f"{name}.shortcut.1", self.plain_conv(f"{name}.shortcut.0", x, stride))
            x = (y + x).clamp(min=0)
            block += 1
        return self.linear("backbone.classifier", x.mean((2, 3)))


def log_probabilities(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


def kl(clean, attacked):
    """KL(f(x) || f(x + delta)), summed over images."""
    clean, attacked = log_probabilities(clean), log_probabilities(attacked)
    return (clean.exp() * (clean - attacked)).sum()


def attacked(network, x, noise, *, eps, steps, step_size):
    """TRADES' inner maximisation in eval mode: from small noise, sign steps projected to the ball and to [0, 1]."""
    clean = network.logits(x).detach()
    x_adv = x + 0.001 * noise
    for step in range(steps + 1):
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1).detach()
        if step < steps:
            x_adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(kl(clean, network.logits(x_adv)), x_adv)
            x_adv = x_adv + step_size * gradient.sign()
    return x_adv


def level(network, part, velocity, x, y, noise, *, beta, lr, momentum, weight_decay, **attack):
    """One level of Algorithm 1: an attack of its own, then a step of SGD on TRADES' loss; returns its two terms."""
    x_adv = attacked(network, x, noise, **attack)
    names = network.learnt(part)
    for name in names:
        network.state[name].requires_grad_(True)
    clean = network.logits(x, part)
    ce = -log_probabilities(clean)[torch.arange(len(y)), y].mean()
    robust = beta * kl(clean, network.logits(x_adv, part)) / len(y)
    gradients = torch.autograd.grad(ce + robust, [network.state[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        value = network.state[name].detach()
        slope = gradient + weight_decay * value
        velocity[name] = momentum * velocity[name] + slope if name in velocity else slope
        network.state[name] = value - lr * velocity[name]
    return ce.item(), robust.item()
