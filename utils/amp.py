"""Mixed precision as one code path: off, native bf16 and fp16, and NVIDIA Apex O1/O2."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .sharding import whole

_LOG = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
APEX_LEVELS = ("O1", "O2")


class Amp:
    """Autocast, loss scaling and the optimizer step, whatever the precision.

    Args:
        device: where the model runs.
        dtype: 'auto' is bf16 on a GPU that has it, else fp16, and float32 on the CPU, where autocast is
            slower on most machines; 'bf16', 'fp16' and 'float32' are taken at their word.
        enabled: False is float32 everywhere, whatever the other arguments say.
        opt_level: '' is native; 'O0' is off; 'O1' and 'O2' hand over to Apex.

    Attributes:
        dtype: what autocast computes in; float32 means that it is off.
        scaler: the loss scaler, enabled for native fp16 only.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: str = "auto",
        enabled: bool = True,
        opt_level: str = "",
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"AMP_DTYPE='{dtype}' must be one of {['auto', *DTYPES]}")
        if opt_level not in ("", "O0", *APEX_LEVELS):
            raise ValueError(
                f"AMP_OPT_LEVEL='{opt_level}' must be one of {['', 'O0', *APEX_LEVELS]}"
            )
        self.device = torch.device(device)
        self.opt_level = opt_level
        self.apex = _import_apex(opt_level) if enabled and opt_level in APEX_LEVELS else None
        # Apex patches the functions itself; a second autocast around them would fight it.
        off = not enabled or opt_level == "O0" or self.apex is not None
        self.dtype = torch.float32 if off else _resolve(dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    @property
    def enabled(self) -> bool:
        """Whether autocast is on."""
        return self.dtype is not torch.float32

    @property
    def skips_steps(self) -> bool:
        """Whether steps with overflown gradients are left out; elsewhere they make all weights nan."""
        return self.apex is not None or self.scaler.is_enabled()

    @property
    def name(self) -> str:
        """For logs and result files: 'float32', 'bfloat16', 'float16', 'apex O1'."""
        return f"apex {self.opt_level}" if self.apex else str(self.dtype).removeprefix("torch.")

    def set_float32_precision(self) -> None:
        """For this process: with autocast on a GPU, what stays float32 multiplies in TF32.

        TF32 keeps more digits than bf16, in which the factors come, and tensor cores have it. Without
        autocast float32 means all its digits, in products and in convolutions, which PyTorch rounds by
        itself.
        """
        rounds = self.enabled and self.device.type == "cuda"
        torch.set_float32_matmul_precision("high" if rounds else "highest")
        torch.backends.cudnn.allow_tf32 = rounds

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """Give Apex its model and optimizer, before DDP wraps the model; native AMP needs nothing.

        Without an optimizer (evaluation) the second of the pair is None.
        """
        if self.apex and optimizer is None:
            return self.apex.initialize(model, opt_level=self.opt_level), None
        if self.apex:
            return self.apex.initialize(model, optimizer, opt_level=self.opt_level)
        return model, optimizer

    def autocast(self) -> AbstractContextManager[None]:
        """Context for the forward pass and the loss."""
        # An fp32 autocast is refused by PyTorch even when disabled, so a half type stands in.
        dtype = self.dtype if self.enabled else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.enabled)

    def backward(
        self, loss: Tensor, optimizer: torch.optim.Optimizer | None = None, final: bool = True
    ) -> None:
        """Accumulate gradients of `loss`; Apex needs the optimizer and whether a step follows."""
        if self.apex:
            with self.apex.scale_loss(loss, optimizer, delay_unscale=not final) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], clip_grad: float = 0.0
    ) -> Tensor:
        """Unscale, clip to total norm `clip_grad` (0 is off), step; returns the norm before clipping.

        An fp16 step with overflown gradients is skipped and the loss scale halved; the returned norm is
        then not finite. Skipping costs fp16 one host synchronisation per step, unless the optimizer is
        fused; bf16 and float32 have none.
        """
        if self.apex:
            parameters = self.apex.master_params(optimizer)
        with_grad = [p for p in parameters if p.grad is not None]
        self.scaler.unscale_(optimizer)
        norm = whole(get_total_norm([p.grad for p in with_grad]))  # FSDP: over all processes
        if clip_grad > 0:
            clip_grads_with_norm_(with_grad, clip_grad, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def loss_scale(self) -> float:
        """Current factor on the loss (1 without a scaler); reads from the device."""
        return float(self.scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """State of the loss scaler; empty where there is none."""
        return self.apex.state_dict() if self.apex else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loss scaler; says so where the checkpoint comes from another precision."""
        if bool(state) != bool(self.state_dict()):
            _LOG.warning(
                "the checkpoint has %s loss scaler and this run (%s) has %s: it starts afresh",
                "a" if state else "no",
                self.name,
                "none" if state else "one",
            )
        elif self.apex:
            self.apex.load_state_dict(state)
        elif state:
            self.scaler.load_state_dict(state)


def _resolve(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    # Not one that GPUs before Ampere emulate, slowly.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _import_apex(opt_level: str) -> Any:
    try:
        from apex import amp
    except ImportError as error:
        raise ValueError(
            f"AMP_OPT_LEVEL='{opt_level}' needs NVIDIA Apex, built from github.com/NVIDIA/apex (the 'apex' "
            "on PyPI is another package). Use native mixed precision instead: AMP_OPT_LEVEL '' with "
            "AMP_ENABLE True and AMP_DTYPE 'auto', 'bf16' or 'fp16'; AMP_OPT_LEVEL 'O0' is float32"
        ) from error
    return amp
