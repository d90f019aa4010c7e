"""Attention as people write it. Each model keeps the pattern it used, (B, H, Q, K), in ``kept``."""

import math

import torch
import torch.nn.functional as F
from torch import nn

T, C, H = 6, 8, 2
D = C // H


class Keeping(nn.Module):
    def keep(self, pattern):
        self.kept = pattern.detach().float().clone()


class NanoGPT(Keeping):
    """Both branches of a small GPT: one projection for q, k and v, a tril buffer."""

    def __init__(self, flash):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout = nn.Dropout(0.5)
        self.flash = flash
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(b, t, H, c // H).transpose(1, 2)
        q = q.view(b, t, H, c // H).transpose(1, 2)
        v = v.view(b, t, H, c // H).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        self.keep(att.exp() / att.exp().sum(-1, keepdim=True))
        if self.flash:
            dropout = 0.5 if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Textbook(Keeping):
    """W_query, W_key, W_value, a boolean mask buffer, softmax(scores / d**0.5)."""

    def __init__(self, mask_value=-torch.inf, in_place=True):
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.out_proj, self.dropout = nn.Linear(C, C), nn.Dropout(0.5)
        self.mask_value, self.in_place = mask_value, in_place
        self.register_buffer("mask", torch.triu(torch.ones(16, 16), diagonal=1))

    def forward(self, x):
        b, num_tokens, _ = x.shape
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        keys = keys.view(b, num_tokens, H, D).transpose(1, 2)
        queries = queries.view(b, num_tokens, H, D).transpose(1, 2)
        values = values.view(b, num_tokens, H, D).transpose(1, 2)
        attn_scores = queries @ keys.transpose(2, 3)
        mask_bool = self.mask.bool()[:num_tokens, :num_tokens]
        if self.in_place:
            attn_scores.masked_fill_(mask_bool, self.mask_value)
        else:
            attn_scores = torch.where(mask_bool, self.mask_value, attn_scores)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        self.keep(attn_weights)
        attn_weights = self.dropout(attn_weights)
        context_vec = (attn_weights @ values).transpose(1, 2)
        return self.out_proj(context_vec.contiguous().view(b, num_tokens, C))


class OneHead(Keeping):
    """(B, T, T) scores of a single head."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))
        self.out = nn.Linear(D, C)

    def forward(self, x):
        _, t, _ = x.shape
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * D**-0.5
        wei = F.softmax(wei.masked_fill(self.tril[:t, :t] == 0, float("-inf")), dim=-1)
        self.keep(wei[:, None])
        return self.out(wei @ self.value(x))


class SequenceFirst(Keeping):
    """(T, B, C) inputs and (B * H, T, T) scores, as in fairseq; softmax in float32, cast back."""

    def __init__(self):
        super().__init__()
        self.num_heads = H
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        t, b, _ = x.size()
        q = (self.q_proj(x) * D**-0.5).contiguous().view(t, b * self.num_heads, D).transpose(0, 1)
        k = self.k_proj(x).contiguous().view(-1, b * self.num_heads, D).transpose(0, 1)
        v = self.v_proj(x).contiguous().view(-1, b * self.num_heads, D).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2))
        probs = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        self.keep(probs.view(b, H, t, t))
        attn = torch.bmm(F.dropout(probs, 0.5, self.training), v)
        return self.out_proj(attn.transpose(0, 1).contiguous().view(t, b, C)).transpose(0, 1)


class FlatHeads(Keeping):
    """(B * H, T, T) scores in a module that does not say how many heads it has."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, H, D).permute(2, 0, 3, 1, 4).reshape(3, b * H, t, D).unbind(0)
        attn = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1)
        self.keep(attn.view(b, H, t, t))
        return self.proj(torch.bmm(attn, v).view(b, H, t, D).transpose(1, 2).reshape(b, t, C))


class Einsum(Keeping):
    """Einsum throughout; ``layout`` is that of the scores."""

    def __init__(self, layout="bhij"):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.layout = layout

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (z.reshape(b, t, H, D) for z in self.to_qkv(x).chunk(3, dim=-1))
        sim = torch.einsum(f"bihd,bjhd->{self.layout}", q * D**-0.5, k)
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        mask = {"bhij": mask, "bijh": mask[:, :, None], "bjih": mask.T[:, :, None]}[self.layout]
        sim = sim.masked_fill(mask, -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=self.layout.index("j"))
        self.keep(torch.einsum(f"{self.layout}->bhij", attn))
        out = torch.einsum(f"{self.layout}, bjhd -> bihd", attn, v)
        return self.to_out(out.reshape(b, t, C))


class Ellipsis(Keeping):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        attn = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
        self.keep(attn)
        return self.proj(torch.einsum("...ij,...jd->...id", attn, v).transpose(1, 2).reshape(b, t, C))


class ValuesFirst(Keeping):
    """An image model's attention: channels first, values times transposed weights."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        h = x.transpose(1, 2).reshape(b, C, 2, t // 2)
        q, k, v = self.q(h).reshape(b, C, t), self.k(h).reshape(b, C, t), self.v(h).reshape(b, C, t)
        w = F.softmax(torch.bmm(q.permute(0, 2, 1), k) * C**-0.5, dim=2)
        self.keep(w[:, None])
        out = torch.bmm(v, w.permute(0, 2, 1)).reshape(b, C, 2, t // 2)
        return self.proj_out(out).reshape(b, C, t).transpose(1, 2)


class Sinks(Keeping):
    """A learned column in the softmax, dropped before the values."""

    def __init__(self, first=False):
        super().__init__()
        self.qkv, self.proj, self.first = nn.Linear(C, 3 * C), nn.Linear(C, C), first
        self.sinks = nn.Parameter(torch.randn(H))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / D**0.5
        scores = scores + torch.full((t, t), torch.finfo(scores.dtype).min).triu(1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)
        logits = torch.cat([sinks, scores] if self.first else [scores, sinks], dim=-1)
        probs = F.softmax(logits - logits.max(-1, keepdim=True).values, dim=-1)
        probs = probs[..., 1:] if self.first else probs[..., :-1]
        self.keep(probs)
        return self.proj((F.dropout(probs, 0.5, self.training) @ v).transpose(1, 2).reshape(b, t, C))


class GroupedQueries(Keeping):
    """Five axes: (B, H_kv, H / H_kv, T, T)."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * D), nn.Linear(C, C)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 1, H, D).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(b, t, 2, 1, 1, D).permute(2, 0, 3, 4, 1, 5)
        probs = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / D**0.5, dim=-1)
        self.keep(probs.flatten(1, 2))
        return self.proj(torch.matmul(probs, v).flatten(1, 2).transpose(1, 2).reshape(b, t, C))


class Softcapped(Keeping):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.softmax = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Softmax(dim=-1)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = 5.0 * torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / 5.0)
        bias = torch.zeros(t, t)
        bias += -1e4 * torch.ones(t, t).triu(1)
        weights = self.softmax(scores + bias)
        self.keep(weights)
        return self.proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class Overwritten(Keeping):
    """The softmax is written over its own scores."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        probs = scores.softmax(-1)
        scores.zero_()
        self.keep(probs)
        return self.proj((probs @ v).transpose(1, 2).flatten(2))


class InPlace(Keeping):
    """The result of the softmax is written over its scores, and dropout over that."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    @torch.no_grad()
    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        torch.softmax(scores, -1, out=scores)
        self.keep(scores)
        F.dropout(scores, 0.5, self.training, inplace=True)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Bahdanau(Keeping):
    """Additive attention: scores come from a layer, so that only the class's name says what this is."""

    def __init__(self):
        super().__init__()
        self.W, self.U, self.v, self.out = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 1), nn.Linear(C, C)

    def forward(self, x):
        energy = self.v(torch.tanh(self.W(x)[:, :, None] + self.U(x)[:, None])).squeeze(-1)  # (B, Q, K)
        weights = F.softmax(energy, dim=-1)
        self.keep(weights[:, None])
        return self.out(torch.bmm(weights, x))


