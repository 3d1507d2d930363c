"""The networks of DDIM, VQGAN and latent diffusion (LDM), with the names and arithmetic of their published code."""

import math

import torch
from torch import nn
from torch.nn import functional

GROUPS = 4


def norm(width, eps=1e-6):
    """Group normalization with the ε of DDIM, VQGAN and LDM's transformers; LDM's ResNet blocks use PyTorch's."""
    return nn.GroupNorm(GROUPS, width, eps=eps)


def conv(inside, outside, size=3, **options):
    """A convolution that keeps height and width."""
    return nn.Conv2d(inside, outside, size, padding=size // 2, **options)


def bare(**parts):
    """A module that only holds submodules."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class Block(nn.Module):
    """A ResNet block of DDIM, or of VQGAN if `time`, the width of the timestep embedding, is None."""

    def __init__(self, inside, outside, time=None):
        super().__init__()
        self.norm1, self.conv1 = norm(inside), conv(inside, outside)
        if time:
            self.temb_proj = nn.Linear(time, outside)
        self.norm2, self.conv2 = norm(outside), conv(outside, outside)
        if inside != outside:
            self.nin_shortcut = conv(inside, outside, 1)

    def forward(self, x, temb=None):
        h = self.conv1(functional.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(functional.silu(temb))[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attn(nn.Module):
    """Attention over all positions, with 1×1 convolutions as projections."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


def halve(layer, x):
    """Downsample by a strided convolution, padded only on the right and at the bottom."""
    return layer(functional.pad(x, (0, 1, 0, 1)))


def double(layer, x):
    """Upsample by nearest neighbours, then a convolution."""
    return layer(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(*, block, attn=(), **sampler):
    """The blocks, attentions and up- or downsampler of one resolution."""
    part = bare(block=nn.ModuleList(block), attn=nn.ModuleList(attn))
    for name, width in sampler.items():
        down = name == "downsample"
        layer = nn.Conv2d(width, width, 3, stride=2) if down else conv(width, width)
        setattr(part, name, bare(conv=layer))
    return part


class DDIM(nn.Module):
    """The UNet of DDIM and DDPM; `up` is numbered by resolution, so that up.0 runs last."""

    def __init__(self, widths, attended, layers=2, channels=3):
        super().__init__()
        self.first = widths[0]
        time, last = 4 * self.first, len(widths) - 1
        self.temb = bare(dense=nn.ModuleList([nn.Linear(self.first, time), nn.Linear(time, time)]))
        self.conv_in = conv(channels, self.first)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [self.first]
        now = self.first
        for i, width in enumerate(widths):
            blocks = [Block(now if j == 0 else width, width, time) for j in range(layers)]
            now, skips = width, skips + [width] * (layers + (i != last))
            attn = [Attn(width) for _ in range(layers * (i in attended))]
            self.down.append(level(block=blocks, attn=attn, **({"downsample": width} if i != last else {})))
        self.mid = bare(block_1=Block(now, now, time), attn_1=Attn(now), block_2=Block(now, now, time))
        for i, width in reversed(list(enumerate(widths))):
            blocks = [Block((now if j == 0 else width) + skips.pop(), width, time) for j in range(layers + 1)]
            now = width
            attn = [Attn(width) for _ in range((layers + 1) * (i in attended))]
            self.up.insert(0, level(block=blocks, attn=attn, **({"upsample": width} if i else {})))
        self.norm_out, self.conv_out = norm(now), conv(now, channels)

    def forward(self, x, t):
        half = self.first // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        temb = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.temb.dense[1](functional.silu(temb))
        hs = [self.conv_in(x)]
        for part in self.down:
            for j, block in enumerate(part.block):
                h = block(hs[-1], temb)
                hs.append(part.attn[j](h) if len(part.attn) else h)
            if hasattr(part, "downsample"):
                hs.append(halve(part.downsample.conv, hs[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for part in reversed(self.up):
            for j, block in enumerate(part.block):
                h = block(torch.cat([h, hs.pop()], dim=1), temb)
                h = part.attn[j](h) if len(part.attn) else h
            if hasattr(part, "upsample"):
                h = double(part.upsample.conv, h)
        return self.conv_out(functional.silu(self.norm_out(h)))


class Encoder(nn.Module):
    """The encoder of VQGAN, with attention only in the middle block."""

    def __init__(self, widths, latent, layers=2):
        super().__init__()
        self.conv_in, self.down, now = conv(3, widths[0]), nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            blocks = [Block(now if j == 0 else width, width) for j in range(layers)]
            self.down.append(level(block=blocks, **({"downsample": width} if i < len(widths) - 1 else {})))
            now = width
        self.mid = bare(block_1=Block(now, now), attn_1=Attn(now), block_2=Block(now, now))
        self.norm_out, self.conv_out = norm(now), conv(now, latent)

    def forward(self, x):
        h = self.conv_in(x)
        for part in self.down:
            for block in part.block:
                h = block(h)
            h = halve(part.downsample.conv, h) if hasattr(part, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(functional.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """The decoder of VQGAN; `up` is numbered by resolution."""

    def __init__(self, widths, latent, layers=2):
        super().__init__()
        now = widths[-1]
        self.conv_in, self.up = conv(latent, now), nn.ModuleList()
        self.mid = bare(block_1=Block(now, now), attn_1=Attn(now), block_2=Block(now, now))
        for i, width in reversed(list(enumerate(widths))):
            blocks = [Block(now if j == 0 else width, width) for j in range(layers + 1)]
            self.up.insert(0, level(block=blocks, **({"upsample": width} if i else {})))
            now = width
        self.norm_out, self.conv_out = norm(now), conv(now, 3)

    def forward(self, x):
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(x))))
        for part in reversed(self.up):
            for block in part.block:
                h = block(h)
            h = double(part.upsample.conv, h) if hasattr(part, "upsample") else h
        return self.conv_out(functional.silu(self.norm_out(h)))


class VQ(nn.Module):
    """The first stage of LDM, which quantizes in decode."""

    def __init__(self, widths, latent, codes):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, latent), Decoder(widths, latent)
        self.quantize = bare(embedding=nn.Embedding(codes, latent))
        self.quant_conv, self.post_quant_conv = conv(latent, latent, 1), conv(latent, latent, 1)

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, h):
        places = h.permute(0, 2, 3, 1)
        nearest = torch.cdist(places.flatten(0, 2), self.quantize.embedding.weight).argmin(dim=1)
        codes = self.quantize.embedding(nearest).reshape(places.shape).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes))


