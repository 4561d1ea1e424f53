"""`VLM`: lists in, lists out; one face for scripts, notebooks and event loops; nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dashinfer_vlm
from dashinfer_vlm import VLM, GenerationParams, Grammar, SamplingParams, offline
from dashinfer_vlm.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    MediaError,
    MediaRefusedError,
)
from dashinfer_vlm.offline import Result
from dashinfer_vlm.offline.inputs import Conversation
from dashinfer_vlm.offline.options import configs
from dashinfer_vlm.shared_array import shared_root
from tests.conftest import CheckpointMaker
from tests.frontend.xml_template import QWEN3_5

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


def picture(seed: int = 0, size: tuple[int, int] = (60, 80)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def question(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def trace(result: Result) -> list[float]:
    """Log probabilities of the answer: a random model's tokens alone hardly depend on what it sees."""
    return [row.logprob for row in result.first.logprobs]


def test_one_conversation_gives_one_result(vlm: VLM) -> None:
    result = vlm.chat("Hello", GREEDY)
    assert len(result.token_ids) == 4
    assert result.first.finish_reason == "length"
    assert result.usage.num_prompt_tokens > 5
    assert result.usage.num_output_tokens == 4


def test_a_list_gives_a_list_in_the_order_of_the_questions(vlm: VLM) -> None:
    questions: list[Conversation] = [
        "One",
        question("Two ", picture()),
        [{"role": "system", "content": "Be brief"}, *question("Three")],
    ]
    together = vlm.chat(questions, GREEDY)
    for i, result in enumerate(together):
        assert trace(result) == pytest.approx(trace(vlm.chat(questions[i], GREEDY)), abs=1e-5)
    assert len({result.usage.num_prompt_tokens for result in together}) == 3
    nothing: list[Conversation] = []
    assert not vlm.chat(nothing, GREEDY)


def test_an_image_means_the_same_in_every_form(vlm: VLM, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "image.png")
    url = "data:image/png;base64," + base64.b64encode(encoded(image)).decode()
    forms = [
        image,
        np.asarray(image),
        tmp_path / "image.png",
        encoded(image),
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image.convert("RGBA"))},
        {"type": "image", "image": tmp_path / "image.png"},
        {"type": "image", "image": str(tmp_path / "image.png")},
        {"type": "image", "image": encoded(image)},
        {"type": "image", "image": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "image_url", "image_url": url},
    ]
    expected = vlm.chat(question(forms[0], "What?"), GREEDY)
    for result in vlm.chat([question(form, "What?") for form in forms], GREEDY):
        assert trace(result) == pytest.approx(trace(expected), abs=1e-5)
    other = vlm.chat(question(picture(1), "What?"), GREEDY)
    assert trace(other) != pytest.approx(trace(expected), abs=1e-5)


def test_a_video_may_be_frames_in_memory(vlm: VLM) -> None:
    frames = [picture(seed) for seed in range(4)]
    as_images = vlm.chat(question({"type": "video", "video": frames}, "What?"), GREEDY)
    as_array = vlm.chat(
        question({"type": "video", "video": np.stack([np.asarray(f) for f in frames])}, "What?"), GREEDY
    )
    assert trace(as_images) == pytest.approx(trace(as_array), abs=1e-5)


def test_pixel_limits_of_a_part_shrink_its_image(vlm: VLM) -> None:
    image = picture(size=(280, 280))
    whole = vlm.chat(question({"type": "image", "image": image}), GREEDY)
    small = vlm.chat(question({"type": "image", "image": image, "max_pixels": 4 * 28 * 28}), GREEDY)
    assert whole.usage.num_prompt_tokens - small.usage.num_prompt_tokens == 100 - 4


def test_each_prompt_can_have_its_own_params(vlm: VLM) -> None:
    lengths = [1, 3, 2]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    assert [len(r.token_ids) for r in vlm.chat(["a", "b", "c"], params)] == lengths
    with pytest.raises(InvalidRequestError, match="3 prompts and 2 params"):
        vlm.chat(["a", "b", "c"], params[:2])
    with pytest.raises(InvalidRequestError, match="one prompt"):
        vlm.chat("a", params)


