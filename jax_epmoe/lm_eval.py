"""An adapter for the lm-evaluation-harness: `python -m jax_epmoe.lm_eval run --model jax_epmoe --model_args pretrained=FOLDER ...`

That is the harness's own command line with the model `jax_epmoe` added to it; in Python, importing this module adds it. Needs
`pip install 'jax_epmoe[eval]'`; no torch.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from jax_epmoe.config import require
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.llm import read_generation_config
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scoring import Scorer
from jax_epmoe.generate.text import completion_text, decode, load_tokenizer

# What a task may say of generation, and which of our parameters that is.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("jax_epmoe")
class EPMoELM(TemplateLM):
    """A converted checkpoint as the harness sees a model."""

    def __init__(
        self,
        pretrained: str,
        tp_size: int = 1,
        ep_size: int = 1,
        dp_size: int = 1,
        enable_dp_attention: bool = False,
        dtype: str | None = None,
        backend: str | None = None,
        load_format: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_tokens: int = 16384,
        max_batch_size: int = 256,
        batch_size: int | str | None = None,
        device: str | None = None,
    ):
        """
        Args:
          pretrained: a folder that `epmoe-convert` wrote, with its tokenizer.
          tp_size, ep_size, dp_size, enable_dp_attention, dtype, backend, load_format: as `epmoe-generate` has them.
          max_length: the most positions of a request; by default, and at most, the model's. Longer contexts lose their beginning.
          max_gen_toks: of `generate_until`, where a task does not say it.
          batch_tokens: how many positions a call of the decoder reads when scoring.
          max_batch_size: sequences that `generate_until` runs together.
          batch_size, device: what the harness passes (1, unless told), without effect: `batch_tokens` and the mesh decide.

        Raises:
          ValueError: an argument out of its range, or a folder without a tokenizer.
        """
        super().__init__()
        from jax_epmoe.checkpoint import load_on_mesh
        from jax_epmoe.mesh import dp_size_of_mesh, split_cpu

        folder = Path(pretrained)
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise ValueError(f"pretrained is {pretrained!r}, which has no tokenizer; it should have the model's")
        self.tokenizer: Any = tokenizer
        self._eos_token_ids = read_generation_config(folder, "pretrained").eos_token_ids
        split_cpu(max(1, tp_size * dp_size_of_mesh(tp_size, dp_size, enable_dp_attention)))
        self._model = load_on_mesh(
            folder,
            tp_size=tp_size,
            ep_size=ep_size,
            dp_size=dp_size,
            enable_dp_attention=enable_dp_attention,
            load_format=load_format,
            dtype=dtype,
            backend=backend,
        )
        longest = self._model.config.max_position_embeddings
        self.max_length = longest if max_length is None else int(max_length)
        require(1 < self.max_length <= longest, "max_length", self.max_length, f"from 2 to the model's {longest}")
        self.max_gen_toks = int(max_gen_toks)
        require(
            0 < self.max_gen_toks < self.max_length, "max_gen_toks", max_gen_toks, f"from 1 to {self.max_length - 1}"
        )
        self._scorer = Scorer(self._model, batch_tokens=int(batch_tokens))
        self._engine: Engine | None = None
        self._max_batch_size = int(max_batch_size)
        self._name = folder.resolve().name

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is scored after: the beginning of a text, or the end of the one before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Special tokens as the tokenizer adds them, unless the text begins with one already, as a chat template's does."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._within(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            scores = self._scorer.score(pairs, progress=bar.update)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def _within(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        """The last `max_length` tokens before the one that is predicted last."""
        most = self.max_length + 1
        require(len(continuation) < most, "a continuation's number of tokens", len(continuation), f"at most {most - 1}")
        kept = [*context, *continuation][-most:]
        at = len(kept) - len(continuation)
        return kept[:at], kept[at:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; each token is predicted once, in windows of `max_length`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            new = [(None, *window) for window in rolling_windows(tokens, self.prefix_token_id, self.max_length)]
            windows += new
            counts.append(len(new))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to, and without, the first of a request's stop strings."""
        asked = [self._generation(*request.args) for request in requests]
        if self._engine is None:
            self._engine = Engine(
                self._model,
                max_batch_size=self._max_batch_size,
                context_length=self.max_length,
                eos_token_ids=self._eos_token_ids,
                detokenize=partial(decode, self.tokenizer),
            )
        prompts, sampling = [prompt for prompt, _ in asked], [params for _, params in asked]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for i, completion in self._engine.stream(prompts, sampling):
                texts[i] = completion_text(self.tokenizer, prompts[i], completion) or ""
                bar.update(1)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, context: str, said: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """A request's prompt and parameters."""
        said = dict(said)
        until = said.pop("until", None) or []
        lengths = [said.pop(name) for name in _LENGTHS if name in said]
        length = int(lengths[0]) if lengths else self.max_gen_toks
        require(0 < length < self.max_length, "max_gen_toks", length, f"from 1 to {self.max_length - 1}")
        match said.pop("do_sample", None):
            case True:
                said.setdefault("temperature", 1.0)
            case False:
                said["temperature"] = 0.0
        values = {_SAMPLING[name]: value for name, value in said.items() if name in _SAMPLING and value is not None}
        left = {name: value for name, value in said.items() if name not in _SAMPLING}
        require(
            not left,
            "a task's generation_kwargs",
            sorted(left),
            f"among until, do_sample, {', '.join(_LENGTHS + tuple(_SAMPLING))}",
        )
        prompt = self.tok_encode(context)[-(self.max_length - length) :]
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        return prompt, SamplingParams(max_new_tokens=length, stop=tuple(stops), **values)


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and continuations that predict each token once, and read at most `length`: the first after `prefix`, the others,
    the last and shorter one too, after as many tokens as there is room for, of those before.

        rolling_windows([5, 6, 7, 8, 9], prefix=0, length=3) -> ([0], [5, 6, 7]), ([6, 7], [8, 9])
    """
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        context = [prefix] if start == 0 else tokens[end - length - 1 : start]
        yield list(context), list(tokens[start:end])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