class LDMBlock(nn.Module):
    """A ResNet block of LDM."""

    def __init__(self, inside, outside, time):
        super().__init__()
        self.in_layers = nn.Sequential(norm(inside, 1e-5), nn.SiLU(), conv(inside, outside))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outside))
        self.out_layers = nn.Sequential(norm(outside, 1e-5), nn.SiLU(), nn.Dropout(0.0), conv(outside, outside))
        self.skip_connection = nn.Identity() if inside == outside else conv(inside, outside, 1)

    def forward(self, x, emb, _):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Multi-head attention over a context, or self-attention without one."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """GEGLU: one half of the outputs times the GELU of the other half."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=2)
        return value * functional.gelu(gate)


class Transformer(nn.Module):
    """LDM's SpatialTransformer with one block."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.norm = norm(width)
        self.proj_in, self.proj_out = conv(width, width, 1), conv(width, width, 1)
        forward = nn.Sequential(GEGLU(width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        block = bare(attn1=CrossAttention(width, None, heads), ff=bare(net=forward))
        block.attn2 = CrossAttention(width, context, heads)
        block.norm1, block.norm2, block.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x, _, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        block = self.transformer_blocks[0]
        h = block.attn1(block.norm1(h)) + h
        h = block.attn2(block.norm2(h), context) + h
        h = block.ff.net(block.norm3(h)) + h
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    """Halve height and width."""

    def __init__(self, width):
        super().__init__()
        self.op = conv(width, width, stride=2)

    def forward(self, x, *_):
        return self.op(x)


class Up(nn.Module):
    """Double height and width."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x, *_):
        return double(self.conv, x)


