"""The last perturbation of every training image, which the next attack on that image goes on from.

Source: ATTA, Zheng et al., CVPR 2020.
Axes: `N` training images, `B` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.data import Images, ImageSet
from advmoe.data.augment import View
from advmoe.errors import InputError
from advmoe.training.processes import total


class Perturbations:
    """Perturbations of images in memory, in the images' own coordinates, so that crops and flips are followed.

    They are stored on the images' device as float16: 2 bytes for each value, twice what the images take; a value within
    eps is rounded by at most eps * 2^-11. All processes of a run store the same ones. They are 0 before the first.

    Raises `ValueError` for images in files.
    """

    def __init__(self, images: Images, fabric: Fabric) -> None:
        if not isinstance(images, ImageSet):
            rule = "of images held in memory when training.alternation is warm-start"
            raise InputError(f"data.name must be {rule}, got a {type(images).__name__}")
        self.fabric, self.mine = fabric, slice(fabric.global_rank, None, fabric.world_size)
        self.stored = torch.zeros(images.images.shape, dtype=torch.float16, device=images.images.device)

    def take(self, index: Tensor, view: View | None) -> Tensor:
        """The perturbations of this process's share of the images at `index`, as `view` shows them: (B, C, H, W)
        float32, channels-last, B being the share's size. The share is every `world_size`-th image from `global_rank`.
        """
        own = self.stored[index[self.mine].to(self.stored.device)].float()
        return (own if view is None else view.of(own)).contiguous(memory_format=torch.channels_last)

    def keep(self, index: Tensor, view: View | None, perturbations: Tensor) -> None:
        """Store `perturbations` (B, C, H, W) of this process's share of the images at `index`, and the other processes'
        of theirs. Pixels that `view` does not show keep their old ones.
        """
        index = index.to(self.stored.device)
        if view is not None:
            perturbations = view.back(perturbations, self.stored[index[self.mine]].float())
        fresh = torch.zeros_like(self.stored[index])
        fresh[self.mine] = perturbations.half()
        self.stored[index] = total(self.fabric, fresh)
