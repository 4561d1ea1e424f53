"""Configs refuse what they cannot honour, with the value and the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.errors import ConfigError


@pytest.mark.parametrize("face", [EngineConfig, MediaConfig, ServerConfig])
def test_defaults_are_valid(face: type[Any]) -> None:
    face().validate()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(max_num_seqs=0), "--max-num-seqs is 0; it must be at least 1"),
        (EngineConfig(kv_cache_gib=math.nan), "--kv-cache-gib is nan"),
        (EngineConfig(min_pixels=10, max_pixels=5), "--min-pixels 10 is above --max-pixels 5"),
        (EngineConfig(parallel_size=0), "--parallel-size is 0; it must be at least 1"),
        (
            EngineConfig(quant_type="gptq"),
            "--quant-type gptq is not offered yet; this version supports none or a8w8 or a16w8 or a16w4 or fp8",
        ),
        (
            EngineConfig(speculative_config={"method": "eagle", "num_speculative_tokens": 4}),
            "--speculative-config has method eagle; this version supports ngram and mtp",
        ),
        (EngineConfig(speculative_config={"method": "ngram"}), "--speculative-config needs num_speculative_tokens"),
        (
            EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 0}),
            "--speculative-config has num_speculative_tokens 0; it must be a whole number from 1 to 32",
        ),
        (
            EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 4, "model": "x"}),
            "--speculative-config has model; its keys with ngram are method, num_speculative_tokens, prompt_lookup_max",
        ),
        (
            EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1}),
            "--speculative-config has prompt_lookup_min 2 above prompt_lookup_max 1",
        ),
        (EngineConfig(vision_engine="tensorrt"), "--vision-engine tensorrt is not offered yet"),
        (MediaConfig(limit_mm_per_prompt={"smell": 1}), "--limit-mm-per-prompt has smell"),
        (MediaConfig(limit_mm_per_prompt={"image": -1}), "--limit-mm-per-prompt has image: -1"),
        (ServerConfig(ssl_certfile="a.pem"), "--ssl-certfile and --ssl-keyfile go together"),
        (ServerConfig(key_max_concurrent=2), "--key-max-concurrent is 2, but there are no keys; add --api-keys-file"),
        (
            ServerConfig(api_keys=("a",), key_tokens_per_minute=0.0),
            "--key-tokens-per-minute is 0.0; it must be at least",
        ),
        (ServerConfig(max_engine_restarts=-1), "--max-engine-restarts is -1; it must be at least 0"),
        (ServerConfig(port=70000), "--port is 70000; it must be at most 65535"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(
    config: EngineConfig | MediaConfig | ServerConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert message in str(error.value)


def test_more_threads_than_any_machine_has_are_refused() -> None:
    """The runtime of threads ends the whole process where it cannot make them."""
    for config in (EngineConfig(threads=100_000), EngineConfig(vision_workers=1, vision_threads=100_000)):
        with pytest.raises(ConfigError, match="threads is 100000; it must be at most 1024"):
            config.validate()
