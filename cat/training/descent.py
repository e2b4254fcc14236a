"""From a loss to an update, the same for every task: backward, clipping, the optimiser, and updates that are left out.

An update whose gradient is not finite is skipped: weights and moments stay as they are, and so does the optimiser's
count of steps. That is decided on the device, by the flag that PyTorch's fused optimisers have for gradient scaling
(``found_inf``), so that no update waits for it and a CUDA graph can hold it. The flag comes from the gradient's norm
alone, which is the same on all processes of a run; a loss that is not finite makes the gradient so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cat.parts import part
from cat.training.optim import clip_gradients, optimizer_tensors, restore_optimizer

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions that autocast has
SCALE, GROWTH = "scaler.scale", "scaler.growth"  # beside the moments in a checkpoint


class Descent:
    """An AdamW with ``fused=True`` over these parameters.

    Args:
        precision: with "fp16" losses are scaled for backward, and the scale is halved whenever a gradient overflows and
            doubled after 2,000 updates that did not (`torch.amp.GradScaler`).
    """

    def __init__(
        self, optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter], clip_norm: float, *, precision: str
    ) -> None:
        self.optimizer, self.parameters, self.clip_norm = optimizer, parameters, clip_norm
        self._device = next(iter(parameters.values())).device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._scaler.scale(torch.zeros((), device=self._device))  # makes its tensors, before a graph is recorded

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of what `step` returns."""
        return ("grad_norm", "scale") if self._scaler.is_enabled() else ("grad_norm",)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        with part("backward"):
            value = loss.detach()
            # 1, or NaN where the loss is not finite: some gradients would be finite even so.
            self._scaler.scale(loss).backward(value - value + 1)

    def step(self) -> list[Tensor]:
        """Clip the gradient, move the weights unless it is not finite, and forget it. Returns its norm before, and with
        "fp16" the scale that it had; 0-dim, still on the device."""
        numbers = []
        if self._scaler.is_enabled():
            numbers = [self._scale.clone()]
            self._scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.parameters.values(), self.clip_norm)
        skip = (grad_norm - grad_norm).ne(0)  # NaN, which is not 0; half as many launches as isfinite
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.update()
        return [grad_norm, *numbers]

    @property
    def _scale(self) -> Tensor:
        scale = self._scaler._scale
        assert scale is not None  # made in `__init__`
        return scale

    # ------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by name, and the scale's."""
        state = optimizer_tensors(self.optimizer, self.parameters)
        if self._scaler.is_enabled():
            saved = self._scaler.state_dict()
            state[SCALE] = torch.tensor(saved["scale"], dtype=torch.float32)
            state[GROWTH] = torch.tensor(saved["_growth_tracker"], dtype=torch.int32)
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, exactly.

        Raises: ValueError saying what does not fit.
        """
        moments = {name: value for name, value in tensors.items() if name not in (SCALE, GROWTH)}
        restore_optimizer(self.optimizer, self.parameters, moments)
        if self._scaler.is_enabled():
            if missing := {SCALE, GROWTH} - tensors.keys():
                raise ValueError(f"optimiser state lacks {', '.join(sorted(missing))} of run.precision=fp16")
            scale, growth = tensors[SCALE].item(), int(tensors[GROWTH].item())
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": growth})
