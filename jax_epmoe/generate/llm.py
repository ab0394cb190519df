"""`LLM`: a checkpoint's folder to an object that continues prompts, by the names of vLLM's and SGLang's offline classes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax_epmoe.checkpoint import load_on_mesh
from jax_epmoe.config import ModelConfig, require
from jax_epmoe.generate import text
from jax_epmoe.generate.engine import Completion, Engine, Progress
from jax_epmoe.generate.entries import Entry
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scheduler import FinishReason
from jax_epmoe.models.families import read_config

Messages = Sequence[dict[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class RequestOutput:
    """What a prompt got, so far where `finish_reason` is None.

    Attributes:
      index: the prompt's place among those given.
      prompt: as it was given; None for token ids.
      prompt_token_ids: what the model read.
      text: of the new tokens, cut before a stop string and without special tokens; None where there is no tokenizer.
      token_ids, finish_reason, stop_reason, logprobs: as `Completion`'s.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, float]] | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class LLM:
    """A model on a mesh of devices, its tokenizer and its `Engine`.

    llm = LLM("olmoe", tp_size=8, ep_size=8)
    for output in llm.generate(["The moon is"], SamplingParams(temperature=0.8, max_new_tokens=50)):
        print(output.text)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tp_size: int = 1,
        ep_size: int = 1,
        dp_size: int = 1,
        enable_dp_attention: bool = False,
        load_format: str = "auto",
        dtype: str | None = None,
        backend: str | None = None,
        progress: bool = False,
        **engine: Any,
    ):
        """
        Args:
          model: a folder that `epmoe-convert` wrote; for `load_format="dummy"`, one with a config.json.
          tp_size, ep_size, dp_size: of the mesh, see `make_mesh`.
          enable_dp_attention: deal sequences, not heads, over the tp_size devices in attention; dp_size is then tp_size or left out.
          load_format: "auto" reads the weights, "dummy" makes random ones.
          dtype: see `load_model`.
          backend: of `grouped_gemm`; None picks the fastest.
          progress: show a progress bar on stderr while loading.
          engine: the rest goes to `Engine`: max_batch_size, context_length, kv_cache_dtype, ...

        Raises:
          ValueError: not a checkpoint, a mesh that does not divide the model, or a value out of its range.
        """
        folder = Path(model)
        config = read_generation_config(folder, "model")
        self.tokenizer = text.load_tokenizer(folder)
        decoder = load_on_mesh(
            folder,
            tp_size=tp_size,
            ep_size=ep_size,
            dp_size=dp_size,
            enable_dp_attention=enable_dp_attention,
            load_format=load_format,
            dtype=dtype,
            backend=backend,
            progress=progress,
        )
        if self.tokenizer is not None:
            engine.setdefault("detokenize", partial(text.decode, self.tokenizer))
        self.engine = Engine(decoder, **{"eos_token_ids": config.eos_token_ids, **engine})

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: Sampling = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts.

        Args:
          prompts: a text, or several.
          sampling_params: for all prompts, or one each; greedy by default.
          prompt_token_ids: prompts as token ids, instead of texts.
          progress: is told of new tokens and finished prompts as they come.

        Returns:
          An output a prompt, in their order.

        Raises:
          ValueError: both kinds of prompts or none, text without a tokenizer, or what `Engine.generate` refuses.
        """
        names, ids = self._encoded(prompts, prompt_token_ids)
        completions = self.engine.generate(ids, sampling_params, progress=progress)
        return [self._output(i, names[i], ids[i], completion) for i, completion in enumerate(completions)]

    def stream(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: Sampling = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        deltas: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yields an output when its prompt has finished; with `deltas`, also whenever it has got further.

        Args and errors are `generate`'s; prompts are checked at once. An output that has not finished has all of its text so far,
        but for an end that is not a whole letter yet.
        """
        names, ids = self._encoded(prompts, prompt_token_ids)
        if not deltas:
            finished = self.engine.stream(ids, sampling_params, progress=progress)
            return (self._output(i, names[i], ids[i], completion) for i, completion in finished)
        return self._growing(names, ids, sampling_params, progress)

    def _growing(
        self, names: list[str | None], ids: list[list[int]], sampling: Sampling, progress: Progress | None
    ) -> Iterator[RequestOutput]:
        so_far: list[list[int]] = [[] for _ in ids]
        for update in self.engine.stream_tokens(ids, sampling, progress=progress):
            i = update.index
            so_far[i] += update.token_ids
            if update.completion is not None:
                yield self._output(i, names[i], ids[i], update.completion)
            else:
                said = (
                    None if self.tokenizer is None else text.decode(self.tokenizer, ids[i], so_far[i]).rstrip("\ufffd")
                )
                yield RequestOutput(i, names[i], ids[i], said, list(so_far[i]), None)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Sampling = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, `[{"role": "user", "content": ...}, ...]`, or several, by the tokenizer's chat template.

        Raises:
          ValueError: no chat template, one that refuses the messages, or what `Engine.generate` refuses.
        """
        text.check_chat_template(self.tokenizer)
        several: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        entries = [Entry(f"messages[{i}]", list(one), "messages") for i, one in enumerate(several)]
        return self.generate(
            sampling_params=sampling_params,
            prompt_token_ids=[text.encode(self.tokenizer, entry, chat=True) for entry in entries],
            progress=progress,
        )

    def _encoded(self, prompts: Any, prompt_token_ids: Any) -> tuple[list[str | None], list[list[int]]]:
        require(
            (prompts is None) != (prompt_token_ids is None),
            "prompts and prompt_token_ids",
            "both or neither",
            "one of them",
        )
        if prompts is None:
            return [None] * len(prompt_token_ids), [list(ids) for ids in prompt_token_ids]
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        require(all(isinstance(one, str) for one in texts), "prompts", prompts, "a string, or a list of strings")
        entries = [Entry(f"prompts[{i}]", one) for i, one in enumerate(texts)]
        return list(texts), [text.encode(self.tokenizer, entry, chat=False) for entry in entries]

    def _output(self, index: int, prompt: str | None, ids: list[int], completion: Completion) -> RequestOutput:
        said = text.completion_text(self.tokenizer, ids, completion)
        return RequestOutput(
            index, prompt, ids, said, completion.token_ids, completion.finish_reason, completion.stop_reason,
            completion.logprobs,
        )  # fmt: skip


def read_generation_config(folder: Path, name: str) -> ModelConfig:
    """The folder's `ModelConfig`, with the end-of-sequence tokens of generation_config.json too.

    Raises:
      ValueError: no such file, or a wrong one; `name` is what the folder was given as.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} is {str(folder)!r}; it should be a folder with a config.json")
    config = read_config(folder)
    return config.replace(eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *_eos_ids(folder)])))


def _eos_ids(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{path}: eos_token_id is {ids!r}; it should be a token id or a list of them")
    return ids
