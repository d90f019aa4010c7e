"""The Lightning callback: when to look, and for how long. What is done then is the recorder's."""

import math
import warnings
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import HasOptions, Options, takes
from .recorder import AttentionRecorder
from .run_record import RunRecord

if TYPE_CHECKING:
    import pytorch_lightning as pl

    _Callback = pl.Callback
else:

    def _installed(*homes: str) -> list[Any]:
        """Find a class in each package that is installed: Lightning is published under two names."""
        found = []
        for home in homes:
            module, _, name = home.rpartition(".")
            try:
                found.append(getattr(import_module(module), name))
            except ModuleNotFoundError:
                continue
        return found

    _callbacks = _installed("pytorch_lightning.Callback", "lightning.pytorch.Callback")
    if not _callbacks:
        raise ImportError(
            "AttentionMonitor is a Lightning callback and neither pytorch_lightning nor lightning is installed: "
            "pip install lightning; or use AttentionRecorder, which does the same for a training loop of your own."
        )
    # of both, where both are: LightningCLI asks for a subclass of its own
    _Callback = type("_Callback", tuple(_callbacks), {})


class AttentionMonitor(HasOptions, RunRecord, _Callback):
    """Watches every attention head while a model trains.

    At step 0, every ``every_n_steps`` optimizer steps and at the last step it takes per-head statistics of the real
    training forward and draws the maps of a probe (without one, of the batch's first sequence). It writes them to the
    trainer's loggers under the step that ``self.log`` uses, and warns when a head's attention is not finite or
    collapses. Training is not changed: the loss curve is bit-identical on CPU, and nothing is installed in the model
    between sampled steps. Under gradient accumulation the first batch of a sampled step is looked at; under manual
    optimization a batch is a step, however many optimizers make steps in it.

    Its arguments are those of ``attention_monitor.Options``.

    Attributes:
        probe: probes that will be run; a list that may be added to before training.
        first: first live Snapshot of this run.
        latest: newest live Snapshot.
        roles: roles that heads have, head -> role -> step at which that was first seen; they go on in a run that
            is resumed.

    Example:
        >>> AttentionMonitor(every_n_steps=100, probe="The cat sat on the mat.").every_n_steps
        100

    Raises:
        AttentionMonitorError: on an option that makes no sense, at once; before training, on a probe that cannot be
            encoded or that the model does not take.
        NoAttentionError: when no attention call is seen at the first sampled step that runs the whole model.
    """

    @takes(Options)
    def __init__(self, options: Options) -> None:
        self._begin_run()
        self._options = options
        self.probe = options.probes
        self.statistics = [statistic.name for statistic in options.resolved_statistics]
        self._recorder: AttentionRecorder | None = None
        self._sampling = False
        self._only_if_last = False  # whether the batch is looked at in case it is the last one
        self._optimizer_steps_before = 0  # done before the batch
        self._most_optimizer_steps = 1  # that a batch of this run has made

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._begin_run()
            self._most_optimizer_steps = 1

    @property
    def state_key(self) -> str:
        names = [probe.name for probe in self.probe]
        sites = self._options.site_patterns
        return self._generate_state_key(every_n_steps=self.every_n_steps, sites=sites, probe=names)

    def state_dict(self) -> dict[str, Any]:
        return {"roles": self._roles.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._roles.load(state_dict["roles"])

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Go on with roles also where other options give another key."""
        states = checkpoint.get("callbacks", {})
        of_monitors = [state for key, state in states.items() if key.startswith(f"{type(self).__qualname__}{{")]
        if self.state_key not in states and len(of_monitors) == 1:
            self.load_state_dict(of_monitors[0])

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        owners: tuple[Any, ...] = (getattr(trainer, "datamodule", None), pl_module)
        tokenizers = (getattr(owner, "tokenizer", None) for owner in owners)
        if not trainer.loggers:
            warnings.warn(
                "AttentionMonitor: the trainer has no logger, so nothing is written; findings are still reported.",
                stacklevel=2,
            )
        self._recorder = AttentionRecorder(
            pl_module,
            **vars(replace(self._options, probe=self.probe)),
            log_to=trainer.loggers,
            tokenizer=next((tokenizer for tokenizer in tokenizers if tokenizer is not None), None),
            all_ranks=trainer.world_size > 1,
            roles=self._roles,
        )
        self._recorder.check_probes(trainer.precision_plugin.forward_context())

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        step, self._optimizer_steps_before = _step(trainer), trainer.global_step
        ends = _ends_last_epoch(trainer, batch_idx)
        is_last = ends or self._may_reach_max_steps(trainer)
        first_of_step = batch_idx % trainer.accumulate_grad_batches == 0
        if self._recorder is not None and first_of_step and self._options.is_due(step, is_last=is_last):
            self._sampling = True
            self._only_if_last = not (pl_module.automatic_optimization or self._options.is_due(step, is_last=ends))
            self._recorder.begin(step, trainer.precision_plugin.forward_context(), is_last=is_last)

    def _may_reach_max_steps(self, trainer: "pl.Trainer") -> bool:
        """Whether the run ends with this step if its batch makes as many optimizer steps as any before it.

        ``max_steps`` counts those of all optimizers, of which manual optimization makes as many in a batch as it likes.
        """
        before_resuming = math.ceil(trainer.global_step / max(1, _step(trainer)))
        most = max(self._most_optimizer_steps, before_resuming)
        return trainer.max_steps != -1 and trainer.global_step + most >= trainer.max_steps

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Any) -> None:
        if self._sampling and self._recorder is not None:
            self._recorder.end_forward()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        made = trainer.global_step - self._optimizer_steps_before
        self._most_optimizer_steps = max(self._most_optimizer_steps, made)
        if self._sampling and self._recorder is not None:
            self._sampling = False
            if self._only_if_last and trainer.global_step < trainer.max_steps:
                self._recorder.abort()
                return
            seen = self._recorder.finish()
            self._keep(seen)
            if seen is not None and "normalized_entropy" in self.statistics:
                entropy = seen.mean("normalized_entropy")
                pl_module.log("head_entropy", entropy, prog_bar=True, logger=False, rank_zero_only=True)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._sampling and self._recorder is not None:  # the module's on_train_batch_start skipped the rest
            self._sampling = False
            self._recorder.abort()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Run the probes once more: a run that was stopped early did not know its last step."""
        if self._recorder is not None:
            self._recorder.sample_probes(_step(trainer), trainer.precision_plugin.forward_context())

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._close()

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._close()

    def flush(self) -> None:
        """Wait until everything seen so far is drawn and written."""
        if self._recorder is not None:
            self._recorder.writer.flush()

    def _close(self) -> None:
        """Leave the model as it was, and have everything on disk."""
        self._sampling = False
        if self._recorder is not None:
            self._recorder.close(complete=False)
            self._recorder = None


def _step(trainer: "pl.Trainer") -> int:
    """Count batches that ended in an optimizer step: the x axis of ``self.log``, as Lightning's own callbacks do."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _ends_last_epoch(trainer: "pl.Trainer", batch_idx: int) -> bool:
    """Whether the step that begins with a batch is the last one of ``max_epochs``."""
    n_left = trainer.num_training_batches - batch_idx
    ends_epoch = trainer.is_last_batch or n_left <= trainer.accumulate_grad_batches
    return ends_epoch and trainer.current_epoch + 1 == trainer.max_epochs
