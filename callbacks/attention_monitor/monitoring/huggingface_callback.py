"""The callback for Hugging Face's Trainer: when to look. Everything else is elsewhere."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..diagnosis.roles import HeadRoles
from ..probes.base import Probe
from ..snapshots import Snapshot
from ..statistics.catalogue import DEFAULT_STATISTICS
from .options import check_options
from .recorder import AttentionRecorder

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        "AttentionTrainerCallback is for Hugging Face's Trainer, and transformers is not installed: pip install "
        "transformers; or use AttentionRecorder, which does the same for a training loop of your own."
    ) from error


class AttentionTrainerCallback(TrainerCallback):
    """Does for Hugging Face's ``Trainer`` what ``AttentionMonitor`` does for Lightning's.

    At step 0, every ``every_n_steps`` optimizer steps and at the last step; under gradient accumulation the first
    forward of a step. A step is numbered by the optimizer steps done before it, as Lightning does it: Trainer logs its
    loss one step later.

    Args:
        every_n_steps: optimizer steps from one sample to the next.
        probe: a text whose maps are drawn with its tokens, a ``Probe``, or several; the tokenizer is the Trainer's
            ``processing_class``.
        statistics: names from ``attention_monitor.STATISTICS``.
        max_sequences: how many sequences of the batch, on each rank, the statistics are taken of.
        max_tokens: positions that are looked at as queries, over those sequences; None: all. Fewer sequences are
            looked at then, and of a sequence that is longer than that, blocks of rows spread over it evenly.
        sites: patterns as of a shell for the module paths to look at, such as ``model.decoder.*``; None: all.
        log_to: a folder for TensorBoard's files, or a ``SummaryWriter``; None: ``runs/attention`` in the Trainer's
            output folder, ``attention`` in ``$TENSORBOARD_LOGGING_DIR`` where that is set.

    Attributes:
        first: the first live Snapshot of this run.
        latest: the newest live Snapshot.
        roles: head -> role -> step at which it took that on, of the roles that heads have.

    Raises:
        AttentionMonitorError: on an option that makes no sense, at once; before training, on a probe that cannot be
            encoded or that the model does not take.
        NoAttentionError: when no attention call is seen at the first sampled step that runs the whole model.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        probe: str | Probe | list[str | Probe] | None = None,
        statistics: Sequence[str] = DEFAULT_STATISTICS,
        max_sequences: int = 4,
        max_tokens: int | None = None,
        sites: str | Sequence[str] | None = None,
        log_to: Any = None,
    ) -> None:
        self.every_n_steps, self.log_to = every_n_steps, log_to
        self.first: Snapshot | None = None
        self.latest: Snapshot | None = None
        self._options = check_options(every_n_steps, probe, statistics, max_sequences, max_tokens, sites)
        self._recorder: AttentionRecorder | None = None
        self._roles = HeadRoles()
        self._sampling = ExitStack()

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        return self._roles.since()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close(complete=False)  # of a run that failed
        self.first, self.latest, self._roles = None, None, HeadRoles()
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(str(args.output_dir), "runs")
        self._recorder = AttentionRecorder(
            kwargs["model"],
            **self._options,
            log_to=os.path.join(folder, "attention") if self.log_to is None else self.log_to,
            tokenizer=kwargs.get("processing_class"),
            all_ranks=args.world_size > 1,
            roles=self._roles,
        )
        self._recorder.check_probes()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, recorder = state.global_step, self._recorder
        if recorder is None or (step % self.every_n_steps and step != state.max_steps - 1):
            return
        self._sampling.close()
        if args.torch_compile:
            self._sampling.enter_context(torch.compiler.set_stance("force_eager"))
        recorder.prepare(step, is_last=step == state.max_steps - 1)
        self._sampling.callback(_WatchedForward(kwargs["model"], recorder).undo)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._sampling.close()
        if self._recorder is not None and self._recorder.is_recording:
            seen = self._recorder.finish()
            self.latest = seen or self.latest
            self.first = self.first or seen

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close(complete=True)

    def _close(self, complete: bool) -> None:
        self._sampling.close()
        if self._recorder is not None:
            self._recorder.close(complete=complete)
            self._recorder = None


class _WatchedForward:
    """Stands in for ``model.forward`` once, and watches that.

    Trainer tells no callback of an exception. So nothing may be on outside the forward, which is left by whatever
    happens in it. A copy of the model has its own forward: it is not watched.
    """

    def __init__(self, model: nn.Module, recorder: AttentionRecorder) -> None:
        self.model, self.recorder = model, recorder
        self.replaced, self.original = model.__dict__.get("forward"), model.forward  # accelerate replaces it too
        update_wrapper(self, self.original, updated=())
        model.__dict__["forward"] = self

    def undo(self) -> None:
        if self.model.__dict__.get("forward") is self:
            del self.model.__dict__["forward"]
            if self.replaced is not None:
                self.model.__dict__["forward"] = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.undo()
        with self.recorder.watch_forward():
            return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.model))
        if copy is None or self.replaced is not None:
            return deepcopy(self.original, memo)
        return MethodType(type(copy).forward, copy)

    def __reduce__(self) -> Any:
        return getattr, (self.model, "forward")