class AdditiveAttention(Bahdanau):
    pass


class TalkingHeads(Keeping):
    """Heads are mixed before and after the softmax."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mix = nn.Parameter(torch.randn(H, H))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT, self.mix)
        probs = scores.softmax(-1)
        self.keep(probs)
        return self.proj((probs @ v).transpose(1, 2).flatten(2))


class Recurrent(Keeping):
    """Luong's: a state (B, C) looks at encoder outputs."""

    def __init__(self):
        super().__init__()
        self.W, self.out = nn.Linear(C, C, bias=False), nn.Linear(2 * C, C)

    def forward(self, x):
        state = x[:, -1].tanh()
        scores = torch.bmm(self.W(x), state.unsqueeze(2)).squeeze(2)  # (B, T)
        weights = F.softmax(scores, dim=1)
        self.keep(weights[:, None, None])
        context = torch.bmm(weights.unsqueeze(1), x).squeeze(1)
        return self.out(torch.cat([state, context], 1))


class MaskedAfterwards(Keeping):
    """The mask comes after the softmax, and the rows are made to sum to 1 again."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).mT / C**0.5, dim=-1)
        masked = weights * torch.tril(torch.ones(T, T))
        normalized = masked / masked.sum(dim=-1, keepdim=True)
        self.keep(normalized[:, None])
        return F.dropout(normalized, 0.5, self.training) @ self.v(x)


class ZeroedAfterwards(Keeping):
    """Rows and entries that may not be seen are set to 0 after the softmax too, which changes nothing."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q @ k.mT).masked_fill(hidden, torch.finfo(x.dtype).min)
        weights = torch.nan_to_num(scores.softmax(-1).masked_fill(hidden, 0.0))
        self.keep(weights[:, None])
        return weights @ v


