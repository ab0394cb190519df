"""Our checkpoints: one array per parameter and layer, restored by Orbax straight to its shards on any mesh.

    config.json, tokenizer files     Hugging Face's own, untouched
    epmoe.json                       format version, dtype, quantisation, a fingerprint of the source
    manifest.json                    each array's shape, dtype and SHA-256; tensors with values that are not finite
    params/                          Orbax: a flat dictionary, from `layers.0.moe.w_down` and the like to arrays of HF's sizes

A quantised `layers.0.moe.w_down` is `layers.0.moe.w_down.values` and `.scales` and, in a static format, `.input_scales`.

Arrays know nothing of meshes: where a mesh needs a vocabulary or an intermediate size to divide, the end of that dimension
is filled with zeros while restoring, and the model cuts its logits back.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jax_epmoe.config import ModelConfig, require
from jax_epmoe.mesh import dp_size_of_mesh, make_mesh
from jax_epmoe.models.decoder import Decoder
from jax_epmoe.models.families import read_config
from jax_epmoe.quant import FORMATS, NOT_QUANTIZED, Quantization

FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "dummy")


def load_model(
    path: str | Path,
    *,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
    dp_attention: bool = False,
    progress: bool = False,
) -> Decoder:
    """A decoder with the weights of a checkpoint that `weights_convert` wrote.

    Each device reads its own shards; none ever holds the whole model.

    Args:
      path: the checkpoint's folder.
      mesh: from `make_mesh`.
      dtype: of weights that are not quantised, activations and cache: bfloat16, float16 or float32; None for the checkpoint's own.
      backend: of `grouped_gemm`; None picks the fastest.
      dp_attention: see `Decoder`.
      progress: show a progress bar on stderr.

    Raises:
      ValueError: not a checkpoint of this format, a damaged one, or a mesh that does not divide the model.
    """
    path = Path(path)
    header = read_header(path)
    config, quantization = read_config(path), quantization_of(header)
    dtype = _checked_dtype(dtype or header["dtype"])
    graphdef, state = abstract_model(config, mesh, dtype, backend, dp_attention, quantization)
    state = with_routers_of(state, jnp.dtype(header["dtype"]), dtype)
    targets = {_name(keys): variable.get_value() for keys, variable in nnx.to_flat_state(state)}
    arrays = _restore(path, parameter_shapes(config, quantization), targets, progress)
    return nnx.merge(graphdef, nnx.map_state(lambda keys, variable: variable.replace(arrays[_name(keys)]), state))


def dummy_model(
    path: str | Path,
    *,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
    dp_attention: bool = False,
    seed: int = 0,
    quantization: str | None = None,
) -> Decoder:
    """A decoder of the size that a folder's `config.json` tells, with random weights: for measuring without a checkpoint.

    Args and errors are `load_model`'s; `dtype` is bfloat16 unless given, `seed` makes the weights, and `quantization` is None or
    a name in `jax_epmoe.quant.FORMATS`.
    """
    dtype = _checked_dtype(dtype or jnp.bfloat16)
    model = Decoder(
        read_config(path),
        mesh=mesh,
        dtype=dtype,
        rngs=nnx.Rngs(seed),
        backend=backend,
        dp_attention=dp_attention,
        quantization=Quantization(quantization),
    )
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, with_routers_of(state, dtype, dtype))


def load_on_mesh(
    path: str | Path,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    dp_size: int = 1,
    enable_dp_attention: bool = False,
    load_format: str = "auto",
    dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
    progress: bool = False,
) -> Decoder:
    """`load_model`, or for `load_format="dummy"` `dummy_model`, on a mesh of its own, by the names of the command line.

    Raises:
      ValueError: another `load_format`, sizes that make no mesh, or what those refuse.
    """
    require(load_format in LOAD_FORMATS, "load_format", load_format, f"one of {', '.join(LOAD_FORMATS)}")
    dp_size = dp_size_of_mesh(tp_size, dp_size, enable_dp_attention)
    load: Callable[..., Decoder] = dummy_model if load_format == "dummy" else partial(load_model, progress=progress)
    mesh = make_mesh(tp_size, ep_size, dp_size)
    return load(path, mesh=mesh, dtype=dtype, backend=backend, dp_attention=enable_dp_attention)


def with_routers_of(state: nnx.State, stored: jnp.dtype, dtype: jnp.dtype) -> nnx.State:
    """Routers that are stored in the model's dtype stay in it: the logits are the same, and tensor cores make them."""

    def keep(keys: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if keys[-2:] != ("router", "weight") or stored != dtype:
            return variable
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            return variable.replace(jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding))
        return variable.replace(value.astype(dtype))

    return nnx.map_state(keep, state)


def parameter_shapes(
    config: ModelConfig, quantization: Quantization = NOT_QUANTIZED
) -> dict[str, jax.ShapeDtypeStruct]:
    """The name and unpadded shape of each array of a model's checkpoint; its dtype if that is fixed, else bfloat16."""
    dtype = jnp.dtype(jnp.bfloat16)
    _, state = abstract_model(config, make_mesh(), dtype, quantization=quantization)
    state = with_routers_of(state, dtype, dtype)
    return {
        _name(keys): jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype)
        for keys, variable in nnx.to_flat_state(state)
    }


