"""The documented examples run as they are printed, but for paths and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import allspark
from allspark import AsStatus, GenerateRequestStatus
from tests.allspark.conftest import HIDDEN, NAME, Ask

MULTIMEDIA = """
import torch
import os
import allspark

# Load multimedia content (e.g., embeddings)
model_path = "path/to/model"

# image embedding just for example.
m1 = torch.load(os.path.join(model_path, "emb.pt")).cpu().float()
dl_list = []
dl_list.append(torch.utils.dlpack.to_dlpack(m1))

# Create a MultiMediaInfo instance
as_extra_embedding_info_0 = allspark.MultiMediaInfo()

# Add the multimedia content
as_extra_embedding_info_0.add_multimedia_content("151859", dl_list)

# Include the MultiMediaInfo instance in the generation config

gen_cfg_builder = ASGenerationConfigBuilder()
config = (gen_cfg_builder.do_sample()
      .max_length(512)
      .temperature(0.7)
      .top_k(50)
      .update({"mm_info": as_extra_embedding_info_0})
      .build())
"""

QUICK_START = """
import os

from dashinfer import allspark
from dashinfer.allspark import *
from dashinfer.allspark.engine import *
from dashinfer.allspark.prompt_utils import PromptTemplate

in_memory = False
device_list = [0]
model_name = "qwen/Qwen2-VL-2B-Instruct"
output_base_folder = "model_output"
user_data_type = "float32"
model_local_path = model_name

safe_model_name = model_name.replace("/", "_")

# Initialize model and engine
model_loader = allspark.HuggingFaceModel(model_local_path, safe_model_name,
                                         in_memory_serialize=in_memory,
                                         user_set_data_type=user_data_type)
engine = allspark.Engine()

# Load and serialize the model
model_loader.load_model().serialize(engine, model_output_dir=output_base_folder).free_model()

# Configure runtime settings
runtime_cfg = model_loader.create_reference_runtime_config_builder(
   safe_model_name, TargetDevice.CPU, device_list, max_batch=8).max_length(2048).build()
engine.install_model(runtime_cfg)
engine.start_model(safe_model_name)

if in_memory: model_loader.free_memory_serialize_file()

# Prepare input
input_str = "How to protect our planet and build a green future?"
messages = [
   {"role": "system", "content": "You are a helpful assistant."},
   {"role": "user", "content": PromptTemplate.apply_chatml_template(input_str)}
]
templated_input_str = model_loader.init_tokenizer().get_tokenizer().apply_chat_template(
   messages, tokenize=False, add_generation_prompt=True)

# Configure generation settings
gen_cfg = model_loader.create_reference_generation_config_builder(runtime_cfg)
gen_cfg.update({"top_k": 1, "max_length": 150})

# Generate response
status, handle, queue = engine.start_request_text(
   safe_model_name, model_loader, templated_input_str, gen_cfg)
generated_ids = []

while True:
   elements = queue.Get()
   if elements:
      generated_ids += elements.ids_from_generate
   status = queue.GenerateStatus()
   if status in [GenerateRequestStatus.GenerateFinished,
                 GenerateRequestStatus.GenerateInterrupted]:
      break

# Decode and print output
output_text = model_loader.init_tokenizer().get_tokenizer().decode(generated_ids)

# Clean up
engine.release_request(safe_model_name, handle)
engine.stop_model(safe_model_name)
"""


def test_the_multimedia_example_runs_as_printed(tmp_path: Path, engine: allspark.Engine) -> None:
    torch.save(torch.randn(4, HIDDEN), tmp_path / "emb.pt")
    names: dict[str, Any] = {}
    exec("from allspark import *", names)  # the page builds upon one that begins so
    exec(MULTIMEDIA.replace("path/to/model", str(tmp_path)), names)
    ids = torch.tensor([[11, *[151859] * 4, 12, 13]])
    inputs = {"input_ids": to_dlpack(ids)}
    status, handle, queue = engine.start_request(NAME, inputs, names["config"])
    assert status == AsStatus.ALLSPARK_SUCCESS
    assert queue is not None
    generated: list[int] = []
    while queue.GenerateStatus() in (
        GenerateRequestStatus.Init,
        GenerateRequestStatus.ContextFinished,
        GenerateRequestStatus.Generating,
    ):
        elements = queue.Get()
        generated += elements.ids_from_generate if elements else []
        if len(generated) > 5:
            engine.stop_request(NAME, handle)  # type: ignore[arg-type]
    assert len(generated) == queue.GeneratedLength() > 5
    assert queue.GenerateStatus() == GenerateRequestStatus.GenerateInterrupted
    assert engine.release_request(NAME, handle) == AsStatus.ALLSPARK_SUCCESS  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_quick_start_runs_as_printed(in_memory: bool, folder: Path, tmp_path: Path, ask: Ask) -> None:
    code = (
        QUICK_START.replace("= model_name\n", f'= "{folder}"\n')
        .replace('"model_output"', f'"{tmp_path}"')
        .replace("in_memory = False", f"in_memory = {in_memory}")
    )
    names: dict[str, Any] = {}
    exec(code, names)
    prompt = names["model_loader"].get_tokenizer().encode(names["templated_input_str"])
    assert names["status"] == GenerateRequestStatus.GenerateFinished
    assert len(names["generated_ids"]) == 150 - len(prompt)
    expected = ask(prompt, {"temperature": 0.0}, max_length=150)
    assert names["generated_ids"] == expected.ids
    assert isinstance(names["output_text"], str)


def test_both_imports_give_the_same_classes() -> None:
    from dashinfer import allspark as other
    from dashinfer.allspark.engine import Engine
    from dashinfer.allspark.model_loader import HuggingFaceModel
    from dashinfer.allspark.runtime_config import AsModelRuntimeConfigBuilder

    assert other.Engine is allspark.Engine is Engine
    assert HuggingFaceModel is allspark.HuggingFaceModel
    assert AsModelRuntimeConfigBuilder is allspark.AsModelRuntimeConfigBuilder
    assert other.__all__ == allspark.__all__
