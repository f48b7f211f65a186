"""What a normalizer needs of whoever trains it, and what it allows."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

__all__ = ["Needs"]


class Needs:
    """Declarations, with the defaults of a norm that treats each image by itself."""

    minimum_batch: ClassVar[int] = 1
    """The smallest local batch it can train on."""
    memory_format: ClassVar[torch.memory_format] = torch.channels_last
    """The layout of maps and filters in which its networks train fastest."""
    together: ClassVar[bool] = True
    """Whether clients can be trained together, stacked: its layers treat each example of a batch
    by itself and keep no buffers."""
    mixes_examples: ClassVar[bool] = False
    """Whether, in training, what it makes of one example depends on the others in the batch. Then
    there are no gradients of single examples, and differential privacy refuses it."""
    adaptive_clip: ClassVar[float] = 0.0
    """What its paper clips each unit's gradient to, as a part of the unit's weights (0: nothing);
    `AdaptiveClipping`, for ``train.adaptive_clip = "published"``."""
    published_scaling: ClassVar[Literal["unit", "standardized"]] = "standardized"
    """Pixel scaling in its paper: [0, 1], or standardized by the training images."""
