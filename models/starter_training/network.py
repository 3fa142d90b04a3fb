"""The Llama network in torch, with the parameter names of the published checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GROUP_SIZE, BITS = 32, 4


def fake_quantize(weight: Tensor) -> Tensor:
    """Rounds to 4 bits as mlx's affine quantization does; the gradient passes unchanged.

    Per group of 32: the scale spans the range, and the end with the larger magnitude is kept
    exact as the bias.
    """
    groups = weight.detach().reshape(-1, GROUP_SIZE)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    levels = 2**BITS - 1
    from_low = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp(min=1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, 0.0)
    rounded = ((groups - bias) / scale).round().clamp(0, levels) * scale + bias
    return weight + (rounded.reshape(weight.shape) - weight.detach())


class Precision:
    """Whether the forward pass sees the weights rounded to 4 bits."""

    rounded = False


def seen(layer: nn.Module, precision: Precision) -> Tensor:
    return fake_quantize(layer.weight) if precision.rounded else layer.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on halves of the head, the layout of the published Llama weights."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, precision: Precision):
        super().__init__()
        self.precision = precision
        width, size = SHAPE["hidden_size"], SHAPE["head_dim"]
        self.heads, self.shared = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
        self.size = size
        self.q_proj = nn.Linear(width, self.heads * size, bias=False)
        self.k_proj = nn.Linear(width, self.shared * size, bias=False)
        self.v_proj = nn.Linear(width, self.shared * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # One product for the three projections is a fifth faster than three on a CPU.
        joined = torch.cat(
            [seen(layer, self.precision) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        )
        heads = F.linear(x, joined).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.shared, self.shared], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeats = self.heads // self.shared
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(y, seen(self.o_proj, self.precision))


class FeedForward(nn.Module):
    def __init__(self, precision: Precision):
        super().__init__()
        self.precision = precision
        width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat(
            [seen(layer, self.precision) for layer in (self.gate_proj, self.up_proj)]
        )
        gate, up = F.linear(x, joined).chunk(2, -1)
        return F.linear(F.silu(gate) * up, seen(self.down_proj, self.precision))


class Layer(nn.Module):
    def __init__(self, precision: Precision):
        super().__init__()
        self.self_attn = Attention(precision)
        self.mlp = FeedForward(precision)
        self.input_layernorm = nn.RMSNorm(SHAPE["hidden_size"], eps=SHAPE["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(SHAPE["hidden_size"], eps=SHAPE["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, precision: Precision):
        super().__init__()
        self.embed_tokens = nn.Embedding(SHAPE["vocab_size"], SHAPE["hidden_size"])
        self.layers = nn.ModuleList(Layer(precision) for _ in range(SHAPE["num_hidden_layers"]))
        self.norm = nn.RMSNorm(SHAPE["hidden_size"], eps=SHAPE["rms_norm_eps"])


class Llama(nn.Module):
    """Tied embeddings; returns logits only where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = Precision()
        self.model = Body(self.precision)
        for name, weight in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(weight, std=0.04)
            elif weight.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * SHAPE["num_hidden_layers"]) if last else 1.0
                nn.init.normal_(weight, std=0.8 * weight.shape[1] ** -0.5 / depth)

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """tokens (batch, length), wanted (n,) flat positions; logits (n, vocabulary)."""
        table = seen(self.model.embed_tokens, self.precision)
        x = F.embedding(tokens, table)
        half = SHAPE["head_dim"] // 2
        rates = SHAPE["rope_theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x.flatten(0, 1)[wanted]), table)
