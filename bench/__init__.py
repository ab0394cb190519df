"""Programs that measure. Each is run as `python -m bench.NAME`, and keeps what it saw in `bench/results/`."""
