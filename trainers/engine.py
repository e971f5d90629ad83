"""Three networks, one Accelerator: the only file that knows accelerate and DeepSpeed.

`Cluster` is this process among its peers. `Engine` is one trainable network, its optimizer and whatever shards them: nothing,
DDP, or ZeRO-1, -2, -3. Several engines live under the one Accelerator of a Cluster, each with its own accumulation, clipping,
learning rate and loss scale, and one may be called while another is being updated.

Facts that shape this file (each was paid for):
* accelerate keeps a single accumulation counter and a single "current" DeepSpeed engine, so nothing here uses
  `accumulate`, `Accelerator.backward`, `clip_grad_norm_` or `get_state_dict`.
* A gradient may cross a frozen DeepSpeed engine only through its bare module, with its parameters not requiring gradient.
* torch's autocast caches weight casts, and a cast cached under no_grad cuts later gradients: the cache is off.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from models.edm2_unet import EPS
from trainers.launch import PRECISIONS, LaunchError, Plan, need_build_tools
from trainers.optim import OptimConfig, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


# --- this process among its peers ----------------------------------------------------------------------------------------


class Cluster:
    """The one Accelerator of a run, and the few collectives that the rest of the house needs.

    networks: a name for each engine that will be made. out: where trackers write, None for no tracker. tracker: one of accelerate's, or
    "none". Raises LaunchError.
    """

    def __init__(self, networks: tuple[str, ...], plan: Plan, out: str | None = None, tracker: str = "tensorboard"):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() and not plan.cpu
        self.stage = plan.zero_stage
        if self.stage and self.world == 1 and not cuda:
            self.stage = None  # one process on a CPU has nothing to shard
        self.precision, self.compiler = plan.precision, plan.compiler
        self.tracking = out is not None and tracker != "none"
        self.accelerator = self._build(plan, networks, cuda, tracker if self.tracking else None, out)
        self.rank, self.device = self.accelerator.process_index, self.accelerator.device
        if self.accelerator.num_processes != self.world:
            raise LaunchError(f"{plan.source}: the launcher started {self.world} processes but {self.accelerator.num_processes} found each other")
        if self.tracking:
            self.accelerator.init_trackers("tracker")
        self._say_what_there_is(plan)

    def _build(self, plan: Plan, networks, cuda: bool, tracker: str | None, out: str | None) -> Accelerator:
        there = [str(kind.value) for kind in get_available_trackers()]
        if tracker not in (None, *there):
            raise LaunchError(f"loop.tracker is {tracker}, and installed here are {', '.join(there)}: take one of them, or none")
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        options = dict(kwargs_handlers=handlers, log_with=tracker, project_dir=out)
        self._clean_environment(cuda)
        torch.backends.cudnn.allow_tf32 = self.precision != "no"  # float32 means float32
        if not self.stage:
            return Accelerator(cpu=not cuda, mixed_precision="no", **options)  # the Engine does its own casting
        if not cuda:
            need_build_tools()
            handlers.append(InitProcessGroupKwargs(backend="gloo"))  # or the Accelerator takes every rank for the only one
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
            os.environ.setdefault(key, str(value))  # one process, not started by a launcher, still makes a group
        plugins = {name: DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(plan)) for name in networks}
        accelerator = Accelerator(deepspeed_plugins=plugins, mixed_precision=self.precision, **options)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # it warns of several engines, whose backward we never ask it for
        return accelerator

    def _clean_environment(self, cuda: bool) -> None:
        """Take out of the environment what `accelerate launch` put there and what would contradict our own choices."""
        for key in list(os.environ):
            if key.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_")) or key in (
                    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU",
                    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"):
                del os.environ[key]
        if not cuda and not self.stage:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else a launch for several GPUs looks for NCCL
        warnings.filterwarnings("ignore", message=".*No CUDA runtime is found.*")

    def _deepspeed_config(self, plan: Plan) -> dict:
        config = json.loads(json.dumps(plan.deepspeed))
        config.update(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False, train_micro_batch_size_per_gpu=1,
                      gradient_accumulation_steps=1, gradient_clipping=0.0)
        config.setdefault("zero_optimization", {})["stage"] = self.stage
        if self.precision != "no":
            config[self.precision] = {"enabled": True}
        return config

    def _say_what_there_is(self, plan: Plan) -> None:
        if plan.processes not in (None, self.world) and self.is_main:
            where = "GPU" if self.device.type == "cuda" else "CPU"
            how = f"ZeRO-{self.stage}" if self.stage else "DDP" if self.world > 1 else "no sharding"
            warnings.warn(f"{plan.source} asks for {plan.processes} processes and the launcher started {self.world}: training on {self.world} "
                          f"{where} process{'es' if self.world > 1 else ''} with {how}, precision {self.precision}.", stacklevel=2)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """What networks compute in."""
        return PRECISIONS[self.precision]

    def autocast(self):
        """The precision of a pass. DeepSpeed keeps low-precision weights by itself; elsewhere weights are cast as they are used."""
        low = self.precision != "no" and not self.stage
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False) if low else nullcontext()

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module, compiled in place at its first call if the launch asks for it. Shapes are fixed, so none is made symbolic."""
        if self.compiler:
            module.compile(backend=self.compiler, dynamic=False)
        return module

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""
        if self.world > 1:
            dist.all_reduce(tensor := tensor.clone().to(self.device))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag. Synchronises."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of every rank -> all of them in rank order, on all ranks. n is the same everywhere."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def log(self, values: dict[str, float], step: int) -> None:
        if self.tracking:
            self.accelerator.log(values, step=step)

    def close(self) -> None:
        """End trackers and the process group, so that no rank leaves while another still talks to it."""
        if self.tracking:
            self.accelerator.end_training()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# --- one trainable network -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one parameter: elements offset .. offset + len(tensor) of the flattened weight, float32."""

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: Tensor


