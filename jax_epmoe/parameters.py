"""Parameters that are born on their shards, and modules that run on them."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe.mesh import axes_size

Initializer = Callable[..., jax.Array]
NORMAL = nnx.initializers.normal(0.02)


def parameter(
    shape: Sequence[int],
    partition: Sequence[Any],
    *,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    init: Initializer = NORMAL,
) -> nnx.Param:
    """A parameter of `shape`, zero-padded to the next size that `partition` can split evenly; no device holds all of it.

    Padding lies at the end of a dimension, and a module that pads must give zeros there no effect. The sharding is kept as
    Flax's `out_sharding` metadata, so `nnx.get_partition_spec`, `nnx.eval_shape` and optimizers see it.
    """
    make = _maker(
        init, tuple(shape), padded_shape(shape, partition, mesh), jnp.dtype(dtype), NamedSharding(mesh, P(*partition))
    )
    return nnx.Param(make(rngs.params()), out_sharding=P(*partition), mesh=mesh)


@cache
def _maker(
    init: Initializer, shape: tuple[int, ...], padded: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    """key -> the padded array on its shards; kept, so that layers of one shape compile once."""

    def make(key: jax.Array) -> jax.Array:
        values = init(key, shape, dtype)
        return values if padded == shape else jnp.pad(values, [(0, m - n) for n, m in zip(shape, padded, strict=True)])

    return jax.jit(make, out_shardings=sharding)


def padded_shape(shape: Sequence[int], partition: Sequence[Any], mesh: Mesh) -> tuple[int, ...]:
    """`shape` with each dimension rounded up to a multiple of the devices that `partition` splits it over."""
    parts = [axes_size(mesh, axes) for axes in partition]
    return tuple(-(-n // p) * p for n, p in zip(shape, parts, strict=True))


def run_on_shards(
    module: nnx.Module,
    method: Callable[..., Any],
    *args: Any,
    mesh: Mesh,
    in_specs: tuple[Any, ...],
    out_specs: Any,
) -> Any:
    """`method(module, *args)` on every device, with that device's shards of the module's parameters and arguments.

    One `shard_map`; the mesh's axes may be Auto or Explicit. Arguments are brought to `in_specs` first.
    """
    graphdef, state = nnx.split(module)

    def body(state: nnx.State, *args: Any) -> Any:
        return method(nnx.merge(graphdef, state), *args)

    if AxisType.Explicit in mesh.axis_types:
        args = jax.tree.map(
            lambda spec, arg: jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, spec)), arg),
            in_specs,
            args,
            is_leaf=lambda leaf: isinstance(leaf, P),
        )
    # check_vma=False: with it, gradients through argsort of rank-local keys are silently wrong (jax 0.11.2).
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(nnx.get_partition_spec(state), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )(state, *args)
