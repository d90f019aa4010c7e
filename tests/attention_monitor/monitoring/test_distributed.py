"""Several processes, each with a part of the batch: the same numbers as one process with all of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from attention_monitor import AttentionMonitorError, AttentionRecorder

from ..project import VOCAB, Project, T

NAMES = ["entropy", "max_score", "collapse_fraction", "nonfinite_fraction", "previous_token"]
BATCH = torch.randint(VOCAB, (4, T), generator=torch.Generator().manual_seed(0))


def watch(batch, **options):
    """Values of one step at which the model is called on ``batch``, or not at all for None."""
    model = Project().eval()
    recorder = AttentionRecorder(model, statistics=NAMES, max_sequences=100, **options)
    with recorder.step(0), torch.no_grad():
        if batch is not None:
            model(batch)
    live = recorder.snapshots.get("live")
    recorder.close(complete=False)
    return None if live is None else [{n: v.tolist() for n, v in values.items()} for values in live.values]


def work(rank, parts, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(parts))
    log_to = str(Path(folder) / f"log{rank}")
    found = watch(parts[rank], all_ranks=True, log_to=log_to)
    (Path(folder) / f"{rank}.json").write_text(json.dumps([found, Path(log_to).exists()]))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([BATCH[:2], BATCH[2:]], id="even"),
        pytest.param([BATCH[:1], BATCH[1:]], id="uneven"),
        pytest.param([BATCH, None], id="a rank without data"),
        pytest.param([None, BATCH], id="rank zero without data"),
    ],
)
def test_every_rank_has_the_numbers_of_the_whole_batch_and_rank_zero_writes_them(tmp_path, parts):
    mp.spawn(work, (parts, str(tmp_path)), nprocs=2)
    whole = watch(BATCH)
    for rank in (0, 1):
        found, wrote = json.loads((tmp_path / f"{rank}.json").read_text())
        assert wrote == (rank == 0)
        for ours, expected in zip(found, whole, strict=True):
            for name in NAMES:
                assert ours[name] == pytest.approx(expected[name], abs=1e-6), name


class Twice(Project):
    """Calls its layers once more on a rank of its own."""

    def forward(self, tokens):
        super().forward(tokens)
        for block in self.blocks if dist.is_initialized() and dist.get_rank() == 1 else ():
            x = block(block(self.embedding(tokens)))
        return x if dist.get_rank() == 1 else None


def call_twice(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    recorder = AttentionRecorder(Twice().eval(), statistics=NAMES, all_ranks=True)
    with recorder.step(0), torch.no_grad():
        recorder.model(BATCH)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(recorder.snapshots["live"].sites))
    recorder.close(complete=False)
    dist.destroy_process_group()


def test_sites_have_one_name_on_all_ranks_though_one_calls_a_module_more_often(tmp_path):
    mp.spawn(call_twice, (str(tmp_path),), nprocs=2)
    sites = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sites[0] == sites[1]
    assert sorted(sites[0]) == [f"blocks.{layer}[{i}]" for layer in (0, 1) for i in (0, 1, 2)]


def test_no_data_anywhere_is_no_snapshot(tmp_path):
    mp.spawn(work, ([None, None], str(tmp_path)), nprocs=2)
    assert json.loads((tmp_path / "0.json").read_text())[0] is None


class ByHand(nn.Module):
    """Attention of which each process computes two heads, and a layer of its own after it.

    Args:
        seed: seed of what projects; on each process another one, it computes other heads.
        core: whether the product is a module of its own.
    """

    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    def __init__(self, seed, core):
        super().__init__()
        self.project, self.expert = nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.normal_(self.project.weight.data, generator=torch.Generator().manual_seed(seed))
        nn.init.normal_(self.expert.weight.data, generator=torch.Generator().manual_seed(dist.get_rank()))
        self.attend = self.Core() if core else F.scaled_dot_product_attention
        self.unused = nn.Parameter(torch.empty(8, 8, device="meta"))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return self.expert(self.attend(q, k, v).transpose(1, 2).flatten(2))


def watch_by_hand(rank, options, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    same, core = options
    recorder = AttentionRecorder(ByHand(0 if same else rank, core), 1, statistics=NAMES, all_ranks=True)
    said = []
    try:
        with recorder.step(0), torch.no_grad():
            recorder.model(torch.ones(2, 3, 8))
    except AttentionMonitorError as error:
        said.append(str(error))
    recorder.close(complete=False)
    (Path(folder) / f"{rank}.json").write_text(json.dumps([said, list(recorder.snapshots)]))
    dist.destroy_process_group()


@pytest.mark.parametrize("core", [True, False], ids=["in a core", "in one module"])
@pytest.mark.parametrize("same", [True, False], ids=["the same heads", "other heads on each process"])
def test_heads_of_other_weights_are_not_averaged_and_other_weights_elsewhere_do_not_matter(tmp_path, same, core):
    mp.spawn(watch_by_hand, ((same, core), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        said, sources = json.loads((tmp_path / f"{rank}.json").read_text())
        if same:
            assert (said, sources) == ([], ["live"])
        else:
            [sentence] = said
            assert re.match(r"The weights that make the queries of \w+ are not the same on all processes", sentence)
            assert sentence.endswith("watch a run with data parallelism alone, or leave the monitor out.")


TRAINING = """
import json, sys
import torch
import pytorch_lightning as pl
from attention_monitor import AttentionMonitor
from tests.attention_monitor.project import Project, T, VOCAB, make_trainer

torch.set_num_threads(1)
n, folder = int(sys.argv[1]), sys.argv[2]


class Data(Project):
    def train_dataloader(self):
        data = torch.randint(VOCAB, (24, T), generator=torch.Generator().manual_seed(4))
        return torch.utils.data.DataLoader(data[self.trainer.global_rank :: n], batch_size=4 // n)


class Keep(pl.Callback):
    values = []

    def on_train_batch_end(self, trainer, *_):
        [monitor] = [c for c in trainer.callbacks if isinstance(c, AttentionMonitor)]
        self.values.append([{k: v.tolist() for k, v in site.items()} for site in monitor.latest.values])


torch.nn.functional.dropout = lambda x, *_: x
attend = torch.nn.functional.scaled_dot_product_attention
torch.nn.functional.scaled_dot_product_attention = lambda *a, dropout_p=0.0, **k: attend(*a, **k)
strategy = {"strategy": "ddp", "devices": n} if n > 1 else {}
trainer = make_trainer(
    folder,
    [AttentionMonitor(every_n_steps=1, probe="hello", max_sequences=100), Keep()],
    max_steps=5,
    use_distributed_sampler=False,
    **strategy,
)
trainer.fit(Data())
if trainer.is_global_zero:
    print("VALUES" + json.dumps(Keep.values))
"""


def test_lightning_on_two_processes_gives_the_numbers_of_one(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    root = str(Path(__file__).parents[3])
    found = {}
    for n in (1, 2):
        run = subprocess.run(
            [sys.executable, str(script), str(n), str(tmp_path / str(n))],
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        [line] = [line for line in run.stdout.splitlines() if line.startswith("VALUES")]
        found[n] = json.loads(line.removeprefix("VALUES"))
    assert len(found[1]) == len(found[2]) == 5
    for one, two in zip(found[1], found[2], strict=True):
        for expected, ours in zip(one, two, strict=True):
            for name, values in expected.items():
                # weights differ by the rounding of averaged gradients
                assert ours[name] == pytest.approx(values, abs=1e-5, nan_ok=True), name
