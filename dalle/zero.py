"""DeepSpeed's ZeRO: gradients, moments and weights are partitioned over processes.

Stage 1 partitions the moments and the fp32 weights that they update, stage 2 the gradients too, stage 3 the
weights as well: then a layer's parameters are whole only while it runs, and the model is built partitioned.
DeepSpeed runs in its fp32 mode, which leaves precision to us; norm, clipping and dropped updates are
decided in `Engine.update`, the same for all engines.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.distributed import Part, Topology
from dalle.engine import Engine, R, Saved
from dalle.errors import ConfigError
from dalle.muon import Muon
from dalle.optim import AdamW, Average, full_shape
from dalle.piece import Piece
from dalle.powersgd import PowerSGD
from dalle.precision import Arithmetic, products
from dalle.scaling import Scaling

BUCKET = 50_000_000  # numbers that are reduced or gathered at a time
LIVE = 4 * BUCKET  # numbers of weights that stage 3 keeps whole, at most
MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed() -> Any:
    """The package, which then keeps out of the terminal and compiles nothing.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed as package
        import deepspeed.ops as ops
    except ImportError:
        raise ConfigError(
            "ZeRO needs DeepSpeed (Linux): pip install 'deepspeed>=0.19,<0.20'; or train with --zero 0"
        ) from None
    package.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Otherwise it would be compiled at the start, which takes a minute and a C++ compiler.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not package.comm.is_initialized():
        package.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return package


def settings(stage: int, micro_batches: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": stage,
        # It would replace torch's linear layers in the whole process; under torch 2.11 with torch.compile
        # their gradients then are 0.
        "memory_efficient_linear": False,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
    }
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it is asked for, and used for a report that we do not read
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,  # it would clip at 1 by itself
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that one is compiled when it is first used
        "zero_optimization": zero,
    }


def partitioned_from_birth(shards: Any = None) -> AbstractContextManager[object]:
    """The context in which a model is built such that no process ever holds it whole.

    `shards` are the processes that it is shared out to; by default all.
    """
    package = deepspeed()
    # Without a dtype, which it would take for bf16 on a CPU: the settings ask for fp32.
    return package.zero.Init(data_parallel_group=shards, config_dict_or_path=settings(3, 1, "none"))


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Partitioned parameters are whole inside; what process 0 makes of them is kept.

    Does nothing for parameters that are whole anyway.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    gathered = deepspeed().zero.GatheredParameters(partitioned, modifier_rank=0) if partitioned else None
    with gathered or nullcontext():
        yield


class _Runner(nn.Module):
    """Runs any function as a forward pass of the model, which is what DeepSpeed watches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.work: Callable[[], Any] | None = None

    def forward(self) -> Any:
        assert self.work is not None
        return self.work()


class _Machine:
    """Tells DeepSpeed that the data-parallel processes are those of one machine."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        """Those that partition the model."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> None:
        """Nobody shares the computation of one sample."""

    def get_model_parallel_world_size(self) -> int:
        """Likewise."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Likewise."""
        return 0


class _Share(NamedTuple):
    """Where this process' share of one parameter lies: `size` numbers from `start` of a flat tensor."""

    flat: int
    start: int
    size: int
    offset: int  # within the flattened parameter


