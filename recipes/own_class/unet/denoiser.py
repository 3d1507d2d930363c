"""A plain residual UNet with attention whose queries, keys and values come from one layer: an example of a class."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class Block(nn.Module):
    """Two convolutions beside a shortcut; the embedding of the timestep is added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W], [B, embedding] -> [B, outputs, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(embedding))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Self-attention over positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm, self.qkv, self.proj = nn.GroupNorm(4, width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # a width of its own after heads were removed
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return x + self.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class ResidualUNet(nn.Module):
    """Predicts the noise and, in as many channels behind it, a variance."""

    def __init__(self, in_channels: int, width: int, heads: int, num_labels: int | None = None) -> None:
        super().__init__()
        self.width, embedding = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.labels = None if num_labels is None else nn.Embedding(num_labels, embedding)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, self.reduce = Block(width, width, embedding), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle, self.attention = Block(2 * width, 2 * width, embedding), Attention(2 * width, heads)
        self.enlarge, self.up = nn.Conv2d(2 * width, width, 3, padding=1), Block(2 * width, width, embedding)
        self.norm, self.head = nn.GroupNorm(4, width), nn.Conv2d(width, 2 * in_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Images [B, C, H, W], timesteps [B], labels [B] -> [B, 2·C, H, W]."""
        steps = torch.arange(self.width // 2, device=x.device)
        angles = t[:, None].to(x.dtype) * torch.exp(-math.log(10_000) * 2 / self.width * steps).to(x.dtype)
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.labels is not None:
            embedding = embedding + self.labels(y)
        skip = self.down(self.stem(x), embedding)
        hidden = self.attention(self.middle(self.reduce(skip), embedding))
        hidden = self.enlarge(F.interpolate(hidden, size=skip.shape[2:]))
        return self.head(F.silu(self.norm(self.up(torch.cat([hidden, skip], dim=1), embedding))))