def test_several_answers_and_stop_strings_come_from_generation_params(vlm: VLM) -> None:
    params = GenerationParams(sampling=SamplingParams(max_tokens=6, seed=5, ignore_eos=True), n=3)
    answers = vlm.chat("Hello", params).answers
    assert len({answer.token_ids for answer in answers}) == 3
    first = answers[0].text
    stopped = vlm.chat("Hello", GenerationParams(sampling=SamplingParams(max_tokens=6, seed=5), stop=(first[2:5],)))
    assert stopped.text == first[:2]
    assert stopped.first.finish_reason == "stop"


def test_without_params_the_checkpoint_decides(vlm: VLM, checkpoint: CheckpointMaker) -> None:
    assert vlm.default_params.temperature == vlm._service.sampling_defaults["temperature"]


def test_generate_continues_texts_and_ids_without_a_template(vlm: VLM) -> None:
    text, ids = vlm.generate(["the", [1820]], GREEDY)
    assert text.usage.num_prompt_tokens == ids.usage.num_prompt_tokens == 1
    assert vlm.generate([1, 2, 3], GREEDY).usage.num_prompt_tokens == 3
    assert vlm.generate("the", GREEDY).token_ids == text.token_ids


def test_what_is_wrong_with_one_conversation_is_raised(vlm: VLM) -> None:
    with pytest.raises(MediaError, match=r"messages\[0\]\.content\[1\].*No such file"):
        vlm.chat(question("What?", {"type": "image", "image": "/no/such/file.png"}), GREEDY)
    with pytest.raises(ContextLengthError, match="1024"):
        vlm.chat("word " * 3000, GREEDY)
    with pytest.raises(MediaRefusedError):
        vlm.chat(question({"type": "image_url", "image_url": "http://127.0.0.1:1/x.png"}), GREEDY)


def test_what_is_wrong_in_a_list_spares_the_others(vlm: VLM) -> None:
    good, broken, long = vlm.chat(["Hello", question({"type": "image", "image": b"no image"}), "word " * 3000], GREEDY)
    assert good.text
    assert isinstance(broken.error, MediaError)
    assert isinstance(long.error, ContextLengthError)
    with pytest.raises(MediaError):
        broken.text  # noqa: B018


def test_a_stream_makes_the_same_text_piece_by_piece(vlm: VLM) -> None:
    long = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    deltas = list(vlm.stream("Hello", long))
    assert len(deltas) >= 4, "a piece has 64 tokens at most, however slow its reader is"
    assert "".join(delta.text for delta in deltas) == vlm.chat("Hello", long).text
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_a_tool_that_must_be_called_is_called(vlm: VLM) -> None:
    schema = {"properties": {"is": {"enum": ["red", "blue"]}}, "required": ["is"], "additionalProperties": False}
    colour = {"type": "function", "function": {"name": "colour", "parameters": {"type": "object", **schema}}}
    params = SamplingParams(max_tokens=200, temperature=0)
    named = {"type": "function", "function": {"name": "colour"}}
    (call,) = vlm.chat("Which colour?", params, tools=[colour], tool_choice=named).first.tool_calls
    assert call.name == "colour"
    assert json.loads(call.arguments)["is"] in ("red", "blue")
    assert vlm.chat("Which colour?", params, tools=[colour], tool_choice="none").first.tool_calls == ()
    with pytest.raises(InvalidRequestError, match=r"tools\[0\] has type 'web_search'"):
        vlm.chat("Which colour?", params, tools=[{"type": "web_search"}])


def test_a_tool_is_called_in_xml_where_the_template_writes_it(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    thoughtless = QWEN3_5.replace("enable_thinking is defined and not enable_thinking", "true")
    (tmp_path / "template.jinja").write_text(thoughtless)
    name = {"type": "string", "maxLength": 3}
    properties = {"is": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}, "name": name}
    parameters = {"type": "object", "properties": properties, "required": ["is", "sure"]}
    colour = {"type": "function", "function": {"name": "colour", "parameters": parameters}}
    named = {"type": "function", "function": {"name": "colour"}}
    params = [SamplingParams(max_tokens=300, seed=seed) for seed in range(4)]
    with VLM(checkpoint("qwen2_vl"), chat_template=str(tmp_path / "template.jinja"), progress=False) as vlm:
        answers = [vlm.chat("Which colour?", one, tools=[colour], tool_choice=named).first for one in params]
    for answer in answers:
        (call,) = answer.tool_calls
        arguments = json.loads(call.arguments)
        assert (arguments["is"] in ("red", "blue"), type(arguments["sure"])) == (True, bool)


