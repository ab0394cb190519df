"""Eight CPU devices for every test, set before anything imports JAX; tests/gpu asks for the GPU instead."""

import os

if "EPMOE_TEST_GPU" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