class ZeroEngine(Engine):
    """A model partitioned over `topology.shards`, by default all processes.

    Args:
        stage: 1, 2 or 3; for 3 the model is built within `partitioned_from_birth`.
        offload: "cpu" keeps moments and fp32 weights in main memory and updates them there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        *,
        ema: tuple[float, int],
        clip: float | None,
        precision: Arithmetic,
        topology: Topology,
        stage: int,
        micro_batches: int,
        offload: str = "none",
        scaling: Scaling | None = None,
        compression: PowerSGD | None = None,
        muon: Muon | None = None,
    ) -> None:
        package = deepspeed()
        self.stage, self.offload = stage, offload
        self.runner = _Runner(model)
        self.deep, *_ = package.initialize(
            model=self.runner,
            optimizer=optimizer,
            config=settings(stage, micro_batches, offload),
            dist_init_required=False,
            mpu=None if topology.shards is None else _Machine(topology.shards),
        )
        self.zero = self.deep.optimizer
        third = stage == 3
        self.flats: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if third else self.zero.single_partition_of_fp32_groups
        )
        average = Average(self.flats, *ema)
        super().__init__(
            model, optimizer, average, clip=clip, precision=precision, scaling=scaling, topology=topology,
            compression=compression, muon=muon,
        )  # fmt: skip
        self.device = torch.device(self.deep.device)
        self.shares = {name: self._share(p) for name, p in self.named.items()}
        if compression is not None and topology.machines > 1:
            self._begin_alike()

    def _share(self, p: Any) -> _Share | None:
        if self.stage == 3:
            flat, start, size = self.zero.grad_position[self.zero.get_param_id(p)]
            offset = dist.get_rank(self.zero.dp_process_group) * size
            size = max(0, min(int(size), p.ds_numel - offset))  # the last ones' shares are padded
            return _Share(flat, int(start), size, offset) if size else None
        mapping = p._hp_mapping
        if mapping is None:
            return None
        at, of = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Share(mapping.param_group_index, at.start, at.numel, of.start)

    def run(self, function: Callable[..., R], *arguments: object) -> R:
        """See `Engine.run`."""

        def work() -> R:
            with self.arithmetic():
                return function(*arguments)

        self.runner.work = work
        try:
            return self.deep()
        finally:
            self.runner.work = None

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """See `Engine.backward`."""
        last = self.deep.is_gradient_accumulation_boundary()
        with products(self.precision, self.device):
            self.deep.backward(loss)
        if not last:
            self.deep.step()  # counts the micro-batch

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        found = []
        for name, share in self.shares.items():
            if share is not None:
                p = self.named[name]
                found.append(Piece(name, p, self._gradient(p, share), share.offset))
        return found

    def _gradient(self, p: Any, share: _Share) -> Tensor:
        if self.offload == "cpu":
            grad = self.flats[share.flat].grad
            assert grad is not None
            return grad.narrow(0, share.start, share.size)
        if self.stage == 3:
            return self.zero._get_fp32_grad_state_partition(p, release_swap_buffers=True)[0][: share.size]
        # What DeepSpeed will join to the gradient of the flat tensor: parts of parameters, and padding.
        at = 0
        for part in self.zero.averaged_gradients[share.flat]:
            if at <= share.start < at + part.numel():
                return part.view(-1)[share.start - at :][: share.size]
            at += part.numel()
        raise RuntimeError("DeepSpeed keeps its gradients in another way than dalle.zero expects")

    def weights(self) -> list[Tensor]:
        """See `Engine.weights`."""
        return self.flats

    def _make_buckets(self) -> None:
        """DeepSpeed averages them, on CUDA during the backward pass."""

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """See `Engine`: DeepSpeed sees to it within a machine only, where each partitions for itself."""
        for flat, average in zip(self.flats, self.average.weights, strict=True):
            dist.broadcast(flat, group=self.topology.between, group_src=0)
            average.copy_(flat)
        self._show(self.flats)

    def _norm(self, gradients: list[Tensor]) -> float:
        squares = torch.zeros((), device=self.device)
        if gradients:
            squares += torch.stack(torch._foreach_norm(gradients)).square().sum().to(self.device)
        dist.all_reduce(squares, group=self.topology.shards)
        return float(squares.sqrt())

    def _step(self, apply: bool) -> None:
        if not apply:
            torch._foreach_zero_([piece.grad for piece in self.pieces()])
        self.optimizer.skip = not apply
        self.deep.step()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """See `Engine.averaged`."""
        self._show(self.average.weights)
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()
            self._show(self.flats)

    @torch.no_grad()
    def _show(self, flats: list[Tensor]) -> None:
        """Let the model have these fp32 weights, as DeepSpeed does after each update."""
        zero = self.zero
        if self.stage == 3:
            zero._partition_all_parameters()
            for i, flat in enumerate(flats):
                zero.fp16_partitioned_groups_flat[i].copy_(flat)
                zero._unflatten_partitioned_parameters(i)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        trained, zero.single_partition_of_fp32_groups = zero.single_partition_of_fp32_groups, flats
        try:
            zero.update_lp_params()
        finally:
            zero.single_partition_of_fp32_groups = trained

    def state(self) -> dict[str, dict[str, Part]]:
        """See `Engine.state`."""
        moments = {}
        for name in (n for n in self.named if n not in self.optimizer.plain):
            for kind in MOMENTS:
                held = [self.optimizer.state[flat].get(kind) for flat in self.flats]
                if any(moment is not None for moment in held):
                    moments[f"{name}/{kind}"] = self._part(name, held, self._dtype(name))
            if (count := self._updates()) is not None:
                moments[f"{name}/step"] = self._whole(count)
        self._compare_machines()
        return self._errors() | {
            "weights": {name: self._part(name, self.flats) for name in self.named},
            "average": {name: self._part(name, self.average.weights) for name in self.named},
            "moments": moments | self._momenta(),
            **{f: {n: self._whole(t) for n, t in group.items()} for f, group in self._scales().items()},
        }

    def _updates(self) -> Tensor | None:
        counts = [state["step"] for flat in self.flats if "step" in (state := self.optimizer.state[flat])]
        return counts[0] if counts else None

    def _dtype(self, name: str) -> torch.dtype:
        """Of a parameter's moments."""
        return torch.uint16 if name in self.optimizer.packed else torch.float32

    def _part(self, name: str, flats: list[Any], dtype: torch.dtype = torch.float32) -> Part:
        share, shape = self.shares[name], full_shape(self.named[name])
        if share is None or not self._tells():
            return Part(shape, 0, torch.empty(0, dtype=dtype))
        return Part(shape, share.offset, flats[share.flat].narrow(0, share.start, share.size))

    def _tells(self) -> bool:
        """Where each machine partitions the model for itself, the first one's parts make it whole."""
        return self.topology.rank < dist.get_world_size(self.topology.shards)

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """See `Engine.load`."""
        counts = [name for name in saved.names("moments") if name.endswith("/step")]
        if counts:
            updates = saved.read("moments", min(counts))
            for i, flat in enumerate(self.flats):
                group = self.optimizer.param_groups[
                    self.zero.sub_group_to_group_id[i] if self.stage == 3 else i
                ]
                if group.get("plain"):
                    continue
                dtype = torch.uint16 if group.get("packed") else flat.dtype
                self.optimizer.state[flat] = {
                    "step": updates.to(flat.device, copy=True),  # each flat tensor counts for itself
                    **{kind: torch.zeros_like(flat, dtype=dtype) for kind in MOMENTS},
                }
        saved_moments = saved.names("moments")
        for name in self.named:
            self._take(saved, "weights", name, name, self.flats)
            self._take(saved, "average", name, name, self.average.weights)
            for kind in MOMENTS:
                if (key := f"{name}/{kind}") in saved_moments:
                    held = [self.optimizer.state[flat].get(kind) for flat in self.flats]
                    self._take(saved, "moments", key, name, held)
        self._show(self.flats)
        self._load_momenta(saved)
        self._load_scales(saved)
        self._load_errors(saved)

    def _own_weights(self) -> list[Tensor]:
        """Without what pads the flat tensors, which may be anything."""
        shares = [share for share in self.shares.values() if share is not None]
        return [self.flats[share.flat].narrow(0, share.start, share.size) for share in shares]

    def _share_of(self, name: str) -> tuple[int, int]:
        share = self.shares[name]
        return (share.offset, share.size) if share is not None else (0, 0)

    def _take(self, saved: Saved, file: str, key: str, name: str, flats: list[Tensor]) -> None:
        tensor, share = saved.read(file, key).flatten(), self.shares[name]
        if share is not None:
            flats[share.flat].narrow(0, share.start, share.size).copy_(tensor[share.offset :][: share.size])

    def close(self) -> None:
        """Let go of everything that would hold on to the process group."""
        self.deep.destroy()
        deepspeed().utils.groups.mpu = None  # or the next engine would have this one's
        del self.deep, self.zero, self.flats