class HeadsFirst(Keeping):
    """(H * B, T, T): heads are split off and put one after the other along the batch."""

    def __init__(self, how="cat"):
        super().__init__()
        self.q, self.k, self.v, self.how = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C), how

    def split(self, x):
        if self.how == "cat":
            return torch.cat(x.split(D, 2), 0)
        return x.view(x.shape[0], T, H, D).permute(2, 0, 1, 3).contiguous().view(-1, T, D)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / D**0.5, dim=2)
        self.keep(weights.unflatten(0, (H, -1)).transpose(0, 1))
        return torch.cat(torch.bmm(weights, v).split(x.shape[0], 0), 2)


class OneKeyHead(Keeping):
    """Queries of several heads against keys and values of one."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(C, C), nn.Linear(C, 2 * D)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        weights = torch.einsum("b h i d, b j d -> b h i j", q, k).softmax(-1)
        self.keep(weights)
        return torch.einsum("b h i j, b j d -> b h i d", weights, v).transpose(1, 2).flatten(2)


class KeysFirst(Keeping):
    """Scores are keys x queries, and the softmax is over their second axis from the end."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        weights = torch.softmax(self.k(x) @ self.q(x).mT, axis=-2).mT
        self.keep(weights[:, None])
        return weights @ self.v(x)


class AttentionPooling(Keeping):
    """One score for each position; ``how`` they meet the values."""

    def __init__(self, how):
        super().__init__()
        self.score, self.how = nn.Linear(C, 1), how

    def forward(self, x):
        if self.how == "column":
            weights = self.score(x).softmax(dim=1)  # (B, T, 1)
            self.keep(weights.mT[:, None])
            return (weights.transpose(1, 2) @ x).squeeze(1)
        weights = F.softmax(self.score(x).squeeze(-1), dim=1)  # (B, T)
        self.keep(weights[:, None, None])
        return (
            torch.bmm(weights.unsqueeze(1), x).squeeze(1)
            if self.how == "bmm"
            else torch.einsum("bs,bsd->bd", weights, x)
        )


class EntryByEntry(Keeping):
    """The product of queries and keys is written as a sum."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        weights = torch.sum(self.q(x)[:, :, None] * self.k(x)[:, None], dim=-1).softmax(-1)
        self.keep(weights[:, None])
        return weights @ x


class LanguageModel(Keeping):
    """Everything in one module, from token numbers to the product; ``flat``: (B * H, T, T)."""

    def __init__(self, flat):
        super().__init__()
        self.e, self.q, self.k, self.v = nn.Embedding(11, C), nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.flat, self.num_heads = flat, H

    def forward(self, x):
        x = self.e((x[..., 0].abs() * 7).long() % 11)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.flat:
            q, k, v = (z.view(-1, T, H, D).transpose(1, 2).reshape(-1, T, D) for z in (q, k, v))
        weights = F.softmax(q @ k.mT, -1)
        self.keep(weights.view(-1, H, T, T) if self.flat else weights[:, None])
        return weights @ v


WRITTEN = {
    "masked afterwards": MaskedAfterwards,
    "zeroed afterwards": ZeroedAfterwards,
    "heads first, cat": HeadsFirst,
    "heads first, permute": lambda: HeadsFirst("permute"),
    "one key head": OneKeyHead,
    "keys first": KeysFirst,
    "pooling, bmm": lambda: AttentionPooling("bmm"),
    "pooling, einsum": lambda: AttentionPooling("einsum"),
    "pooling, column": lambda: AttentionPooling("column"),
    "entry by entry": EntryByEntry,
    "language model": lambda: LanguageModel(flat=False),
    "language model, flat": lambda: LanguageModel(flat=True),
    "nanogpt, flash": lambda: NanoGPT(flash=True),
    "nanogpt, manual": lambda: NanoGPT(flash=False),
    "textbook": Textbook,
    "textbook, -1e9": lambda: Textbook(-1e9),
    "textbook, finfo.min": lambda: Textbook(torch.finfo(torch.float32).min, in_place=False),
    "one head": OneHead,
    "sequence first": SequenceFirst,
    "flat heads": FlatHeads,
    "einsum": Einsum,
    "einsum, heads last": lambda: Einsum("bijh"),
    "einsum, keys second": lambda: Einsum("bjih"),
    "ellipsis": Ellipsis,
    "values first": ValuesFirst,
    "sinks": Sinks,
    "sinks first": lambda: Sinks(first=True),
    "grouped queries": GroupedQueries,
    "talking heads": TalkingHeads,
    "softcapped": Softcapped,
    "overwritten": Overwritten,
    "in place": InPlace,
    "additive": AdditiveAttention,
    "recurrent": Recurrent,
}