def test_leaving_a_stream_aborts_it(vlm: VLM) -> None:
    stream = vlm.stream("Hello", ENDLESS)
    next(stream)
    with contextlib.closing(stream):  # type: ignore[type-var]
        assert vlm._engine.read_stats().num_running == 1
    assert_idle(vlm)


async def test_event_loops_have_their_own_spelling(vlm: VLM) -> None:
    one, many = await asyncio.gather(vlm.achat("Hello", GREEDY), vlm.achat(["Hello", "You"], GREEDY))
    assert one.token_ids == many[0].token_ids
    generated = await vlm.agenerate(["the"], GREEDY)
    assert len(generated[0].token_ids) == 4
    async with aclosing(vlm.astream("Hello", GREEDY)) as stream:
        assert "".join([delta.text async for delta in stream]) == one.text


async def test_cancelling_an_asynchronous_call_aborts_it(vlm: VLM) -> None:
    call = asyncio.create_task(vlm.achat(["Hello", "You"], ENDLESS))
    while (await vlm._engine.stats()).num_running < 2:
        pass
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(assert_idle, vlm)


def test_threads_share_the_batches(vlm: VLM) -> None:
    results: list[Result] = []
    threads = [threading.Thread(target=lambda: results.append(vlm.chat("Hello", GREEDY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.token_ids for result in results}) == 1
    assert len(results) == 4


def test_a_list_shows_its_progress(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vlm, "_progress", True)
    vlm.chat(["a", "b", "c"], GREEDY)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "tokens/s" in shown


def test_unknown_options_and_wrong_values_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        VLM("somewhere", max_lenght=5)
    with pytest.raises(ConfigError, match="--block-size is 0"):
        VLM("somewhere", block_size=0)
    with pytest.raises(ConfigError, match="no such folder"):
        VLM("/no/such/folder")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "tpu"}, "--device is 'tpu': it must be one of auto, cuda, cpu"),
        ({"dtype": "foo"}, "--dtype is 'foo'"),
        ({"threads": "2"}, "--threads is '2': Expected `int"),
        ({"prefix_cache": "no"}, "--prefix-cache is 'no': Expected `bool`"),
        ({"allowed_media_domains": "example.org"}, "--allowed-media-domains is 'example.org': Expected `array`"),
        ({"limit_mm_per_prompt": {"image": "3"}}, "--limit-mm-per-prompt is"),
        ({"max_image_mib": None}, "--max-image-mib is None"),
    ],
)
def test_values_of_another_type_are_named(options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        VLM("/no/such/folder", **options)


def test_a_path_may_be_an_object(tmp_path: Path) -> None:
    _, media = configs({"allowed_local_media_path": tmp_path})
    assert media.allowed_local_media_path == str(tmp_path)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": 0}, "params is a dict; pass SamplingParams"),
        (SamplingParams(max_tokens="5"), r"Expected `int \| null`, got `str`"),  # type: ignore[arg-type]
        (SamplingParams(temperature="hot"), "Expected `float`"),  # type: ignore[arg-type]
        (SamplingParams(top_k=1.5), "Expected `int`, got `float`"),  # type: ignore[arg-type]
        (SamplingParams(grammar=Grammar("nonsense", "x")), "Invalid enum value 'nonsense'"),  # type: ignore[arg-type]
        (GenerationParams(stop="ab"), "Expected `array`, got `str`"),  # type: ignore[arg-type]
        (GenerationParams(n=np.int64(2)), "numpy.int64"),
    ],
)
def test_params_of_another_kind_are_refused(vlm: VLM, params: Any, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        vlm.chat("Hello", params)


@pytest.mark.parametrize("wrong", [None, 5, b"abc", np.array([1, 2])])
def test_what_is_neither_one_prompt_nor_a_list_is_refused(vlm: VLM, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"messages is a {type(wrong).__name__}"):
        vlm.chat(wrong)
    with pytest.raises(InvalidRequestError, match=f"prompts is a {type(wrong).__name__}"):
        vlm.generate(wrong)


def test_ids_may_be_numpys(vlm: VLM) -> None:
    assert vlm.generate(list(np.array([1, 2, 3])), GREEDY).token_ids == vlm.generate([1, 2, 3], GREEDY).token_ids
    with pytest.raises(InvalidRequestError, match="a text or a list of ids"):
        vlm.generate([1, "x"], GREEDY)  # type: ignore[list-item]
    wrong: Any = [[1.5]]
    assert isinstance(vlm.generate(wrong, GREEDY)[0].error, InvalidRequestError)


FORKED = """
import os, signal, sys
from dashinfer_vlm import VLM
vlm = VLM(sys.argv[1], dtype="float32", device="cpu", max_length=256, kv_cache_gib=0.05, progress=False)
if os.fork() == 0:
    signal.alarm(20)  # what waits forever
    try:
        vlm.chat("hello")
    except Exception as error:
        print(type(error).__name__, str(error)[:10], flush=True)
    sys.exit(3)
_, status = os.wait()
vlm.chat("hello")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_is_told_that_it_has_no_model_and_ends(checkpoint: CheckpointMaker) -> None:
    """With its hooks at the exit, which would close the other process's model."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, checkpoint()], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()[:2], done.stderr) == (3, ["EngineDeadError", "process"], "")


def test_a_folder_without_weights_leaves_no_thread_behind(tmp_path: Path, checkpoint: CheckpointMaker) -> None:
    threads = set(threading.enumerate())
    for path in checkpoint().glob("*.json"):
        shutil.copy(path, tmp_path)
    with pytest.raises(CheckpointError, match="safetensors"):
        VLM(tmp_path, device="cpu")
    assert set(threading.enumerate()) <= threads


def test_closing_frees_everything(checkpoint: CheckpointMaker) -> None:
    threads = set(threading.enumerate())
    folders = set(shared_root().glob("dashinfer-*"))
    others = children()
    with VLM(checkpoint(), dtype="float32", device="cpu", max_length=256, kv_cache_gib=0.05, progress=False) as vlm:
        vlm.chat(question({"type": "image", "image": encoded(picture())}), GREEDY)
        engine = vlm._engine._thread._args[0]  # type: ignore[attr-defined]
        model = weakref.ref(engine.model)
        del engine
    gc.collect()
    assert model() is None
    assert set(threading.enumerate()) <= threads
    assert set(shared_root().glob("dashinfer-*")) <= folders
    assert children() <= others
    with pytest.raises(EngineDeadError):
        vlm.chat("Hello")
    vlm.close()


NEVER_CLOSED = """
import sys
from PIL import Image
from dashinfer_vlm import VLM
vlm = VLM(sys.argv[1], dtype="float32", device="cpu", max_length=256, kv_cache_gib=0.05, progress=False)
picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
vlm.chat([{"role": "user", "content": [picture]}])
vlm.generate("hello")
"""


def test_a_script_that_never_closes_its_model_ends_without_a_word(checkpoint: CheckpointMaker) -> None:
    done = subprocess.run([sys.executable, "-c", NEVER_CLOSED, checkpoint()], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_its_names_are_listed() -> None:
    assert {*dashinfer_vlm.__all__} <= {*dir(dashinfer_vlm)}
    assert {*offline.__all__} <= {*dir(offline)}


def test_importing_the_package_is_cheap() -> None:
    code = "import dashinfer_vlm, sys; dashinfer_vlm.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def assert_idle(vlm: VLM) -> None:
    while vlm._engine.read_stats().num_running:
        pass
    while vlm._service.num_in_flight:
        pass


def children() -> set[str]:
    """Processes started by this one, the tests before included (a resource tracker stays until the end)."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found |= set((task / "children").read_text().split())
    return found
