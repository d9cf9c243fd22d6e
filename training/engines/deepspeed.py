"""DeepSpeed, in one process or in many.

DeepSpeed (Rajbhandari et al. 2020, ZeRO) moves gradients, updates weights and keeps them and the moments in parts. What
is computed stays ours: the objective, the draws, autocast, the loss over the weight of all batches of a step, and the
checkpoint, which is the plain engine's, so that nothing of DeepSpeed's own files is ever read or written. Its setting
comes out of ours and nowhere else, and no code of its is compiled on the user's machine: ``torch.optim.AdamW`` (fused,
on CPUs too) updates the weights where they are offloaded, and messages between CPUs go over gloo.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import BackboneState
from ...errors import ConfigError, InputError, needs
from ...models import Trainable
from ..batches import Batch, even_share
from ..carried import Carried
from ..checkpoint import model_tensors
from ..config import TrainingConfig
from ..objectives import Objective
from ..optimizer import MOMENTS, load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate
from ..passes import autocast, chosen_precision
from ..sequence_parallel import share_objective
from ..step import backward, loss_sum
from ..taught import AnyObjective
from .engine import EngineConfig

T = TypeVar("T")

BUCKET = 50_000_000  # numbers sent together, at most; DeepSpeed reserves room for them


def deepspeed_settings(
    config: TrainingConfig, settings: EngineConfig, *, world_size: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; what it would fill in otherwise than the run says (clipping at 1) is written out."""
    room = min(BUCKET, parameters + parameters % 2)  # DeepSpeed takes even sizes alone
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": room,
        "allgather_bucket_size": room,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": config.accumulation * settings.sequence_processes,  # a shared batch counts for each
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation * settings.sequence_processes // world_size,
        "gradient_clipping": float(config.clip),
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # weights are float32; autocast is ours
        "steps_per_print": None,
    }


class _Reading(nn.Module):
    """Whatever is read of a model as a module, since DeepSpeed gathers weights where modules are called."""

    def __init__(self, model: Trainable, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, read: Callable[[Trainable], T]) -> tuple[T]:
        """As ``Passes.forward``, in a tuple, since DeepSpeed warns of other types that it does not know."""
        with autocast(self.precision, self.model.device):
            return (read(self.model),)


