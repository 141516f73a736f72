"""Sampling with vLLM in place of hone's own generation: the same prompts and answers, its own kernels and batching."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.errors import HoneError
from hone.text.generate import Generation

if TYPE_CHECKING:
    from hone.engine.loop import Run


class VLLM:
    """A copy of the training model inside vLLM, brought up to date before each phase.

    Log-probabilities are those of the tempered distribution that was sampled from. They differ from the trainer's by
    what other kernels round differently, which the ratio of a policy objective corrects.
    """

    def __init__(self, run: Run) -> None:
        """Load the model that the run starts from.

        Args:
            run: the run in progress, on CUDA.

        Raises:
            HoneError: vLLM is not installed, or the run trains an adapter whose weights vLLM has no place for.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise HoneError(
                "data.engine: vllm is not installed here; install it with pip install vllm (it needs CUDA), or use "
                "engine: hone"
            ) from error
        if not run.adapter.saves_base:
            raise HoneError(
                "data.engine: vllm is brought up to date with whole weights, so it needs an adapter that trains them, "
                "such as full; use engine: hone"
            )
        from hone.text.loading import find_model

        # Weights are handed over in this process; vLLM would put its engine into one of its own, beyond reach.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self.params = SamplingParams
        self.llm: Any = LLM(
            model=str(find_model(run.recipe.build("model").path)), logprobs_mode="processed_logprobs",
            gpu_memory_utilization=0.3, seed=run.recipe.seed, max_model_len=run.model.context,
        )  # fmt: skip

    def update(self, run: Run) -> None:
        """Give vLLM the weights of now.

        Args:
            run: the run in progress.
        """
        inner = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        inner.load_weights([(name, tensor.data) for name, tensor in run.model.hf.named_parameters()])
        self.llm.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[int],
        seed: int,
    ) -> list[list[Generation]]:
        """Continue each prompt `samples` times.

        Args:
            prompts: token ids of each prompt.
            samples: answers to each.
            max_new_tokens: most tokens of an answer, a stop token included.
            temperature: of the sampling.
            stop: ids that end an answer.
            seed: of the sampling; every answer has one of its own, made of it.
        """
        first = seed % 2**31
        asked = [
            self.params(
                n=samples, temperature=temperature, max_tokens=max_new_tokens, stop_token_ids=list(stop), logprobs=0,
                seed=first + place * samples,  # vLLM counts on from it, one for each answer to the prompt
            )
            for place in range(len(prompts))
        ]  # fmt: skip
        rows = [{"prompt_token_ids": np.asarray(prompt).tolist()} for prompt in prompts]
        made = self.llm.generate(rows, sampling_params=asked, use_tqdm=False)
        return [[_generation(answer, set(stop)) for answer in one.outputs] for one in made]


def _generation(answer: Any, stop: set[int]) -> Generation:
    """Return an answer of vLLM as one of ours."""
    tokens = np.array(answer.token_ids, np.int32)
    logprobs = np.array([found[token].logprob for token, found in zip(answer.token_ids, answer.logprobs, strict=True)])
    if not len(tokens) or int(tokens[-1]) not in stop:
        return Generation(tokens, logprobs, False)
    return Generation(tokens[:-1], logprobs[:-1], True, int(tokens[-1]), float(logprobs[-1]))
