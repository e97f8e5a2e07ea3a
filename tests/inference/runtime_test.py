"""Settings that only a tokenizer can judge: the token before which images are inserted.

Oracle: the tokens of the responses themselves, counted, and their log-probabilities when the trainer scores them.
"""

import dataclasses

import numpy as np
import pytest

from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, to_dict
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.inference.runtime import build
from qwenla_jax.inference.sample_batches import answer
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.train.logprobs import response_logprobs

COPY = ReattentionOptions(mode="copy", max_insertions=1)


@pytest.mark.parametrize("trigger", ["<CAPTION>", " red"])
def test_images_are_inserted_before_the_trigger(trigger):
    options = dataclasses.replace(COPY, trigger=trigger)
    runtime, params = build(InferenceConfig(batch_size=8, max_response_tokens=48, reattention=options))
    (token,) = runtime.tokenizer.encode(trigger)
    sampler = Sampler(runtime, runtime.sample_options(group_size=1, temperature=1.0))
    (batch,) = answer(runtime, params, make_source("scenes", "held_out", seed=3, size=8), 8, sampler)
    r, whole = batch.rollout, np.arange(48) + 1 < batch.rollout.length_B[:, None]
    written = ((r.ids_BxR == token) & whole).sum(1)
    assert written.any()
    np.testing.assert_array_equal(r.inserted_B, np.minimum(written, 1))
    reattention, inputs = runtime.reattention(), (batch.vision, batch.prompts, r.ids_BxR)
    scored, _ = response_logprobs(
        runtime.model, params, *inputs, runtime.logit_bias_V, 1.0, reattention, r.length_B, r.selected_BxExX
    )
    inside = np.arange(48) < r.length_B[:, None]
    np.testing.assert_allclose(np.asarray(scored)[inside], r.logp_BxR[inside], atol=1e-4)


@pytest.mark.parametrize(
    ("trigger", "message"), [("look again", "2 token"), ("<|im_end|>", "1 token"), ("", "0 token")]
)
def test_a_trigger_that_is_none_is_refused(trigger, message):
    options = dataclasses.replace(COPY, trigger=trigger)
    with pytest.raises(ValueError, match=f"reattention.trigger: {trigger!r} is {message}".replace("|", r"\|")):
        build(InferenceConfig(reattention=options))


def test_vision_only_closes_reflections_alone():
    options = RunOptions(reattention=ReattentionOptions(mode="vision_only", trigger="<CAPTION>"))
    with pytest.raises(ConfigError, match="reattention.trigger: got '<CAPTION>', but vision_only closes <REFLECTION>"):
        from_config_dict(to_dict(options))
