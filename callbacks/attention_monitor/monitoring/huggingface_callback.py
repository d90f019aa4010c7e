"""The callback for Hugging Face's Trainer: when to look. What is done then is the recorder's."""

import os
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn

from .options import HasOptions, Options, takes
from .recorder import AttentionRecorder
from .run_record import RunRecord

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        "AttentionTrainerCallback is for Hugging Face's Trainer, and transformers is not installed: pip install "
        "transformers; or use AttentionRecorder, which does the same for a training loop of your own."
    ) from error


@dataclass(frozen=True)
class TrainerOptions(Options):
    """The options of ``AttentionTrainerCallback``.

    Args:
        log_to: a folder for TensorBoard's files, or a ``SummaryWriter``; None: ``runs/attention`` in the Trainer's
            output folder, ``attention`` in ``$TENSORBOARD_LOGGING_DIR`` where that is set.
    """

    log_to: Any = None


class AttentionTrainerCallback(HasOptions, RunRecord, TrainerCallback):
    """Does for Hugging Face's ``Trainer`` what ``AttentionMonitor`` does for Lightning's.

    At step 0, every ``every_n_steps`` optimizer steps and at the last step; under gradient accumulation the first
    forward of a step. A step is numbered by the optimizer steps done before it, as Lightning does it: Trainer logs its
    loss one step later. The tokenizer of probes is the Trainer's ``processing_class``.

    Its arguments are those of ``attention_monitor.Options``, and ``log_to``: a folder for TensorBoard's files, or a
    ``SummaryWriter``; without it files go to ``runs/attention`` in the Trainer's output folder, or to ``attention`` in
    ``$TENSORBOARD_LOGGING_DIR`` where that is set.

    Attributes:
        first: first live Snapshot of this run.
        latest: newest live Snapshot.
        roles: roles that heads have, head -> role -> step at which that was first seen.

    Example:
        >>> AttentionTrainerCallback(every_n_steps=100).every_n_steps
        100

    Raises:
        AttentionMonitorError: on an option that makes no sense, at once; before training, on a probe that cannot be
            encoded or that the model does not take.
        NoAttentionError: when no attention call is seen at the first sampled step that runs the whole model.
    """

    @takes(TrainerOptions)
    def __init__(self, options: TrainerOptions) -> None:
        self._begin_run()
        self._options, self.log_to = options, options.log_to
        self._recorder: AttentionRecorder | None = None
        self._sampling = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close(complete=False)  # of a run that failed
        self._begin_run()
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(str(args.output_dir), "runs")
        self._recorder = AttentionRecorder(
            kwargs["model"],
            **vars(self._options)
            | {"log_to": os.path.join(folder, "attention") if self.log_to is None else self.log_to},
            tokenizer=kwargs.get("processing_class"),
            all_ranks=args.world_size > 1,
            roles=self._roles,
        )
        self._recorder.check_probes()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, recorder = state.global_step, self._recorder
        is_last = step == state.max_steps - 1
        if recorder is None or not self._options.is_due(step, is_last=is_last):
            return
        self._sampling.close()
        if args.torch_compile:
            self._sampling.enter_context(torch.compiler.set_stance("force_eager"))
        recorder.prepare(step, is_last=is_last)
        self._sampling.callback(_WatchedForward(kwargs["model"], recorder).undo)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._sampling.close()
        if self._recorder is not None and self._recorder.is_recording:
            self._keep(self._recorder.finish())

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
