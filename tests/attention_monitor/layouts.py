"""One attention, written in many layouts: order of axes, merged or not, fused or not, by einsum, in loops."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

B, T, H, D = 2, 5, 4, 8
C = H * D
SCALE = D**-0.5


class Written(nn.Module):
    """Projects, attends in a way of its own, and projects again."""

    def __init__(self, attend):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.attend = attend

    def forward(self, x):
        return self.out(self.attend(self.q(x), self.k(x), self.v(x)))

    @torch.no_grad()
    def truth(self, x):
        """Pattern (B, H, T, T) in float64, and the output."""
        q, k, v = (split(project(x)).transpose(1, 2).double() for project in (self.q, self.k, self.v))
        pattern = (q @ k.mT * SCALE).softmax(-1)
        return pattern, self.out((pattern @ v).transpose(1, 2).flatten(2).float())


def split(x):
    return x.view(*x.shape[:-1], H, D)


def softmax(scores, dim=-1):
    return (scores * SCALE).softmax(dim)


LAYOUTS = {}


def layout(attend):
    LAYOUTS[attend.__name__.replace("_", " ")] = attend
    return attend


@layout
def batch_heads(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    return (softmax(q @ k.mT) @ v).transpose(1, 2).flatten(2)


@layout
def heads_batch(q, k, v):
    q, k, v = (split(z).permute(2, 0, 1, 3) for z in (q, k, v))
    return (softmax(q @ k.mT) @ v).permute(1, 2, 0, 3).flatten(2)


@layout
def merged(q, k, v):
    q, k, v = (split(z).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
    return torch.bmm(softmax(torch.bmm(q, k.mT)), v).view(-1, H, T, D).transpose(1, 2).flatten(2)


@layout
def merged_heads_first(q, k, v):
    q, k, v = (split(z).permute(2, 0, 1, 3).reshape(-1, T, D) for z in (q, k, v))
    return torch.bmm(softmax(torch.bmm(q, k.mT)), v).view(H, -1, T, D).permute(1, 2, 0, 3).flatten(2)


@layout
def sequence_first_merged(q, k, v):
    q, k, v = (z.transpose(0, 1).reshape(T, -1, D).transpose(0, 1) for z in (q, k, v))
    return torch.bmm(softmax(torch.bmm(q, k.mT)), v).transpose(0, 1).reshape(T, -1, C).transpose(0, 1)


@layout
def baddbmm(q, k, v):
    q, k, v = (split(z).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).view(-1, H, T, D).transpose(1, 2).flatten(2)


@layout
def keys_first(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    return (softmax(k @ q.mT, -2).mT @ v).transpose(1, 2).flatten(2)


@layout
def values_first(q, k, v):
    q, k, v = (split(z).permute(0, 2, 3, 1) for z in (q, k, v))
    return (v @ softmax(q.mT @ k).mT).permute(0, 3, 1, 2).flatten(2)


@layout
def stacked(q, k, v):
    q, k, v = (torch.stack(z.split(D, -1), 1) for z in (q, k, v))
    return (softmax(q @ k.mT) @ v).transpose(1, 2).flatten(2)


@layout
def put_along_the_batch(q, k, v):
    q, k, v = (torch.cat(z.split(D, -1), 0) for z in (q, k, v))
    return torch.cat(torch.bmm(softmax(torch.bmm(q, k.mT)), v).split(B, 0), -1)


@layout
def entry_by_entry(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    return (softmax((q[:, :, :, None] * k[:, :, None]).sum(-1)) @ v).transpose(1, 2).flatten(2)


@layout
def ellipsis(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    weights = softmax(torch.einsum("...id,...jd->...ij", q, k))
    return torch.einsum("...ij,...jd->...id", weights, v).transpose(1, 2).flatten(2)


@layout
def grouped(q, k, v):
    q, k, v = (z.view(B, T, 2, H // 2, D).permute(0, 2, 3, 1, 4) for z in (q, k, v))
    return (softmax(q @ k.mT) @ v).permute(0, 3, 1, 2, 4).flatten(2)


@layout
def fused(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@layout
def fused_heads_first(q, k, v):
    q, k, v = (split(z).permute(2, 0, 1, 3) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(1, 2, 0, 3).flatten(2)


@layout
def fused_merged(q, k, v):
    q, k, v = (split(z).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(-1, H, T, D).transpose(1, 2).flatten(2)


@layout
def fused_merged_heads_first(q, k, v):
    q, k, v = (split(z).permute(2, 0, 1, 3).reshape(-1, T, D) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(H, -1, T, D).permute(1, 2, 0, 3).flatten(2)


@layout
def fused_five_axes(q, k, v):
    q, k, v = (z.view(B, T, 2, H // 2, D).permute(2, 0, 3, 1, 4) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(1, 3, 0, 2, 4).flatten(2)


@layout
def loop_over_heads(q, k, v):
    heads = [slice(h * D, (h + 1) * D) for h in range(H)]
    return torch.cat([softmax(q[..., h] @ k[..., h].mT) @ v[..., h] for h in heads], -1)


@layout
def fused_loop_over_heads(q, k, v):
    each = zip(q.split(D, -1), k.split(D, -1), v.split(D, -1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*head) for head in each], -1)


@layout
def loop_over_slices_of_the_merged_axis(q, k, v):
    q, k, v = (split(z).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
    out = [softmax(q[i : i + 1] @ k[i : i + 1].mT) @ v[i : i + 1] for i in range(B * H)]
    return torch.cat(out).view(-1, H, T, D).transpose(1, 2).flatten(2)


@layout
def loop_over_odd_slices_of_the_merged_axis(q, k, v):
    q, k, v = (split(z).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
    out = [softmax(q[i : i + 3] @ k[i : i + 3].mT) @ v[i : i + 3] for i in range(0, B * H, 3)]
    return torch.cat(out).view(-1, H, T, D).transpose(1, 2).flatten(2)


@layout
def loop_over_queries(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    out = [softmax(q[:, :, i : i + 2] @ k.mT) @ v for i in range(0, T, 2)]
    return torch.cat(out, 2).transpose(1, 2).flatten(2)


@layout
def loop_over_sequences(q, k, v):
    q, k, v = (split(z).transpose(1, 2) for z in (q, k, v))
    return torch.stack([softmax(q[b] @ k[b].mT) @ v[b] for b in range(B)]).transpose(1, 2).flatten(2)


_AXES = {
    "bihd": lambda z: split(z),
    "bhid": lambda z: split(z).transpose(1, 2),
    "ibhd": lambda z: split(z).transpose(0, 1),
    "hbid": lambda z: split(z).permute(2, 0, 1, 3),
    "bhdi": lambda z: split(z).permute(0, 2, 3, 1),
    "hidb": lambda z: split(z).permute(2, 1, 3, 0),
}


def _einsum(query, key, scores, value):
    def attend(q, k, v):
        q, k, v = (_AXES[axes.replace("j", "i")](z) for axes, z in ((query, q), (key, k), (value, v)))
        weights = softmax(torch.einsum(f"{query},{key}->{scores}", q, k), scores.index("j"))
        return torch.einsum(f"{scores},{value}->bihd", weights, v).flatten(2)

    LAYOUTS[f"einsum {query},{key}->{scores},{value}"] = attend


for order in itertools.permutations("bhij"):
    _einsum("bihd", "bjhd", "".join(order), "bjhd")
_einsum("ibhd", "jbhd", "bhij", "jbhd")
_einsum("hbid", "hbjd", "hbij", "hbjd")
_einsum("bhid", "bhdj", "hbij", "bhjd")
_einsum("bihd", "hbjd", "ihbj", "bhdj")
_einsum("hidb", "bhdj", "jhib", "hjdb")