class Engine:
    """A trainable network under a Cluster.

    name: one of the cluster's networks. micro_batch: samples a microbatch on this rank. unit_norm: names of weights that forced
    weight normalisation projects to unit row magnitude before each update (Karras et al. 2024, equation 47 and algorithm 1).
    """

    def __init__(self, cluster: Cluster, name: str, module: nn.Module, config: OptimConfig, micro_batch: int, unit_norm: list[str] = ()):
        self.cluster, self.name, self.config, self.unit_norm = cluster, name, config, set(unit_norm)
        self.module = cluster.compiled(module.to(cluster.device))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.module, config)
        self.wrapped = self._wrap_deepspeed(micro_batch) if cluster.stage else cluster.accelerator.prepare_model(self.module)
        fp16 = cluster.precision == "fp16" and not cluster.stage
        self.scaler = torch.amp.GradScaler(cluster.device.type, enabled=fp16)
        self.is_frozen = False
        self.refusals = torch.zeros(3, device=cluster.device)  # updates refused: in a row until now, the longest row, in all
        self.shards = self._own_shards()

    def _wrap_deepspeed(self, micro_batch: int):
        state = self.cluster.accelerator.state
        state.select_deepspeed_plugin(self.name)
        ours = dict(train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=self.config.accumulation,
                    gradient_clipping=self.config.clip)
        state.deepspeed_plugin.deepspeed_config.update(ours)
        wrapped, _ = self.cluster.accelerator.prepare(self.module, self.optimizer)
        # bfloat16 ZeRO-1/2 applies non-finite gradients: refuse them in the optimizer itself, where all the sharding has been done.
        self.optimizer.register_step_pre_hook(self._refuse_nonfinite)
        return wrapped

    def _refuse_nonfinite(self, optimizer, args, kwargs) -> None:
        norm = torch.as_tensor(self.wrapped.optimizer._global_grad_norm, device=self.cluster.device)
        optimizer.found_inf = (~norm.isfinite()).float()

    # -- calling it

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict | None = None, **options):
        """A pass through whatever wraps the network, in the run's precision. Without gradient, or frozen, through the bare network."""
        bare = self.is_frozen or not torch.is_grad_enabled()
        with self.cluster.autocast():
            return (self.module if bare else self.wrapped)(x_t, t, cond, **options)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Gradient flows through to the network's inputs; none reaches its parameters. Forward and backward belong inside."""
        for p in self.parameters:
            p.requires_grad_(False)
        self.is_frozen = True
        try:
            yield
        finally:
            self.is_frozen = False
            for p in self.parameters:
                p.requires_grad_(True)

    # -- updating it

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def update(self, loss_fn: Callable[[object], dict[str, Tensor]], microbatches: list) -> dict[str, Tensor]:
        """One optimizer step: accumulate over the microbatches, clip, step, zero. No host synchronisation of ours.

        loss_fn(microbatch) -> 0-d tensors, of which "loss", a mean over the microbatch, is minimised. Returns their means, with
        "grad_norm" (before clipping). Where a loss or gradient is not finite the step is refused: weights and moments stay as they
        were, and `refusals` counts it.
        """
        if len(microbatches) != self.config.accumulation:
            raise ValueError(f"{self.name} accumulates {self.config.accumulation} microbatches and got {len(microbatches)}")
        self._project()
        sums: dict[str, Tensor] = {}
        for i, microbatch in enumerate(microbatches):
            last = i == len(microbatches) - 1
            with self._no_sync(not last):
                metrics = loss_fn(microbatch)
                self._backward(metrics["loss"], last)
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0) + value.detach() / len(microbatches)
        norm, refused = self._step()
        row = (self.refusals[0] + 1) * refused
        self.refusals = torch.stack([row, torch.maximum(self.refusals[1], row), self.refusals[2] + refused])
        return {**sums, "grad_norm": norm}

    def _no_sync(self, skip: bool):
        return self.wrapped.no_sync() if skip and isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else nullcontext()

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss = loss * (1 + 0 * loss.detach())  # exactly the loss; but one that is not finite makes every gradient so, on every rank
        if self.cluster.stage:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss)  # divides by the accumulation
        else:
            self.scaler.scale(loss / self.config.accumulation).backward()

    def _step(self) -> tuple[Tensor, Tensor]:
        """-> (gradient norm, 1.0 if the step was refused), 0-d."""
        if self.cluster.stage:
            self.wrapped.step()
            norm = torch.as_tensor(self.wrapped.optimizer._global_grad_norm, dtype=torch.float32, device=self.cluster.device)
            return norm, (~norm.isfinite()).float()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        refused = (~norm.isfinite()).float()
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = refused  # fused kernels leave weights and moments alone where this is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, refused

    # -- forced weight normalisation

    @torch.no_grad()
    def _project(self) -> None:
        """w <- w / (EPS + RMS of its row), for masters and working weights alike, however they are sharded."""
        if not self.unit_norm:
            return
        if not self.cluster.stage:
            for name, p in self.module.named_parameters():
                if name in self.unit_norm:
                    rows = p.view(len(p), -1)
                    rows.div_(EPS + torch.linalg.vector_norm(rows, dim=1, keepdim=True) * rows.shape[1] ** -0.5)
            return
        norms = self._row_norms()
        for shard in self.shards:
            if shard.name in norms:
                _divide_rows(shard.tensor, shard.offset, norms[shard.name], shard.shape)
        for name, p in self.module.named_parameters():
            if name in norms:
                self._divide_working_weights(p, norms[name])

    def _row_norms(self) -> dict[str, Tensor]:
        """EPS + RMS of every row of the unit-norm weights, from all ranks' master shards: one small all-reduce."""
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.module.named_parameters() if n in self.unit_norm}
        squares = torch.zeros(sum(shape[0] for shape in shapes.values()), device=self.cluster.device)
        views = dict(zip(shapes, squares.split([shape[0] for shape in shapes.values()])))
        for shard in self.shards:
            if shard.name in views:
                for first, piece in _row_pieces(shard.tensor, shard.offset, shard.shape):
                    views[shard.name][first:first + len(piece)] += piece.square().sum(1).to(squares.device)
        views = dict(zip(shapes, self.cluster.sum(squares).split([shape[0] for shape in shapes.values()])))
        return {name: EPS + (views[name] * (shape[0] / torch.Size(shape).numel())).sqrt() for name, shape in shapes.items()}

    def _divide_working_weights(self, p: nn.Parameter, norms: Tensor) -> None:
        if self.cluster.stage < 3:
            return _divide_rows(p.data.view(-1), 0, norms, p.shape)
        offset = self.cluster.rank * p.partition_numel()
        own = p.ds_tensor.data[:max(0, min(p.partition_numel(), p.ds_numel - offset))]
        _divide_rows(own, offset, norms, p.ds_shape)
        if p.data.numel() == p.ds_numel:  # small weights stay gathered between steps
            _divide_rows(p.data.view(-1), 0, norms, p.ds_shape)

    # -- what it is made of

    def master_shards(self) -> list[Shard]:
        """This rank's float32 master weights. Together, the ranks hold every trainable parameter exactly once. Views: they stay current."""
        return self.shards

    def _own_shards(self) -> list[Shard]:
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        if self.cluster.stage == 3:
            return [shard for n, p in named for shard in self._zero3_shard(n, p)]
        if self.cluster.stage:
            owned = [(n, p, p._hp_mapping) for n, p in named if p._hp_mapping is not None]
            return [Shard(n, tuple(p.shape), m.lp_fragment_address.start, m.get_hp_fragment().data) for n, p, m in owned]
        shards = []
        for n, p in named:
            each = -(-p.numel() // self.cluster.world)
            own = p.data.view(-1)[self.cluster.rank * each:(self.cluster.rank + 1) * each]
            if len(own):
                shards.append(Shard(n, tuple(p.shape), self.cluster.rank * each, own))
        return shards

    def _zero3_shard(self, name: str, p: nn.Parameter) -> list[Shard]:
        offset = self.cluster.rank * p.partition_numel()
        length = max(0, min(p.partition_numel(), p.ds_numel - offset))
        master, _ = self.wrapped.optimizer._get_fp32_opt_state_partition(p, release_swap_buffers=False)
        return [Shard(name, tuple(p.ds_shape), offset, master.data[:length])] if length else []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the trainable parameters."""
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.module.named_parameters() if p.requires_grad}

    def gather(self, shards: list[Shard]) -> dict[str, Tensor]:
        """Full float32 tensors on the host, on every rank, from shards laid out like `master_shards`. One parameter at a time."""
        own, full = {shard.name: shard for shard in shards}, {}
        for name, shape in self.shapes().items():
            flat = torch.zeros(torch.Size(shape).numel(), device=self.cluster.device)
            if name in own:
                flat[own[name].offset:own[name].offset + len(own[name].tensor)] = own[name].tensor
            full[name] = self.cluster.sum(flat).view(shape).cpu()
        return full

    def buffers(self) -> dict[str, Tensor]:
        return {n: b.detach().cpu() for n, b in self.module.named_buffers()}

    # -- saving and loading it: this rank's shards, in a form that does not depend on how they were sharded

    def _moment_shards(self) -> Iterator[tuple[str, Shard]]:
        """("exp_avg" | "exp_avg_sq", this rank's slice of it), for each master shard. Nothing before the first step."""
        flats = self._flats()
        for shard in self.shards:
            flat = flats[shard.tensor.untyped_storage().data_ptr()]
            start = shard.tensor.storage_offset() - flat.storage_offset()
            for key in MOMENTS:
                if key in self.optimizer.state[flat]:
                    moment = self.optimizer.state[flat][key].view(-1)[start:start + len(shard.tensor)]
                    yield key, Shard(shard.name, shard.shape, shard.offset, moment)

    def _flats(self) -> dict[int, Tensor]:
        """The tensors that the optimizer steps, by their storage: flat partitions under ZeRO, else the parameters."""
        if self.cluster.stage == 3:
            flats = self.wrapped.optimizer.fp32_partitioned_groups_flat
        elif self.cluster.stage:
            flats = self.wrapped.optimizer.single_partition_of_fp32_groups
        else:
            flats = self.parameters
        return {flat.untyped_storage().data_ptr(): flat for flat in flats}

    def state(self) -> tuple[dict[str, list[Shard]], dict]:
        """(shards of "master", "exp_avg" and "exp_avg_sq"; host scalars: optimizer steps and loss scale)."""
        shards: dict[str, list[Shard]] = {"master": self.shards, **{key: [] for key in MOMENTS}}
        for key, shard in self._moment_shards():
            shards[key].append(shard)
        steps = [s["step"] for s in self.optimizer.state.values() if "step" in s]
        return shards, {"steps": float(steps[0]) if steps else 0.0, "loss_scale": self._loss_scale()}

    def restart(self, tensors: dict[str, Tensor]) -> None:
        """Begin anew from these full weights and buffers, by their names in the network, with an optimizer that has seen nothing."""
        self.load(lambda kind, name, start, length: tensors[name].flatten()[start:start + length], {"steps": 0.0, "loss_scale": self._loss_scale()})
        for name, buffer in self.module.named_buffers():
            buffer.copy_(tensors[name])

    @torch.no_grad()
    def load(self, read: Callable[[str, str, int, int], Tensor], scalars: dict) -> None:
        """The inverse of `state`. read(kind, name, start, length) returns that slice of a flattened full tensor."""
        for flat in self._flats().values():
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            steps = torch.full((), scalars["steps"], dtype=torch.float32, device=flat.device)
            self.optimizer.state[flat] = {"step": steps, **moments} if scalars["steps"] else {}
        if self.cluster.stage:
            for shard in self.shards:
                shard.tensor.copy_(read("master", shard.name, shard.offset, len(shard.tensor)))
            for key, shard in self._moment_shards():
                shard.tensor.copy_(read(key, shard.name, shard.offset, len(shard.tensor)))
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                self._load_working_weights(name, p, read)
        self._load_loss_scale(scalars["loss_scale"])

    def _load_working_weights(self, name: str, p: nn.Parameter, read: Callable) -> None:
        count = getattr(p, "ds_numel", p.numel())
        if self.cluster.stage == 3:
            offset = self.cluster.rank * p.partition_numel()
            length = max(0, min(p.partition_numel(), count - offset))
            p.ds_tensor.data[:length].copy_(read("master", name, offset, length))
            if p.data.numel() != count:
                return
        p.data.copy_(read("master", name, 0, count).view(p.shape))
        if not self.cluster.stage and self.optimizer.state[p]:
            for key in MOMENTS:
                self.optimizer.state[p][key].copy_(read(key, name, 0, count).view(p.shape))

    def _loss_scale(self) -> dict:
        if not self.cluster.stage:
            return self.scaler.state_dict()
        scaler = self.wrapped.optimizer.loss_scaler
        return {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, bool))}

    def _load_loss_scale(self, state: dict) -> None:
        if self.cluster.stage:
            vars(self.wrapped.optimizer.loss_scaler).update(state)
        elif self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def _row_pieces(flat: Tensor, offset: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """A slice of a flattened weight -> (first row, 2-D view) pieces: a part of a row, whole rows, a part of a row."""
    columns = torch.Size(shape).numel() // shape[0]
    start = 0
    while start < len(flat):
        row, column = divmod(offset + start, columns)
        whole = (len(flat) - start) // columns if column == 0 else 0
        length = whole * columns if whole else min(columns - column, len(flat) - start)
        yield row, flat[start:start + length].view(max(whole, 1), -1)
        start += length


def _divide_rows(flat: Tensor, offset: int, norms: Tensor, shape: tuple[int, ...]) -> None:
    norms = norms.to(flat.device)  # masters may live in host memory
    for first, piece in _row_pieces(flat, offset, shape):
        piece.copy_(piece.float() / norms[first:first + len(piece), None])