class DeepSpeedEngine:
    """Trains a copy of ``model`` that takes its weights over until ``close``; see ``Engine``."""

    def __init__(
        self,
        model: Trainable,
        config: TrainingConfig,
        settings: EngineConfig,
        *,
        example: AnyObjective,
        carried: Carried,
    ) -> None:
        """Share the model out; ``example`` shows which of its parameters take part at all.

        Raises:
            ConfigError: nothing is trained.
        """
        deepspeed = import_deepspeed(model.device)
        precision = chosen_precision(config.precision, model.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.model, self.precision = model, precision
        self.carried = carried.share(self.rank, self.world_size)
        self._config, self._settings, self._example = config, settings, example
        self._deepspeed = deepspeed
        # Sums of a few numbers do not wait for a GPU.
        self._counts = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._sharing = _sequence_group(settings.sequence_processes)
        self._shapes = {name: tensor.shape for name, tensor in model_tensors(model).items()}
        trained = _take_over(model)
        wrapped = _Reading(trained, precision)
        with torch.enable_grad():
            reached = _reached(wrapped(partial(loss_sum, objective=example))[0])
        self.empty = None if config.long == "cut" else _empty_state(wrapped, example)
        for parameter in trained.parameters():  # torch's AdamW leaves alone what has no gradient; ZeRO would decay it
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)
        self._parameters = dict(trained.named_parameters())
        self._optimizer = make_optimizer(trained, config)
        self._engine = deepspeed.initialize(
            model=wrapped,
            optimizer=self._optimizer,
            config=deepspeed_settings(
                config, settings, world_size=self.world_size, parameters=sum(p.numel() for p in trained.parameters())
            ),
        )[0]
        self._trained = trained
        self.module: nn.Module = wrapped
        if settings.zero_stage in (1, 2):
            _begin_moments(self._optimizer)
        for parameter in model.parameters():  # only now, for what was refused above leaves the model as it was
            parameter.data = parameter.data.new_empty(0)

    def share(self, batches: Sequence[Batch | None]) -> list[tuple[int, Batch, bool]]:
        """As many batches as every other process has; processes that share one have it each."""
        together = self._settings.sequence_processes
        return even_share(batches, rank=self.rank // together, world_size=self.world_size // together)

    def own(self, objective: AnyObjective) -> AnyObjective:
        """As ``Engine.own``."""
        return objective if self._sharing is None else share_objective(objective, self._sharing)

    def forward(self, read: Callable[[Trainable], T]) -> T:
        """As ``Passes.forward``."""
        found: tuple[T] = self._engine(read)
        return found[0]

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """As ``Passes.backward``."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def most(self, passes: int) -> int:
        """As ``Passes.most``, and at least one, which DeepSpeed needs to take a step."""
        most = torch.tensor(max(passes, 1))
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._counts)
        return int(most)

    def gradient_step(
        self, objectives: Sequence[tuple[int, AnyObjective, bool]], *, step: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """As ``Engine.gradient_step``."""
        shares = [(n, self.own(objective), counted) for n, objective, counted in objectives]
        total = max(self.sum([sum(objective.weight for _, objective, counted in shares if counted)])[0], 1.0)
        # DeepSpeed takes the mean over the processes, and the loss is a sum over them.
        scale, place = self.world_size / total, self.rank % self._settings.sequence_processes
        loss = backward(self, shares, self._config, self.carried, step=step, scale=scale, place=place)
        norm = None
        if self._settings.zero_stage == 0:  # the gradients are whole here, and DeepSpeed does not tell their norm
            norm = torch.nn.utils.clip_grad_norm_(self._trained.parameters(), float("inf"))
        self._engine.step()
        dist.all_reduce(loss)
        loss = loss / self.world_size
        return loss, torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm)

    def set_learning_rate(self, learning_rate: float) -> None:
        """As ``Engine.set_learning_rate``."""
        set_learning_rate(self._optimizer, learning_rate)

    def sum(self, values: Sequence[float]) -> list[float]:
        """As ``Engine.sum``."""
        added = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(added, group=self._counts)
        return [float(value) for value in added]

    def tensors(self) -> dict[str, Tensor]:
        """As ``Engine.tensors``; one parameter at a time is whole elsewhere than on rank 0."""
        kept: dict[str, Tensor] = {}
        for name in self._shapes:
            whole = self._whole(name)
            if self.rank == 0:
                kept[name] = whole.cpu()
        return kept

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As ``Engine.optimizer_tensors``."""
        if self._settings.zero_stage == 0:
            return optimizer_tensors(self._trained, self._optimizer) if self.rank == 0 else {}
        kept: dict[str, Tensor] = {}
        states = list(self._optimizer.state.values())  # each of many parameters
        steps = states[0]["step"].detach() if states else torch.zeros(())
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad and steps > 0}
        for name, parameter in trained.items():
            for moment in MOMENTS:
                if moment == "step":
                    whole = steps
                else:
                    whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)
                if self.rank == 0:
                    kept[f"{name}/{moment}"] = whole.to("cpu", copy=True)
        return kept

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """As ``Engine.load_optimizer``.

        Raises:
            ConfigError: parameters have taken different numbers of steps, of which ZeRO keeps one.
        """
        if not tensors:
            return
        if self._settings.zero_stage == 0:
            load_optimizer_tensors(self._trained, self._optimizer, dict(tensors))
            return
        wanted = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        keys = {f"{name}/{moment}" for name in wanted for moment in MOMENTS}
        if set(tensors) != keys:
            raise InputError(f"The optimiser state is of another model: {min(set(tensors) ^ keys)} does not fit.")
        steps = [float(tensors[f"{name}/step"]) for name in wanted]
        if min(steps) != max(steps):
            raise ConfigError(
                f"The parameters have taken different numbers of steps ({min(steps):.0f} to {max(steps):.0f}), and "
                "ZeRO keeps one for all. Resume with the plain engine or zero_stage 0."
            )
        self._make_moments()
        for name in wanted:
            for moment in ("exp_avg", "exp_avg_sq"):
                self._set_moment(name, moment, tensors[f"{name}/{moment}"])
        for state in self._optimizer.state.values():
            state["step"].fill_(steps[0])

    def states(self) -> dict[int, BackboneState]:
        """As ``Engine.states``."""
        if self._config.long != "carry":
            return {}
        own = {number: state.map(Tensor.cpu) for number, state in self.carried.states.items()}
        found: list[dict[int, BackboneState]] = [{} for _ in range(self.world_size)]
        dist.gather_object(own, found if self.rank == 0 else None, group=self._counts)
        return {number: state for states in found for number, state in states.items()}

    def close(self) -> None:
        """As ``Engine.close``, in every process."""
        for name, parameter in self.model.named_parameters():
            parameter.data = self._whole(name)
        wrong = [n for n, tensor in model_tensors(self.model).items() if tensor.shape != self._shapes.get(n)]
        assert not wrong, f"{wrong} came back in another shape"
        self._engine.destroy()

    def _whole(self, name: str) -> Tensor:
        """A parameter or buffer of the copy, gathered."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return self._trained.get_buffer(name).detach().clone()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _make_moments(self) -> None:
        """Take a step that changes nothing, since DeepSpeed makes the moments in the first one."""
        self.set_learning_rate(0.0)
        self.backward(self.forward(partial(loss_sum, objective=self._example)) * 0.0)
        self._engine.step()

    def _set_moment(self, name: str, moment: str, value: Tensor) -> None:
        if value.shape != self._shapes[name]:
            raise InputError(f"The optimiser state is of another model (shape of {name}).")
        parameter, utils = self._parameters[name], self._deepspeed.utils
        if self._settings.zero_stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
            return
        each = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # the last part is padded, which setting the whole does not allow for
        padded = torch.zeros(each * self.world_size)
        padded[: value.numel()] = value.flatten()
        part = padded[each * self.rank : each * (self.rank + 1)].to(parameter.device)
        utils.safe_set_local_optimizer_state(parameter, part, moment)


def _sequence_group(processes: int) -> dist.ProcessGroup | None:
    """The neighbours that share each batch with this process, None where it has its batches alone."""
    if processes == 1:
        return None
    own = None
    for first in range(0, dist.get_world_size(), processes):
        group = dist.new_group(range(first, first + processes))  # every process takes part in making each
        own = group if first <= dist.get_rank() < first + processes else own
    return own


def _begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the moments with which it would begin.

    It would make them group by group, and DeepSpeed looks for those of all groups after it has updated the first one.
    """
    for group in optimizer.param_groups:
        for part in group["params"]:
            moments = {moment: torch.zeros_like(part) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[part] = {"step": torch.zeros((), device=part.device), **moments}


def _take_over(model: Trainable) -> Trainable:
    """A copy of the model's modules around the same storage, which DeepSpeed may take apart."""
    parts = [part for part in model.modules() if isinstance(part, Trainable)]  # a tokenizer, a card: theirs stay theirs
    memo: dict[int, Any] = {id(v): v for part in parts for name, v in vars(part).items() if name[0] != "_"}
    memo |= {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _empty_state(wrapped: _Reading, example: AnyObjective) -> BackboneState:
    """A state of no sequence, of a model that reads plain ones."""
    assert isinstance(example, Objective)
    batch = example.batch.to(wrapped.model.device)
    state: BackboneState = wrapped(lambda model: model.networks[0](batch, return_state=True)[1])[0]
    return state.select(torch.arange(0))


def _reached(loss: Tensor) -> set[int]:
    """The identities of the parameters that a gradient of ``loss`` reaches."""
    found, seen, open_nodes = set(), set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_nodes.extend(following for following, _ in node.next_functions)
    return found


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for ``device``, quietly, and so that it compiles nothing.

    Raises:
        MissingExtra: it is not installed.
        ConfigError: it was imported for another kind of device before.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    with needs("scale"):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Built at the first use otherwise, with a compiler, for a minute; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    used = deepspeed.get_accelerator().device_name()
    if used != device.type:
        raise ConfigError(f"DeepSpeed runs on {used} here, and the model is on {device.type}; set DS_ACCELERATOR.")
    return deepspeed  # type: ignore[no-any-return]
