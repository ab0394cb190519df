"""The device mesh: its axis names, how to make one, and start-up over several processes.

Axes, always all three, in this order: `data`, `expert`, `tensor`, of sizes `dp_size`, `ep_size` and
`tp_size // ep_size`. Attention is split over `TP_AXES`, the `tp_size` devices of `expert` and `tensor` together.
"""

import contextlib
import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jax_epmoe.config import require

DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
TP_AXES = (EXPERT, TENSOR)
ALL_AXES = (DATA, *TP_AXES)

# A launcher's variable that says how many processes it started. `jax.distributed.initialize` finds the rest itself.
# (Slurm's SLURM_NTASKS is also set in a batch script's own shell, where no peers run.)
_PROCESS_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_KUBERNETES_INDEXED_JOB = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}


def make_mesh(
    tp_size: int = 1, ep_size: int = 1, dp_size: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `dp_size * tp_size` devices, with automatic sharding axes.

    Args:
      tp_size: over how many devices attention is split, and every layer's parameters are dealt.
      ep_size: into how many parts the experts are dealt; divides `tp_size`. Each expert is then split over
        `tp_size // ep_size` devices: ep_size == tp_size is pure expert parallelism, ep_size == 1 pure tensor parallelism.
      dp_size: replicas, each of `tp_size` devices, that take different sequences of a batch.
      devices: which devices; by default the first that JAX lists.

    Raises:
      ValueError: a size that is not a positive integer, ep_size does not divide tp_size, or too few devices.
    """
    for name, value in (("tp_size", tp_size), ("ep_size", ep_size), ("dp_size", dp_size)):
        require(isinstance(value, int) and value > 0, name, value, "a positive integer")
    require(tp_size % ep_size == 0, "ep_size", ep_size, f"a divisor of tp_size ({tp_size})")
    available = list(jax.devices() if devices is None else devices)
    needed = dp_size * tp_size
    require(
        needed <= len(available), "tp_size * dp_size", needed, f"at most the {len(available)} devices that there are"
    )
    return jax.make_mesh(
        (dp_size, ep_size, tp_size // ep_size),
        (DATA, EXPERT, TENSOR),
        axis_types=(AxisType.Auto,) * 3,
        devices=available[:needed],
    )


def dp_size_of_mesh(
    tp_size: int, dp_size: int, enable_dp_attention: bool, names: tuple[str, str] = ("dp_size", "enable_dp_attention")
) -> int:
    """`make_mesh`'s `dp_size`, where a user may also say `dp_size = tp_size` with data-parallel attention: its replicas are the devices
    of the tensor-parallel group, so the mesh has 1. `names`: what the user calls both.

    Raises:
      ValueError: with data-parallel attention, another `dp_size`.
    """
    if not enable_dp_attention:
        return dp_size
    require(dp_size in (1, tp_size), names[0], dp_size, f"{tp_size}, as tp_size, or left out with {names[1]}")
    return 1


def axes_size(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    """Over how many devices the named axes of a mesh spread an array; 1 for none."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def split_cpu(count: int) -> None:
    """Makes `count` JAX devices of this machine's CPU, so that a mesh can be tried without accelerators.

    GPUs are not affected. What XLA_FLAGS or JAX_NUM_CPU_DEVICES ask for has precedence, and under a job launcher each process
    keeps what it has. Call it before anything asks JAX for its devices; later it does nothing.
    """
    asked = jax.config.jax_num_cpu_devices >= 0 or "xla_force_host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    if not asked and not _launched_with_peers():
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", count)


def initialize_distributed(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of this program; does nothing when there are none.

    Slurm, Open MPI and Kubernetes job launchers are found by themselves (`jax.distributed`); elsewhere give all three
    arguments. Call it before anything asks JAX for its devices.

    Args:
      coordinator_address: "host:port" of process 0, the same in every process.
      num_processes: how many processes there are.
      process_id: this one's number, from 0.

    Raises:
      ValueError: some of the three arguments are given and others are not, or one is out of range.
    """
    given = (coordinator_address, num_processes, process_id)
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        require(num_processes > 0, "num_processes", num_processes, "a positive integer")
        require(0 <= process_id < num_processes, "process_id", process_id, f"from 0 to {num_processes - 1}")
        host, _, port = coordinator_address.rpartition(":")
        require(host != "" and port.isdigit(), "coordinator_address", coordinator_address, "host:port")
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif any(value is not None for value in given):
        names = "coordinator_address, num_processes, process_id"
        require(False, names, given, "all given, or none")
    elif _launched_with_peers():
        jax.distributed.initialize()


def _launched_with_peers() -> bool:
    counts = (os.environ.get(name, "1") for name in _PROCESS_COUNT_VARIABLES)
    return any(count.isdigit() and int(count) > 1 for count in counts) or os.environ.keys() >= _KUBERNETES_INDEXED_JOB
