"""One config class per face. Flags, environment names and the docs are generated from the fields, so that each fact
is written once. Configs are immutable and never adjusted silently: `validate()` raises with the value and the limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from dashinfer_vlm.cores import parse_list
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.log_lines import LogFormat
from dashinfer_vlm.option import check_fields, flag, option

DeviceName = Literal["auto", "cuda", "cpu"]
DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
HubName = Literal["auto", "modelscope", "huggingface"]
VisionEngineName = Literal["native", "transformers", "onnxruntime", "tensorrt"]
KVCacheDTypeName = Literal["auto", "int8"]
QuantTypeName = Literal["none", "gptq", "gptq_weight_only", "a8w8", "a16w4", "a16w8", "fp8"]
VisionQuantTypeName = Literal["none", "a8w8", "a16w8"]
ScheduleName = Literal["latency", "balanced", "throughput"]
SpeculationName = Literal["ngram", "mtp"]

_MOST_SPECULATIVE = 32
"""Beyond this no guess is right often enough to pay."""

_MOST_THREADS = 1024
"""More than machines have cores; far more of them end the process without a word."""

_MAX_ITEMS = {"image": 128, "video": 16}
_METHODS: dict[str, SpeculationName] = {
    "ngram": "ngram",
    "mtp": "mtp",
    "qwen3_5_mtp": "mtp",
    "qwen3_next_mtp": "mtp",
}
"""Of speculation, by the names that vLLM has for them."""


def _check_redis_url(url: str) -> None:
    """The message leaves the URL out, since it may hold a password."""
    form = r"rediss?://([^@/?#]*@)?([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/\d+)?/?"
    if not re.fullmatch(form, url):
        raise ConfigError(
            "--vision-cache is not the address of a Redis server; write redis://[user:password@]host[:port][/number]"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Speculative decoding; the keys of `--speculative-config` are those of vLLM."""

    method: SpeculationName = "ngram"
    """By prompt lookup, or by the model's own head (multi-token prediction)."""
    num_speculative_tokens: int
    """Tokens that a sequence may guess in one step, at most."""
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    """So many of the newest tokens must have occurred before; of several places, the one that shares most of them, up
    to `prompt_lookup_max`, is taken."""

    @classmethod
    def parse(cls, settings: Mapping[str, str | int]) -> Speculation:
        """Raises ConfigError with the key and its value."""
        name, counts = "--speculative-config", dict(settings)
        method = _METHODS.get(str(counts.pop("method", None)))
        if method is None:
            raise ConfigError(f"{name} has method {settings.get('method')}; this version supports ngram and mtp")
        keys = [item.name for item in fields(cls) if item.name != "method"]
        known = keys if method == "ngram" else ["num_speculative_tokens"]
        if unknown := counts.keys() - known:
            raise ConfigError(f"{name} has {sorted(unknown)[0]}; its keys with {method} are method, {', '.join(known)}")
        if "num_speculative_tokens" not in counts:
            raise ConfigError(f"{name} needs num_speculative_tokens, such as 4")
        for key, value in counts.items():
            if type(value) is not int or not 1 <= value <= _MOST_SPECULATIVE:
                raise ConfigError(f"{name} has {key} {value}; it must be a whole number from 1 to {_MOST_SPECULATIVE}")
        made = cls(method=method, **counts)  # type: ignore[arg-type]  # all are whole numbers now
        if made.prompt_lookup_min > made.prompt_lookup_max:
            raise ConfigError(
                f"{name} has prompt_lookup_min {made.prompt_lookup_min} above prompt_lookup_max "
                f"{made.prompt_lookup_max}"
            )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine is built from; see each field's help."""

    model: str = option("", "Model folder, ModelScope id or Hugging Face id; the bundled demo model when absent.")
    revision: str | None = option(None, "Branch, tag or commit of the model to download.")
    hub: HubName = option("auto", "Where a model id is looked up; auto asks ModelScope first, then Hugging Face.")
    lora: str | None = option(
        None, "Folder or id of a LoRA adapter (PEFT), merged into the model's weights while they are loaded."
    )
    device: DeviceName = option("auto", "Where the model runs; auto takes CUDA when there is a card.")
    dtype: DTypeName = option("bfloat16", "Type of stored weights; auto takes the checkpoint's.")
    quant_type: QuantTypeName = option(
        "none",
        "Quantise the text model's weights while they are loaded; a8w8 on processors, fp8 on cards.",
        only=("none", "a8w8", "a16w8", "a16w4", "fp8"),
    )
    quant_cache: str | None = option(
        None, "Folder that keeps quantised weights for the next start; one below the user's caches when absent."
    )
    quant_cache_gib: float = option(
        16.0, "Disk for quantised weights in GiB; what was used least recently goes first, 0 keeps none.", least=0
    )
    parallel_size: int = option(
        1, "Devices that share the text model (tensor parallel), a process each; each holds the whole encoder.", least=1
    )
    max_model_len: int | None = option(
        None,
        "Prompt plus output tokens of a request at most; the model's context when absent, 32000 at most.",
        aliases=("max-length",),
        least=1,
    )
    max_num_seqs: int = option(128, "Sequences that run at once.", aliases=("max-batch",), least=1)
    max_num_batched_tokens: int | None = option(
        None,
        "Tokens of one step: decode and prefill chunks together; 512 on processors and 2048 on cards when absent.",
        least=1,
    )
    schedule: ScheduleName = option(
        "balanced",
        "Who waits while prompts and images arrive beside streams: latency keeps the streams' gaps flat whoever waits, "
        "balanced lets a crowd catch up, throughput lets everybody catch up before streams go on.",
    )
    block_size: int = option(16, "Tokens in one page of the KV cache.", least=1)
    kv_cache_gib: float | None = option(
        None,
        "Memory for the KV cache in GiB; when absent, a share of what is free, on a card what the largest step leaves.",
        least=0.001,
    )
    kv_cache_dtype: KVCacheDTypeName = option(
        "auto", "Type of the KV cache; auto takes that of the weights, int8 holds almost twice the tokens."
    )
    prefix_cache: bool = option(True, "Reuse the KV of equal prompt beginnings.", aliases=("enable-prefix-cache",))
    speculative_config: dict[str, str | int] | None = option(
        None,
        "Guess several tokens of a step from what the text repeats, same answers, as JSON: "
        '{"method": "ngram", "num_speculative_tokens": 4}; or by the head that Qwen3.5 and Qwen3-Next have for it: '
        '{"method": "mtp", "num_speculative_tokens": 1}; off when absent.',
    )
    threads: int | None = option(
        None, "Compute threads on the CPU; one per core when absent.", least=1, most=_MOST_THREADS
    )
    cores: str | None = option(
        None,
        "Cores to pin compute threads to, one each, vision workers' included: 0-7, or auto for all; not pinned when "
        "absent.",
    )
    step_timeout_s: float = option(
        300.0, "Seconds that the engine may take for one step before it counts as stuck and is ended.", least=1
    )
    seed: int = option(0, "Seed of requests that bring none.", least=0)
    vision_engine: VisionEngineName = option(
        "native", "Who runs the vision encoder.", group="Vision", only=("native", "transformers")
    )
    vision_quant_type: VisionQuantTypeName = option(
        "none", "Quantise the vision encoder's weights while they are loaded.", group="Vision"
    )
    vision_cache_gib: float = option(
        0.5, "Memory for embeddings of images that were seen before, in GiB; 0 is off.", group="Vision", least=0
    )
    vision_cache: str | None = option(
        None,
        "Redis that machines share embeddings through: redis://host:6379/0, or rediss:// over TLS.",
        group="Vision",
        secret=True,
    )
    vision_cache_ttl_s: int = option(
        86400, "Seconds that an embedding stays there after it was written.", group="Vision", least=1
    )
    vision_workers: int = option(
        0, "Processes that run the vision encoder; 0 runs it in the engine's steps.", group="Vision", least=0
    )
    vision_device: str | None = option(
        None, "Where they run it: cpu, cuda or cuda:1; the engine's device when absent.", group="Vision"
    )
    vision_threads: int | None = option(
        None,
        "Compute threads of each of them on the CPU; they and the engine share the cores when absent.",
        group="Vision",
        least=1,
        most=_MOST_THREADS,
    )
    cluster: str | None = option(
        None,
        "Ray cluster whose machines run the vision workers: host:port of its head, or auto for the one of this "
        "machine.",
        group="Vision",
    )
    min_pixels: int | None = option(
        None,
        "Images are enlarged to at least this many pixels; the model's value when absent.",
        group="Vision",
        least=1,
    )
    max_pixels: int | None = option(
        None, "Images are reduced to at most this many pixels; the model's value when absent.", group="Vision", least=1
    )

    @property
    def speculation(self) -> Speculation | None:
        """What `speculative_config` says; raises ConfigError."""
        return None if self.speculative_config is None else Speculation.parse(self.speculative_config)

    @property
    def num_head_guesses(self) -> int:
        """Tokens that the model's own head is to guess; raises ConfigError."""
        speculation = self.speculation
        return 0 if speculation is None or speculation.method != "mtp" else speculation.num_speculative_tokens

    def validate(self) -> None:
        """Raise ConfigError for the first value that is out of range."""
        check_fields(self)
        if self.vision_engine == "transformers" and self.vision_quant_type != "none":
            raise ConfigError(
                f"--vision-quant-type is {self.vision_quant_type}, but --vision-engine transformers computes with "
                "whole weights; use native"
            )
        for name in ("vision_device", "vision_threads", "cluster"):
            if getattr(self, name) is not None and not self.vision_workers:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}, but nobody uses it; add --vision-workers 1")
        if self.cluster is not None and self.vision_device not in (None, "cpu", "cuda"):
            raise ConfigError(f"--vision-device is {self.vision_device}; in a cluster it must be cpu or cuda")
        if self.vision_device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.vision_device):
            raise ConfigError(f"--vision-device is {self.vision_device}; it must be cpu, cuda or cuda:N")
        if self.cores not in (None, "auto"):
            parse_list(self.cores)
        if self.vision_cache is not None:
            _check_redis_url(self.vision_cache)
        _ = self.speculation
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """Who may be fetched and how much an item may weigh."""

    allowed_media_domains: tuple[str, ...] = option(
        (), "Hosts that media may be fetched from, private ones too; any public host when absent.", group="Media"
    )
    allowed_local_media_path: str | None = option(
        None, "Folder that file:// URLs may read from; none when absent.", group="Media"
    )
    limit_mm_per_prompt: dict[str, int] | None = option(
        None,
        'Items of one prompt at most, as JSON: {"image": 16}; 128 images and 16 videos when absent.',
        group="Media",
    )
    max_image_mib: int = option(64, "Bytes of one image at most, in MiB.", group="Media", least=1)
    max_image_mpx: int = option(
        64, "Pixels of one image at most, in millions, before decoding.", group="Media", least=1
    )
    image_fetch_timeout_s: float = option(5.0, "Seconds to fetch one image.", group="Media", least=0.001)
    enable_mm_embeds: bool = option(
        False,
        "Take ready-made embeddings of images (image_embeds) in messages; who sends them decides what the model sees.",
        group="Media",
    )
    media_workers: int | None = option(
        None,
        "Processes that decode media; when absent one, beside a card half as many as there are cores, 8 at most.",
        group="Media",
        least=1,
    )
    media_cache_mib: int = option(
        256, "Memory for decoded media that may be sent again, in MiB; 0 is off.", group="Media", least=0
    )

    @property
    def max_items(self) -> dict[str, int]:
        """Items of each kind in one prompt at most; what the flag does not name keeps its default."""
        return {**_MAX_ITEMS, **(self.limit_mm_per_prompt or {})}

    def validate(self) -> None:
        """Raise ConfigError for the first value that is out of range."""
        check_fields(self)
        for kind, limit in (self.limit_mm_per_prompt or {}).items():
            if kind not in _MAX_ITEMS or limit < 0:
                kinds = " and ".join(_MAX_ITEMS)
                raise ConfigError(f"--limit-mm-per-prompt has {kind}: {limit}; kinds are {kinds}, from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the HTTP face is built from."""

    host: str = option("localhost", "Address to listen on.", group="Server")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", group="Server", least=0, most=65535)
    served_model_name: tuple[str, ...] = option((), "Names that clients may call the model by.", group="Server")
    chat_template: str | None = option(
        None, "File with a Jinja chat template; the model's own when absent.", group="Server"
    )
    api_keys: tuple[str, ...] = option(
        (),
        "Keys, comma separated; a client must send one of them.",
        aliases=("api-key",),
        group="Server",
        secret=True,
    )
    api_keys_file: str | None = option(
        None,
        "File with one key per line, or a JSON object of names, keys and limits; read again when it changes.",
        group="Server",
    )
    key_requests_per_minute: float | None = option(
        None, "Requests of one key in a minute; no limit when absent.", group="Server", least=0.001
    )
    key_tokens_per_minute: float | None = option(
        None, "Tokens of one key in a minute, prompts and answers; no limit when absent.", group="Server", least=0.001
    )
    key_max_concurrent: int | None = option(
        None, "Requests of one key at a time; no limit when absent.", group="Server", least=1
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins that browsers may call from; none when absent.", group="Server"
    )
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that they may use.", group="Server")
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that they may send.", group="Server")
    allow_credentials: bool = option(False, "Let browsers send credentials.", group="Server")
    ssl: bool = option(False, "Serve TLS with the files named by SSL_KEYFILE and SSL_CERTFILE.", group="Server")
    ssl_certfile: str | None = option(
        None, "Serve TLS with the certificate in this PEM file, which is read again when it changes.", group="Server"
    )
    ssl_keyfile: str | None = option(None, "PEM file with the certificate's private key.", group="Server")
    ui: bool = option(True, "Serve a page to try the model at /.", group="Server")
    docs: bool = option(True, "Serve the API's description at /openapi.json and /docs.", group="Server")
    files_path: str | None = option(
        None, "Folder for uploaded files and batches; /v1/files and /v1/batches are off when absent.", group="Server"
    )
    max_file_mib: int = option(512, "Bytes of one uploaded file at most, in MiB.", group="Server", least=1)
    files_gib: float = option(
        16.0, "Bytes of all files together, answers of batches included, in GiB.", group="Server", least=0.001
    )
    max_files: int = option(10_000, "Files, and batches, that are kept at most.", group="Server", least=1)
    files_days: float = option(
        30.0, "Days that a file, or a batch that has ended, is kept.", group="Server", least=0.001
    )
    batch_concurrency: int = option(
        16, "Requests of batches that run at once while nobody else asks; otherwise one.", group="Server", least=1
    )
    max_queued_requests: int = option(1024, "Requests that may wait; more are answered 429.", group="Server", least=0)
    max_queued_tokens: int = option(
        1 << 20, "Tokens of prompts that may wait together; more are answered 429.", group="Server", least=1
    )
    max_queued_visual_tokens: int = option(
        1 << 18, "Those of them that stand for pictures and videos.", group="Server", least=1
    )
    max_queued_encoder_s: float = option(
        1800.0,
        "Seconds that the vision encoder may be expected to need for what waits; more is answered 429.",
        group="Server",
        least=1,
    )
    max_body_mib: int = option(
        64,
        "Bytes of one request at most, in MiB; pictures in base64 are a third larger than their files.",
        group="Server",
        least=1,
    )
    responses_store: str | None = option(
        None, "SQLite file that keeps responses of /v1/responses; in memory when absent.", group="Server"
    )
    responses_store_mib: int = option(
        256,
        "Bytes of all responses that are kept, with what was sent for them, in MiB; 0 keeps none.",
        group="Server",
        least=0,
    )
    keep_alive_s: float = option(
        75.0, "Seconds that an idle connection is kept open for the next request.", group="Server", least=1
    )
    shutdown_timeout_s: float = option(
        10.0,
        "Seconds that running requests get to end after Ctrl-C.",
        aliases=("shutdown-timeout",),
        group="Server",
        least=0,
    )
    max_engine_restarts: int = option(
        3,
        "Times that an engine which has died is started again within 10 minutes; then the server ends with status 1.",
        group="Server",
        least=0,
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "How much is logged.", group="Server")
    log_format: LogFormat = option("text", "Lines of the log: text, or JSON objects.", group="Server")
    otlp_traces_endpoint: str | None = option(
        None,
        "Where OpenTelemetry traces of requests are sent, such as http://localhost:4317; nowhere when absent.",
        group="Server",
    )

    @property
    def has_keys(self) -> bool:
        """Whether clients must send one."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def validate(self) -> None:
        """Raise ConfigError for the first value that is out of range."""
        check_fields(self)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together; name both files")
        for name in ("key_requests_per_minute", "key_tokens_per_minute", "key_max_concurrent"):
            if getattr(self, name) is not None and not self.has_keys:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}, but there are no keys; add --api-keys-file")
