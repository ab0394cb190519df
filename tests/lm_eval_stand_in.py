"""What `jax_epmoe.lm_eval` uses of the lm-evaluation-harness, for where it is not installed: its base class's contract and registry."""

import abc
import sys
import types

models = {}


class TemplateLM(abc.ABC):
    """Encodes pairs of texts and leaves the scoring of token ids to `_loglikelihood_tokens`."""

    def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda kind, asked, answer: None)

    @abc.abstractmethod
    def tok_encode(self, string, add_special_tokens=None): ...

    @abc.abstractmethod
    def _loglikelihood_tokens(self, requests, **kwargs): ...

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = []
        for context, continuation in (request.args for request in requests):
            if context:
                before = self.tok_encode(context)
                after = self.tok_encode(context + continuation)[len(before) :]
            else:
                before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


def register_model(name):
    return lambda cls: models.setdefault(name, cls)


def install() -> None:
    """Puts the stand-in where `import lm_eval` finds it."""
    package, api = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.api")
    model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    model.TemplateLM, registry.register_model = TemplateLM, register_model
    modules = {"lm_eval": package, "lm_eval.api": api, "lm_eval.api.model": model, "lm_eval.api.registry": registry}
    sys.modules.update(modules)
