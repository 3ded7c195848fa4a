"""Check that a training job fits into a worker's memory before anything is allocated."""

import gc

import psutil
import ray.train
import torch
from transformers import AutoConfig

from spo_ray.model import memory
from spo_ray.model.memory import Device, MemoryEstimate, check_memory
from spo_ray.train.distributed import Distributed
from spo_ray.train.spec import TrainJob


class RetainedMemory:
    """Host memory that the allocator still holds from earlier jobs of this process and can reuse."""

    def __init__(self) -> None:
        self.before = self._resident()

    def now(self) -> int:
        """Return the number of bytes."""
        return max(0, self._resident() - self.before)

    @staticmethod
    def _resident() -> int:
        gc.collect()  # models are in reference cycles
        torch.cuda.empty_cache()
        return psutil.Process().memory_info().rss


def estimate_memory(job: TrainJob, device: Device) -> MemoryEstimate:
    """Return the memory estimate of a job, for one worker."""
    return memory.estimate_memory(
        job.config, AutoConfig.from_pretrained(job.model), job.method or "sft", job.method_config, device
    )


def check_room(job: TrainJob, rank: Distributed, retained: int = 0) -> None:
    """Compare the memory estimate of a job with this worker's free memory.

    ``retained`` is host memory in bytes that counts as free although this process holds it; used on a CPU only.

    Raises:
        UserError: the job does not fit; the message has the estimate, and settings with which it would fit.
    """
    if not job.config.train.memory_check:
        return
    if rank.device.type == "cpu":  # shared with the other workers of the node
        estimate = estimate_memory(job, "cpu")
        room = psutil.virtual_memory().available // ray.train.get_context().get_local_world_size() + retained
    else:
        estimate = estimate_memory(job, "cuda")
        room = torch.cuda.mem_get_info(rank.device)[0]
    check_memory(estimate, room, job.method or "sft")
