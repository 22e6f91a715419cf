"""The training loop: windows, steps, validation, checkpoints. Killed at any time it goes on from the last, to the bit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flashlm.errors import ConfigError, PackError, TrainingError
from flashlm.pru.cell import State
from flashlm.pru.config import PRUConfig
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.batches import columns, draw_length, window
from flashlm.pru.training.checkpoint import CheckpointFolder, Progress, check_same, match_run
from flashlm.pru.training.corpus import Corpus
from flashlm.pru.training.evaluate import Score, exp, score
from flashlm.pru.training.interruption import Interruption
from flashlm.pru.training.metrics import METRICS_FILE, Metrics
from flashlm.pru.training.optimiser import AveragingSGD
from flashlm.pru.training.processes import Processes
from flashlm.pru.training.regularisers import run_window
from flashlm.pru.training.saved import fingerprint, load_model, save_best
from flashlm.pru.training.settings import Recipe, check_known

_MAY_DIFFER = {"training.epochs", "recipe.name", "corpus.folder"}
_CONFIG_FIELDS = ["embedding_size", "hidden_size", "num_layers", "groups", "levels", "arch", "split", "subsampling"]
_CONFIG_FIELDS += ["residual", "init"]


class Trainer:
    """A run in a folder: made anew, or taken up where it was. It seeds torch's global generator, and draws from it.

    Args:
        corpus: What to train on.
        recipe: The model and how to train it.
        out: The run's folder.
        start: Run, or saved model, whose weights to start from (the fine-tuning stage); it is the best until beaten.
        device: `auto`, `cpu` or `cuda`.
        checkpoint_every_s: Seconds between checkpoints; there is one after each epoch too.
        log_every: Steps between rows of the metrics.
        has_tensorboard: Write metrics for TensorBoard too.
        on_progress: Called with tokens done, tokens of the epoch, and what is going on.
        note: Called with lines for people.

    Raises:
        ConfigError: The folder holds another run, or a setting does not fit.
        PackError: The checkpoint is damaged.
    """

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        out: Path,
        *,
        start: Path | None = None,
        device: str = "auto",
        checkpoint_every_s: float = 120.0,
        log_every: int = 50,
        has_tensorboard: bool = False,
        on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.corpus, self.recipe, self.out = corpus, recipe, out
        self.settings = recipe.training
        self.checkpoint_every_s, self.log_every = checkpoint_every_s, log_every
        self.processes = Processes(device)
        is_main = self.processes.is_main
        self._report = on_progress if is_main else lambda done, total, what: None
        self._note = note if is_main else lambda line: None
        self._rows = self.processes.columns_of(columns(corpus.ids["train"], self.settings.batch_size))
        if self._rows.shape[0] < 3:
            raise ConfigError(
                f"the training text has {len(corpus.ids['train'])} tokens, too few for"
                f" batch_size={self.settings.batch_size}: each column needs at least 3"
            )
        self._lengths = torch.Generator().manual_seed(self.settings.seed)  # the same in all processes
        torch.manual_seed(self.settings.seed)
        self.model = PRUForCausalLM(model_config(corpus, recipe)).to(self.processes.device)
        torch.manual_seed(self.settings.seed + self.processes.rank)
        self.optimiser = AveragingSGD(list(self.model.parameters()), self.settings.weight_decay)
        if self.settings.starts_averaging:
            self.optimiser.start_averaging()
        self.progress = Progress()
        self._state: tuple[State, ...] | None = None
        self._checkpoints = CheckpointFolder(out, self.processes)
        self._metrics = Metrics(out / METRICS_FILE, has_tensorboard and self.processes.is_main)
        started = None if start is None else load_model(start)
        if self.processes.is_main:
            match_run(out, self._run_description(started), _MAY_DIFFER)
        self.processes.wait()
        if not self._resume() and started is not None:
            self._start_from(started)
        self._saved_at = time.monotonic()

    def run(self, until_epoch: int | None = None) -> Progress:
        """Train to the end of an epoch.

        Args:
            until_epoch: The last epoch to finish; None: all of the settings'.

        Returns:
            Where the run is then.

        Raises:
            TrainingError: The loss is not a finite number. The last checkpoint is from before that.
            KeyboardInterrupt: Ctrl-C, after a checkpoint.
        """
        last = self.settings.epochs if until_epoch is None else min(until_epoch, self.settings.epochs)
        with Interruption() as interruption:
            while self.progress.epoch <= last and not self.progress.is_done:
                self._train_epoch(interruption)
                self._finish_epoch()
                self.save()
                self._heed(interruption)
        return self.progress

    def save(self) -> Path:
        """Write a checkpoint now."""
        progress = self.progress
        progress.num_averaged = self.optimiser.num_averaged if self.optimiser.is_averaging else None
        progress.lr_before = self.optimiser.lr_before
        place = self._checkpoints.save(progress, self._weights(), self._own_state())
        self._saved_at = time.monotonic()
        return place

    def _train_epoch(self, interruption: Interruption) -> None:
        progress, total = self.progress, self._rows.shape[0]
        self.model.train()
        while progress.row < total - 2:  # the authors' loop leaves a last single row out
            self._step()
            self._report(
                min(progress.row, total) * self.settings.batch_size,
                total * self.settings.batch_size,
                f"epoch {progress.epoch}, perplexity {exp(progress.loss_sum / progress.num_tokens):.1f}",
            )
            self._heed(interruption)
            if self.processes.any(time.monotonic() - self._saved_at >= self.checkpoint_every_s):
                self.save()

    def _heed(self, interruption: Interruption) -> None:
        if not self.processes.any(interruption.received is not None):
            return
        place = self.save()
        self._note(f"interrupted at step {self.progress.step}; {place} is good, the same command goes on from it")
        interruption.deliver()
        raise KeyboardInterrupt  # the signal came to another process

    def _step(self) -> None:
        progress, settings = self.progress, self.settings
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        length = draw_length(settings, self._lengths)
        inputs, targets = window(self._rows, progress.row, length)
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            result = run_window(self.model, settings, inputs, targets, self._state)
        loss = result.loss.item()
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}")
        result.loss.backward()  # type: ignore[no-untyped-call]
        parameters = self.optimiser.parameters
        self.processes.mean([p.grad for p in parameters if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item()
        if not math.isfinite(norm):
            self._stop(f"the gradient's norm is {norm}")
        lr = settings.lr * length / settings.bptt
        self.optimiser.step(lr)
        self._state = result.state
        progress.step += 1
        progress.row += length
        progress.loss_sum += result.cross_entropy.item() * targets.numel()
        progress.num_tokens += targets.numel()
        progress.step_s.append(time.perf_counter() - began_s)
        progress.cpu_s += time.process_time() - began_cpu_s
        if progress.step % self.log_every == 0 and self.processes.is_main:
            self._metrics.add(
                "train",
                step=progress.step,
                epoch=progress.epoch,
                loss=loss,
                cross_entropy=result.cross_entropy.item(),
                epoch_perplexity=exp(progress.loss_sum / progress.num_tokens),
                gradient_norm=norm,
                lr=lr,
                window=length,
                step_s=statistics.median(progress.step_s[-self.log_every :]),
            )

    def _finish_epoch(self) -> None:
        """Validate, keep the best model, decide about averaging, and turn to the next epoch."""
        progress = self.progress
        self.save()  # so that a kill during the validation costs no training
        self._report(0, 1, f"epoch {progress.epoch}, validation")
        with self.optimiser.averaged():
            result = self._validate()
            loss = result.loss
            if not math.isfinite(loss):
                self._stop(f"the validation loss is {loss}")
            if self.processes.is_main:
                self._metrics.add(
                    "valid",
                    step=progress.step,
                    epoch=progress.epoch,
                    loss=loss,
                    perplexity=result.perplexity,
                    published_perplexity=result.published_perplexity,
                    train_perplexity=exp(progress.loss_sum / progress.num_tokens),
                    is_averaged=self.optimiser.is_averaging,
                    num_steps=len(progress.step_s),
                    median_step_s=statistics.median(progress.step_s),
                    training_s=sum(progress.step_s),
                    training_cpu_s=progress.cpu_s,
                )
                if progress.best_loss is None or loss < progress.best_loss:
                    self._save_best(loss)
                if not self._metrics.draw() and progress.epoch == 1:
                    self._note("no loss curve: matplotlib is not installed (pip install matplotlib)")
        self._note(
            f"epoch {progress.epoch}: train {exp(progress.loss_sum / progress.num_tokens):.2f},"
            f" valid {result.perplexity:.2f}, {sum(progress.step_s):.0f} s"
        )
        self._decide(loss)
        progress.valid_losses.append(loss)
        progress.best_loss = loss if progress.best_loss is None else min(loss, progress.best_loss)
        progress.epoch += 1
        progress.row, progress.loss_sum, progress.num_tokens = 0, 0.0, 0
        progress.step_s, progress.cpu_s = [], 0.0
        self._state = None

    def _validate(self) -> Score:
        settings = self.settings
        return score(self.model, self.corpus.ids["valid"], batch_size=settings.eval_batch_size, window=settings.bptt)

    def _start_from(self, started: PRUForCausalLM) -> None:
        self.model.load_state_dict(started.state_dict())
        loss = self._validate().loss
        self.progress.best_loss = loss
        if self.processes.is_main:
            self._save_best(loss)
        self._note(f"starting from a model of validation perplexity {exp(loss):.2f}")

    def _decide(self, loss: float) -> None:
        """NT-ASGD: average from now on, or end where the run averaged from its start (Merity et al. 2018, algorithm 1)."""
        nonmono, before = self.settings.nonmono, self.progress.valid_losses
        if nonmono is None or len(before) <= nonmono or loss <= min(before[: len(before) - nonmono]):
            return
        if self.settings.starts_averaging:
            self.progress.is_done = True
            self._note(f"no better for {nonmono} epochs: done")
        elif not self.optimiser.is_averaging:
            self.optimiser.start_averaging()
            self._note(f"no better for {nonmono} epochs: averaging from here")

    def _save_best(self, loss: float) -> None:
        metadata = {"epoch": str(self.progress.epoch), "valid_perplexity": f"{exp(loss):.4f}"}
        save_best(self.model, self.corpus.encoding, self.out, metadata)

    def _resume(self) -> bool:
        """Take up the newest checkpoint; return whether there is one."""
        place = self._checkpoints.latest()
        if place is None:
            if self.processes.is_main:
                self._metrics.rewind(0, 0)
            return False
        progress, weights, own = self._checkpoints.load(place)
        try:
            self._restore(progress, weights, own)
        except (KeyError, RuntimeError) as error:
            raise PackError(f"checkpoint {place} is not of this model: {error}; remove it to start anew") from error
        if self.processes.is_main:
            self._metrics.rewind(progress.step, progress.epoch)
        self._note(f"going on from {place}: epoch {progress.epoch}, step {progress.step}")
        return True

    def _restore(self, progress: Progress, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
        self.progress = progress
        if progress.num_averaged is not None:
            self.optimiser.start_averaging()
            self.optimiser.num_averaged, self.optimiser.lr_before = progress.num_averaged, progress.lr_before
        names = [name for name, _ in self.model.named_parameters()]
        averages = self.optimiser.averages or []
        with torch.no_grad():
            for name, parameter in zip(names, self.optimiser.parameters, strict=True):
                parameter.copy_(weights[name])
            for name, average in zip(names, averages, strict=bool(averages)):
                average.copy_(weights["average." + name])
        self._lengths.set_state(own["rng.lengths"])
        torch.set_rng_state(own["rng.cpu"])
        if "rng.cuda" in own and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(own["rng.cuda"], self.processes.device)
        if "h.0" in own:
            device = self.processes.device
            self._state = tuple(
                (own[f"h.{layer}"].to(device), own[f"c.{layer}"].to(device)) for layer in range(len(self.model.layers))
            )

    def _weights(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        if self.optimiser.averages is not None:
            named |= {
                "average." + name: average for name, average in zip(list(named), self.optimiser.averages, strict=True)
            }
        return named

    def _own_state(self) -> dict[str, torch.Tensor]:
        own = {"rng.lengths": self._lengths.get_state(), "rng.cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            own["rng.cuda"] = torch.cuda.get_rng_state(self.processes.device)
        for layer, (h, c) in enumerate(self._state or ()):
            own |= {f"h.{layer}": h, f"c.{layer}": c}
        return own

    def _stop(self, what: str) -> None:
        progress = self.progress
        good = self._checkpoints.latest()
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
        raise TrainingError(
            f"step {progress.step + 1} (epoch {progress.epoch}): {what}; {kept}. Lower lr (now {self.settings.lr})"
            f" or clip (now {self.settings.clip})"
        )

    def _run_description(self, started: PRUForCausalLM | None) -> dict[str, Any]:
        config = self.model.config
        model = {name: getattr(config, name) for name in ["vocab_size", *_CONFIG_FIELDS]}
        if started is not None:
            check_same("the model to start from", {name: getattr(started.config, name) for name in model}, model)
        return {
            "recipe": {"name": self.recipe.name, "preset": self.recipe.preset},
            "model": model | {"num_parameters": sum(parameter.numel() for parameter in self.optimiser.parameters)},
            "training": asdict(self.settings) | {"start": None if started is None else fingerprint(started)},
            "corpus": {"folder": str(self.corpus.folder), "fingerprint": self.corpus.fingerprint},
        }


def model_config(corpus: Corpus, recipe: Recipe) -> PRUConfig:
    """Return the configuration of a recipe's model on a corpus.

    Raises:
        ConfigError: A field is unknown or out of range.
    """
    check_known("model setting", recipe.model, _CONFIG_FIELDS)
    return PRUConfig(
        vocab_size=corpus.encoding.vocab_size,
        eos_token_id=corpus.encoding.eos_id,
        dropout=recipe.training.dropout,
        **recipe.model,
    )