def abstract_model(
    config: ModelConfig,
    mesh: Any,
    dtype: Any,
    backend: str | None = None,
    dp_attention: bool = False,
    quantization: Quantization = NOT_QUANTIZED,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its weights: shapes, dtypes and shardings, no memory.

    With a backend given, the mesh may be a `jax.sharding.AbstractMesh`, which takes no devices.
    """

    def make() -> Decoder:
        return Decoder(
            config,
            mesh=mesh,
            dtype=dtype,
            rngs=nnx.Rngs(0),
            backend=backend,
            dp_attention=dp_attention,
            quantization=quantization,
        )

    return nnx.split(nnx.eval_shape(make))


def _name(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _checked_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    require(name in DTYPES, "dtype", name, f"one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def read_header(path: Path) -> dict[str, Any]:
    """A checkpoint's epmoe.json, its `format_version` and `dtype` checked.

    Raises:
      ValueError: there is none, it is damaged or of another format.
    """
    try:
        header = json.loads((path / "epmoe.json").read_text(encoding="utf-8"))
        version, dtype = header["format_version"], header["dtype"]
    except OSError:
        raise ValueError(
            f"model folder {str(path)!r} has no readable epmoe.json; it should be one that `python -m weights_convert` wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path / 'epmoe.json'} is damaged; convert the checkpoint again") from None
    require(version == FORMAT_VERSION, f"{path / 'epmoe.json'}: format_version", version, str(FORMAT_VERSION))
    require(dtype in DTYPES, f"{path / 'epmoe.json'}: dtype", dtype, f"one of {', '.join(DTYPES)}")
    return header


def quantization_of(header: dict[str, Any]) -> Quantization:
    """What `read_header`'s `quantization` says: None, or `{"format": ..., "kept": [names]}`."""
    entry = header.get("quantization")
    match entry:
        case None:
            return NOT_QUANTIZED
        case {"format": str(name), "kept": list(kept)} if name in FORMATS and all(isinstance(k, str) for k in kept):
            return Quantization(name, frozenset(kept))
    expected = f"null, or an object with a format ({', '.join(FORMATS)}) and a list of what is kept"
    raise ValueError(f"epmoe.json: quantization is {entry!r}; it should be {expected}")


def _restore(
    path: Path, shapes: dict[str, jax.ShapeDtypeStruct], targets: dict[str, jax.ShapeDtypeStruct], progress: bool
) -> dict[str, jax.Array]:
    """Reads every target's array to its shards, a layer at a time, padding with zeros at the end of a dimension."""
    folder = (path / "params" / "state").resolve()  # where Orbax puts a tree
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        stored = _reading(path, lambda: handler.metadata(folder).tree)
        _check_stored(path, {name: tuple(array.shape) for name, array in stored.items()}, shapes)
        arrays: dict[str, jax.Array] = {}
        with tqdm(total=len(targets), desc="loading", unit="array", disable=not progress) as bar:
            for names in by_layer(targets):
                layer = {name: targets[name] for name in names}
                args = ocp.args.PyTreeRestore(
                    item=layer,
                    restore_args={
                        name: ocp.ArrayRestoreArgs(
                            sharding=target.sharding, global_shape=target.shape, dtype=target.dtype, strict=False
                        )
                        for name, target in layer.items()
                    },
                    partial_restore=True,
                )
                arrays |= _reading(path, partial(handler.restore, folder, args=args))
                bar.update(len(layer))
    return arrays


def _check_stored(path: Path, stored: dict[str, tuple[int, ...]], shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Refuses arrays that are not those of the model that config.json tells."""
    where, advice = f"checkpoint {str(path)!r}", "to fit config.json; convert the checkpoint again"
    for name in sorted(stored.keys() ^ shapes.keys()):
        what = "there; it should not be" if name in stored else "missing; it should be there"
        raise ValueError(f"{where}: parameter {name} is {what}, {advice}")
    for name, expected in shapes.items():
        require(stored[name] == expected.shape, f"{where}: {name}'s shape", stored[name], f"{expected.shape}, {advice}")


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Parameter names in groups to read or write together: a layer each, and each of the others by itself."""

    def layer(name: str) -> str:
        first, second, *_ = name.split(".")
        return second if first == "layers" else first

    return [list(group) for _, group in itertools.groupby(sorted(names, key=layer), key=layer)]


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """Runs `read`; whatever Orbax or TensorStore raise for missing or damaged files becomes one line."""
    log = logging.getLogger("asyncio")  # where Orbax's other reads, which a failed one cancels, leave their tracebacks
    silent, log.disabled = log.disabled, True
    try:
        return read()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and str(cause.__cause__).strip():
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ValueError(
            f"checkpoint {str(path)!r}: params cannot be read, damaged or cut short: {reason[:300]}"
        ) from error
    finally:
        log.disabled = silent
