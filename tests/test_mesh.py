"""make_mesh's axes and refusals, and when a program joins others."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_epmoe import initialize_distributed, make_mesh
from jax_epmoe.mesh import DATA, EXPERT, TENSOR, TP_AXES, axes_size, split_cpu

LAUNCHER_VARIABLES = (
    "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX",
)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((), (1, 1, 1)),
        ((8,), (1, 1, 8)),
        ((8, 8), (1, 8, 1)),
        ((8, 2), (1, 2, 4)),
        ((2, 2, 4), (4, 2, 1)),
        ((2, 1, 3), (3, 1, 2)),
        ((1, 1, 8), (8, 1, 1)),
    ],
    ids=str,
)
def test_axes_are_data_expert_and_tensor_of_dp_ep_and_tp_over_ep(sizes, shape):
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == (DATA, EXPERT, TENSOR) == ("data", "expert", "tensor")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_devices_are_the_first_in_their_order_unless_given():
    # 2 replicas of 2 parts of the experts, each split over 2: neighbours share an expert, then a replica.
    assert make_mesh(4, 2, 2).devices.tolist() == np.array(jax.devices()).reshape(2, 2, 2).tolist()
    chosen = jax.devices()[::-1]
    assert make_mesh(2, 2, devices=chosen).devices.ravel().tolist() == chosen[:2]


def test_axes_size_is_the_product_of_the_named_axes():
    mesh = make_mesh(4, 2, 2)
    assert [axes_size(mesh, a) for a in (None, (), DATA, TENSOR, TP_AXES, mesh.axis_names)] == [1, 1, 2, 2, 4, 8]


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"tp_size": 0}, "tp_size is 0; it should be a positive integer"),
        ({"ep_size": -1}, "ep_size is -1; it should be a positive integer"),
        ({"dp_size": 2.0}, "dp_size is 2.0; it should be a positive integer"),
        ({"tp_size": "8"}, "tp_size is '8'; it should be a positive integer"),
        ({"tp_size": None}, "tp_size is None; it should be a positive integer"),
        ({"ep_size": 2}, "ep_size is 2; it should be a divisor of tp_size (1)"),
        ({"tp_size": 4, "ep_size": 3}, "ep_size is 3; it should be a divisor of tp_size (4)"),
        ({"tp_size": 16}, "tp_size * dp_size is 16; it should be at most the 8 devices that there are"),
        ({"tp_size": 4, "dp_size": 3}, "tp_size * dp_size is 12; it should be at most the 8 devices that there are"),
    ],
    ids=str,
)
def test_sizes_that_make_no_mesh_are_refused(sizes, line):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the line is compared whole)
        make_mesh(**sizes)
    assert str(caught.value) == line


def test_too_few_of_the_given_devices_are_refused():
    with pytest.raises(
        ValueError, match=r"^tp_size \* dp_size is 4; it should be at most the 3 devices that there are$"
    ):
        make_mesh(4, devices=jax.devices()[:3])


@pytest.fixture
def joined(monkeypatch):
    """How `jax.distributed.initialize` was called, by a program that no launcher started."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_program_of_one_process_joins_nothing(joined):
    initialize_distributed()
    assert joined == []


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "16"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
    ids=str,
)
def test_a_launcher_with_peers_is_left_to_jax(joined, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert joined == [((), {})]


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "8"},  # also set in a batch script's own shell, where no peers run
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": ""},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
    ],
    ids=str,
)
def test_a_launcher_without_peers_joins_nothing(joined, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert joined == []


def test_given_arguments_decide_over_the_launcher(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    initialize_distributed("node0:1234", 2, 1)
    assert joined == [(("node0:1234", 2, 1), {})]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a:1", None, None), "given all three, or none"),
        ((None, 2, 0), "given all three, or none"),
        (("a:1", 2, None), "given all three, or none"),
        (("a:1", 0, 0), "num_processes is 0; it should be a positive integer"),
        (("a:1", 2, 2), "process_id is 2; it should be from 0 to 1"),
        (("a:1", 2, -1), "process_id is -1; it should be from 0 to 1"),
        (("a", 2, 0), "coordinator_address is 'a'; it should be host:port"),
        (("a:", 2, 0), "coordinator_address is 'a:'; it should be host:port"),
        (("a:b", 2, 0), "coordinator_address is 'a:b'; it should be host:port"),
        (("1234", 2, 0), "coordinator_address is '1234'; it should be host:port"),
        ((":1234", 2, 0), "coordinator_address is ':1234'; it should be host:port"),
    ],
    ids=str,
)
def test_arguments_that_name_no_process_are_refused(joined, arguments, line):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the line is checked below)
        initialize_distributed(*arguments)
    expected = "coordinator_address, num_processes, process_id is " if line.startswith("given") else line
    assert str(caught.value).startswith(expected)
    assert joined == []


def test_split_cpu_makes_devices_of_a_cpu_unless_the_environment_asks_for_others():
    code = "from jax_epmoe.mesh import split_cpu; split_cpu(3); import jax; print(len(jax.devices()))"

    def devices(**environment) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
        run = subprocess.run(
            [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    assert devices() == "3"
    assert devices(JAX_NUM_CPU_DEVICES="2") == "2"
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=5") == "5"
    assert devices(SLURM_STEP_NUM_TASKS="2") == "1"


def test_split_cpu_comes_too_late_without_harm():
    before = jax.devices()
    split_cpu(3)
    assert jax.devices() == before