class First(nn.Conv2d):
    """conv_in, which ignores timestep and context."""

    def forward(self, x, *_):
        return super().forward(x)


class LDM(nn.Module):
    """The UNetModel of latent diffusion, with one list of blocks down and one up."""

    def __init__(self, widths, attended, context, heads, layers=2):
        super().__init__()
        self.first = widths[0]
        time, last = 4 * self.first, len(widths) - 1
        self.time_embed = nn.Sequential(nn.Linear(self.first, time), nn.SiLU(), nn.Linear(time, time))
        inputs, outputs, skips, now = [[First(3, self.first, 3, padding=1)]], [], [self.first], self.first

        def attention(i):
            return [Transformer(widths[i], context, heads)] if i in attended else []

        for i, width in enumerate(widths):
            for _ in range(layers):
                inputs.append([LDMBlock(now, width, time), *attention(i)])
                now = width
            inputs += [[Down(width)]] * (i != last)
            skips += [width] * (layers + (i != last))
        middle = [LDMBlock(now, now, time), Transformer(now, context, heads), LDMBlock(now, now, time)]
        for i, width in reversed(list(enumerate(widths))):
            for j in range(layers + 1):
                up = [Up(width)] if i and j == layers else []
                outputs.append([LDMBlock(now + skips.pop(), width, time), *attention(i), *up])
                now = width
        self.input_blocks, self.output_blocks = (
            nn.ModuleList(nn.ModuleList(parts) for parts in blocks) for blocks in (inputs, outputs)
        )
        self.middle_block = nn.ModuleList(middle)
        self.out = nn.Sequential(norm(now, 1e-5), nn.SiLU(), conv(now, 3))

    def forward(self, x, t, context):
        half = self.first // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / half))
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))

        def run(parts, h):
            for part in parts:
                h = part(h, emb, context)
            return h

        hs = [x]
        for parts in self.input_blocks:
            hs.append(run(parts, hs[-1]))
        h = run(self.middle_block, hs[-1])
        for parts in self.output_blocks:
            h = run(parts, torch.cat([h, hs.pop()], dim=1))
        return self.out(h)


class DiTBlock(nn.Module):
    """Attention and a feed-forward network, each scaled, shifted and gated by the condition."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = bare(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = bare(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.attn.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1)
        return self.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x, c):
        shift, scale, gate, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attend(self.norm1(x) * (1 + scale) + shift)
        hidden = functional.gelu(self.mlp.fc1(self.norm2(x) * (1 + scale_2) + shift_2), approximate="tanh")
        return x + gate_2 * self.mlp.fc2(hidden)


class DiT(nn.Module):
    """The transformer of DiT; `spacing` divides the exponents of the timestep's frequencies, half the width in DiT."""

    def __init__(self, width, heads, layers, classes, channels, size, patch, spacing=128):
        super().__init__()
        self.patch, self.spacing = patch, spacing
        self.x_embedder = bare(proj=nn.Conv2d(channels, width, patch, patch))
        self.t_embedder = bare(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = bare(embedding_table=nn.Embedding(classes + 1, width))
        self.pos_embed = nn.Parameter(self.positions(width, size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(layers))
        self.final_layer = bare(
            linear=nn.Linear(width, patch * patch * 2 * channels),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        )

    @staticmethod
    def positions(width, side):
        """Sines and cosines of the column in the first half of the channels, of the row in the second."""
        rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
        angles = [place.flatten()[:, None] * rates for place in (columns, rows)]
        return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()[None]

    def forward(self, x, t, y):
        rates = torch.exp(-math.log(10000) * torch.arange(128) / self.spacing)
        angles = t[:, None].float() * rates
        time = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        c = time + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        h = functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        b, side, p = len(x), x.shape[-1] // self.patch, self.patch
        patches = self.final_layer.linear(h).view(b, side, side, p, p, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, side * p, side * p)
