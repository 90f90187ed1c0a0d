"""One SAE in training: its optimizer, its schedule, its dead latents, and what a checkpoint keeps of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from aksae_kernels.optim import SAEAdam

from .batches import Batch, broken_rows
from .config import FitConfig, SAEConfig, from_dict, to_dict
from .distributed import from_rank_0, gathered, global_mean, global_rows, sum_gradients, world_size
from .errors import UserError
from .losses import DeadLatents, SAELoss, sae_loss, spread
from .sae import SAE
from .selections import AdaptiveK


class Learner:
    """One SAE in training: its optimizer, its schedule, its dead latents."""

    def __init__(self, sae: SAE, config: FitConfig, device: torch.device):
        self.config, self.record = config, {}
        self.recent: list[tuple[Tensor, Tensor | None]] = []
        """Rows and targets of this process's last steps, where the selection is about to measure on them."""
        self.sae = sae.to(device)
        if config.weights is not None:
            sae.to_precision(getattr(torch, config.weights))
        cap = max(1024, sae.config.d_in, sae.config.d_sae // 16) if config.max_dead is None else config.max_dead
        self.dead = DeadLatents(sae.config.d_sae, config.dead_after, device, cap)
        rates = sae.config.selection.rates()
        own = [{"params": [sae.get_parameter(name)], "lr": config.lr * rate} for name, rate in rates.items()]
        apart = ("W_dec", *rates)
        others = [p for name, p in sae.named_parameters() if name not in apart and not name.startswith("probe")]
        self.optimizer = SAEAdam(
            [{"params": others}, {"params": [sae.W_dec], "unit_norm_rows": True}, *own],
            lr=config.lr,
            betas=config.betas,
            max_grad_norm=config.max_grad_norm,
        )
        decay_from = int(config.decay_start * config.steps)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(step, config.warmup_steps, decay_from, config.steps)
        )
        self.ema = None
        if config.ema is not None:
            self.ema = AveragedModel(sae, avg_fn=_running_mean(config.ema), use_buffers=True)
            # Small changes are lost to a mean in 16 bits.
            self.ema.module.to(torch.promote_types(sae.W_dec.dtype, torch.float32))

    @torch.no_grad()
    def start(self, batches: Sequence[Batch]) -> None:
        """Set what depends on the rows of the first step, all processes' together."""
        sae, x = self.sae.train(), gathered(torch.cat([batch.x for batch in batches]))
        targets = [batch.target for batch in batches if batch.target is not None]
        target = gathered(torch.cat(targets)) if targets else None
        if self.config.normalize == "mean-norm":
            scales = {"input_scale": _scale(x)}
            scales["output_scale"] = scales["input_scale"] if target is None else _scale(target)
            sae.config = dataclasses.replace(sae.config, **from_rank_0(scales))
        sae.start(x, target)
        for tensor in sae.state_dict().values():
            from_rank_0(tensor)

    def update(self, batches: Sequence[Batch], step: int, look: bool) -> SAELoss:
        """One optimiser step on the mean loss of the batches; the last one's loss. `look` asks for a finite one."""
        sae, config = self.sae.train(), self.config
        for batch in batches:
            self.last_k = self.k(batch, step)
            with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = sae_loss(
                    sae,
                    batch.x,
                    self.last_k,
                    self.dead,
                    target=batch.target,
                    sparsity_coef=config.sparsity_coef,
                    aux_coef=config.aux_coef,
                )
            if look and not loss.total.isfinite():
                raise UserError(self._diverged(batch, loss, step))
            (loss.total if len(batches) == 1 else loss.total / len(batches)).backward()
            sae.config.selection.after_step(sae, loss.codes, self.last_k)
        sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        self.lr = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.measure(batches, step)
        if self.ema is not None:
            self.ema.update_parameters(sae)
        return loss

    def measure(self, batches: Sequence[Batch], step: int) -> None:
        """Keep the batches of a step for the selection, if the steps that are left until it measures would have too few
        rows without them, and let it measure when its time has come."""
        selection = self.sae.config.selection
        measured_at, n_rows = selection.measures(self.config.steps)
        due = next((after for after in measured_at if after > step), None)
        if due is None:
            return
        # By this step's rows, since no others are known; no process asks how many those of another are.
        if (due - step - 1) * world_size() * sum(len(batch.x) for batch in batches) < n_rows:
            # A source may give the next batch in the same memory.
            self.recent += [(b.x.clone(), None if b.target is None else b.target.clone()) for b in batches]
        if step + 1 == due:
            selection.measure(self.sae, self.recent)
            self.recent.clear()

    def k(self, batch: Batch, step: int) -> int | Tensor | None:
        """The k of a step: each row's own, by the batch or the probe, or what `k_start` has fallen to; None for the
        selection's."""
        if batch.k is not None:
            return batch.k
        config, selection = self.config, self.sae.config.selection
        left = 0.0 if config.k_start is None else max(0.0, 1 - step / config.k_steps)
        if isinstance(selection, AdaptiveK):
            own = self._k_of_rows(batch)
            return own if left == 0 else (own + (config.k_start - own) * left).round().int()
        end = selection.mean_k()
        k = None if left == 0 else round(end + (config.k_start - end) * left)
        if selection.is_topk_at(step, config.steps):
            return torch.full(batch.x.shape[:1], end if k is None else k, dtype=torch.int32, device=batch.x.device)
        return k

    def _k_of_rows(self, batch: Batch) -> Tensor:
        """AdaptiveK's k of each row: of its context, where the probe reads that as a whole."""
        if self.sae.config.selection.probe == "token" or batch.probed is None or batch.place is None:
            return self.sae.k_for(batch.x)
        return self.sae.k_for(batch.probed)[batch.place]

    @torch.no_grad()
    def terms(self, loss: SAELoss, batch: Batch) -> dict[str, float]:
        """The loss terms and the state of a step, of all processes together, read from the device."""
        selection, k = self.sae.config.selection, self.last_k
        target, codes = self.sae.target(batch.x, batch.target), loss.codes
        n_rows = global_rows(target)
        variance = spread(target, n_rows) / target.shape[-1]

        terms = {
            "loss": loss.total,
            "mse": loss.recon,
            "fvu": loss.recon / variance,
            "penalty": loss.penalty,
            "sparsity": loss.sparsity,
            "aux": loss.aux,
            "l0": global_mean(codes.mask() & (codes.values != 0), n_rows),
            "k_mean": global_mean(k, n_rows) if isinstance(k, Tensor) else k or selection.mean_k(),
            "capped": global_mean(codes.counts == codes.indices.shape[-1], n_rows),
            "dead": self.dead.mask().float().mean(),
        }
        return {"lr": self.lr, **{name: None if value is None else float(value) for name, value in terms.items()}}

    def trained(self) -> SAE:
        """What a run that ended now would leave: the SAE, or the mean of its weights."""
        if self.ema is None:
            return self.sae
        # The mean copied the config before `start` set the scales.
        self.ema.module.config = self.sae.config
        return self.ema.module

    def finish(self) -> None:
        """Leave the trained SAE in eval mode, with the mean of its weights where that was asked for."""
        if self.ema is not None:
            self.sae.load_state_dict(self.ema.module.state_dict())
            self.ema = None
        self.sae.eval()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {
            "config": to_dict(self.sae.config),
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rows_since_fired": self.dead.rows_since_fired,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "record": self.record,
        }

    def recent_rows(self) -> list[list[Tensor | None]]:
        """What goes into a checkpoint of the rows that this process keeps, on the CPU."""
        return [[None if part is None else part.cpu() for part in batch] for batch in self.recent]

    def load_recent_rows(self, rows: list[list[Tensor | None]]) -> None:
        device = self.sae.W_dec.device
        self.recent = [(x.to(device), None if target is None else target.to(device)) for x, target in rows]

    def load_state_dict(self, state: dict[str, Any], name: str) -> None:
        """Go on from what `state_dict` gave. UserError, starting with `name`, for the state of another SAE."""
        kept: SAEConfig = from_dict(SAEConfig, state["config"], name)
        own = self.sae.config
        scaled = dataclasses.replace(own, input_scale=kept.input_scale, output_scale=kept.output_scale)
        if scaled != kept:
            fields = (entry.name for entry in dataclasses.fields(SAEConfig))
            field = next(field for field in fields if getattr(scaled, field) != getattr(kept, field))
            raise UserError(f"sae: got {field} = {getattr(own, field)}, needs {getattr(kept, field)}, as in {name}")
        self.sae.config = kept
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.dead.rows_since_fired.copy_(state["rows_since_fired"])
        self.record = state["record"]
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])

    @torch.no_grad()
    def _diverged(self, batch: Batch, loss: SAELoss, step: int) -> str:
        y = self.sae.decode_scaled(loss.codes, batch.x)
        broken = broken_rows(y)
        where = f" in {batch.named(broken)}" if len(broken) else ""
        return (
            f"loss: got {float(loss.total)} at step {step}{where}, needs a finite number; the activations are finite, "
            "a lower lr may help"
        )


def lr_factor(step: int, warmup_steps: int, decay_from: int | None = None, steps: int = 0) -> float:
    """Share of the learning rate at a step: from 0 linearly to 1, and from `decay_from` linearly to 0 at `steps`."""
    factor = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if decay_from is not None and step > decay_from:
        factor = min(factor, (steps - step) / (steps - decay_from))
    return factor


def _running_mean(decay: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """How `AveragedModel` takes in weights, which may be of fewer bits than their mean."""
    return lambda mean, weight, _: mean.lerp(weight.to(mean.dtype), 1 - decay)


def _scale(rows: Tensor) -> float:
    """What gives rows `[B, D]` a mean norm of sqrt(D); 1 for rows of zeros. Waits for an accelerator."""
    length = float(torch.linalg.vector_norm(rows.double(), dim=-1).mean())
    return rows.shape[-1] ** 0.5 / length if length > 0 else 1.0
