"""Heads that are split over processes are refused, and nothing else that is spread over processes is."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from attention_monitor import NoAttentionError, capture, summarize

B, T, C, D = 2, 6, 16, 4
X = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Takes the number of heads from the width of what is projected, as models for tensor parallelism do."""

    def __init__(self, written=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.core = Core(written)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x):
        q, k, v = (y.view(B, T, -1, D).transpose(1, 2) for y in self.project(x))
        return self.o(self.core(q, k, v).transpose(1, 2).reshape(B, T, -1))


class Fused(Attention):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        del self.q, self.k, self.v

    def project(self, x):
        return self.qkv(x).chunk(3, -1)


class Transposed(Attention):
    """Projects by a matrix product with the transposed weight."""

    class Linear(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t() + self.bias

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (self.Linear(C, C) for _ in range(3))


class Core(nn.Module):
    """The product, in a module of its own."""

    def __init__(self, written):
        super().__init__()
        self.written = written

    def forward(self, q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v if self.written else F.scaled_dot_product_attention(q, k, v)


class Model(nn.Module):
    def __init__(self, attention=Attention, **options):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": attention(**options), "up": nn.Linear(C, 2 * C), "down": nn.Linear(2 * C, C)})
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attn"](x)
            x = x + block["down"](block["up"](x).relu())
        return x


class MultiHead(nn.Module):
    """nn.MultiheadAttention with weights for q, k and v, which are given to its function as they are."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(C, C // D, kdim=C + 1, vdim=C + 1, bias=False, batch_first=True)

    def forward(self, query, key):
        return self.attn(query, key, key, need_weights=False)[0]


class Wrap(ActivationWrapper):
    """What checkpointing puts around a module."""

    def forward(self, *inputs):
        return self._checkpoint_wrapped_module(*inputs)


class Attend(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def watch(model, *inputs):
    """What capturing says and sees: entropies by site, warnings, the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error, calls = None, []
        try:
            with torch.no_grad(), capture(model) as calls:
                model(*(inputs or (X,)))
        except NoAttentionError as reason:
            error = str(reason)
    said = [str(w.message) for w in caught if "attention_monitor" in str(w.message)]
    return [{c.site: summarize(c)["entropy"].tolist() for c in calls}, said, error]


def cases(mesh):
    """Name -> what was seen of a model, and of the same model in one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns = {"attn.q": ColwiseParallel(), "attn.k": ColwiseParallel(), "attn.v": ColwiseParallel()}
    rows = {"attn.o": RowwiseParallel()}
    mlp = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    whole_rows = {"attn.o": RowwiseParallel(input_layouts=Replicate())}
    tp = mesh["tp"]

    def parallel(model, *plans, mesh=tp):
        for block, plan in zip(model.blocks, plans, strict=True):
            parallelize_module(block, mesh, plan)
        return model

    def sharded(model, *parts, mesh=mesh["dp"]):
        for part in [p for block in model.blocks for p in block.modules() if isinstance(p, parts)]:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def wrapped(model):
        for block in model.blocks:
            block["attn"].core = Wrap(Wrap(block["attn"].core))
        return model

    both = [columns | rows] * 2
    if tp.size() == 1:  # one process of tensor parallelism splits nothing
        yield "one rank", parallel(Model(), *both), Model()
        yield "fsdp, blocks", sharded(Model(), Attention), Model()
        yield "fsdp, each linear", sharded(Model(), nn.Linear), Model()
    else:
        yield "separate", parallel(Model(), *both), Model()
        yield "with mlp", parallel(Model(), *[columns | rows | mlp] * 2), Model()
        yield "wrapped core", wrapped(parallel(Model(), *both)), Model()
        gathered = {name: ColwiseParallel(output_layouts=Replicate()) for name in columns}
        yield "gathered", parallel(Model(), gathered, gathered), Model()
        fused = {"attn.qkv": ColwiseParallel(output_layouts=Replicate())}
        yield "gathered, fused", parallel(Model(Fused), fused, fused), Model(Fused)
        yield "fused", parallel(Model(Fused), *[{"attn.qkv": ColwiseParallel()} | rows] * 2), Model(Fused)
        yield "transposed", parallel(Model(Transposed), *both), Model(Transposed)
        yield "written out", parallel(Model(written=True), *both), Model(written=True)
        yield "only the first layer", parallel(Model(), columns | rows, {}), Model()
        yield "output projection", parallel(Model(), whole_rows, whole_rows), Model()
        yield "mlp", parallel(Model(), mlp, mlp), Model()
    if mesh.size() == 4:
        yield "dp x tp", sharded(parallel(Model(), *both), Attention), Model()
        yield "dp x mlp", sharded(parallel(Model(), mlp, mlp), Attention), Model()
    elif tp.size() == 2:
        q = torch.randn(B, 4, T, D, generator=torch.Generator().manual_seed(2))
        model, memory = MultiHead(), torch.randn(B, T, C + 1)
        for part in model.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                place = Shard(0) if name.endswith("proj_weight") else Replicate()
                setattr(part, name, nn.Parameter(distribute_tensor(weight.data, tp, [place])))
        given = [distribute_tensor(x, tp, [Replicate()]) for x in (X, memory)]
        yield "multihead", (model, *given), None
        yield "sharded queries", (Attend(), *(distribute_tensor(q, tp, [Shard(1)]) for _ in range(3))), None


def work(rank, shape, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=shape[0] * shape[1])
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    found = {}
    for name, model, plain in cases(mesh):
        seen = watch(*model) if isinstance(model, tuple) else watch(model)
        found[name] = [*seen, plain and watch(copy.deepcopy(plain))[0]]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def results(folder, shape):
    mp.spawn(work, (shape, str(folder)), nprocs=shape[0] * shape[1])
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(shape[0] * shape[1])]
    assert all(list(rank) == list(ranks[0]) for rank in ranks)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a case -> for each rank: entropies by site, warnings, error, entropies of one process."""
    shapes = {"tp": (1, 2), "dp": (2, 1), "both": (2, 2)}
    return {name: results(tmp_path_factory.mktemp(name), shape) for name, shape in shapes.items()}


SPLIT = "heads are split over 2 processes (tensor parallelism over 'tp'), and numbers of different heads would be mixed"


@pytest.mark.parametrize(
    ("mesh", "case"),
    [
        ("tp", "separate"),
        ("tp", "with mlp"),
        ("tp", "fused"),
        ("tp", "transposed"),
        ("tp", "written out"),
        ("tp", "wrapped core"),
        ("both", "separate"),
        ("both", "dp x tp"),
    ],
)
def test_heads_that_are_split_over_processes_are_refused(found, mesh, case):
    for sites, said, error, _ in found[mesh][case]:
        assert sites == {}
        assert said == [
            f"attention_monitor could not look at a call of blocks.{i}.attn.core: {SPLIT}; it is left out: "
            "watch a run without tensor parallelism to see it"
            for i in range(2)
        ]
        assert error.startswith("No attention call can be looked at in ")
        assert error.endswith(
            f": in blocks.0.attn.core, blocks.1.attn.core {SPLIT}; watch a run without tensor parallelism, or leave "
            "the monitor out."
        )


@pytest.mark.parametrize(
    ("mesh", "case"),
    [
        ("tp", "output projection"),
        ("tp", "mlp"),
        ("tp", "gathered"),
        ("tp", "gathered, fused"),
        ("dp", "one rank"),
        ("dp", "fsdp, blocks"),
        ("dp", "fsdp, each linear"),
        ("both", "mlp"),
        ("both", "dp x mlp"),
    ],
)
def test_what_else_is_spread_over_processes_has_the_numbers_of_one(found, mesh, case):
    for sites, said, error, plain in found[mesh][case]:
        assert error is None
        assert said == []
        assert list(sites) == list(plain) == ["blocks.0.attn.core", "blocks.1.attn.core"]
        for site, entropy in plain.items():
            assert len(entropy) == C // D
            assert sites[site] == pytest.approx(entropy, abs=1e-5)


def test_where_one_layer_is_split_the_other_is_captured(found):
    for sites, said, error, plain in found["tp"]["only the first layer"]:
        assert error is None
        assert list(sites) == ["blocks.1.attn.core"]
        assert sites["blocks.1.attn.core"] == pytest.approx(plain["blocks.1.attn.core"], abs=1e-5)
        assert len(said) == 1
        assert f"a call of blocks.0.attn.core: {SPLIT}" in said[0]


@pytest.mark.parametrize(("case", "site"), [("sharded queries", "Attend"), ("multihead", "attn")])
def test_queries_that_are_sharded_themselves_are_refused(found, case, site):
    for sites, said, error, _ in found["tp"][case]:
        assert sites == {}
        assert SPLIT in said[0]
        assert f"in {site} {SPLIT}" in error
