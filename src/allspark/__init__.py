"""The documented DashInfer API: an engine with models, requests and queues, and embeddings in the prompt."""

from allspark.engine import AsEngineStat, Engine, RequestHandle
from allspark.generation_config import ASGenerationConfigBuilder
from allspark.model_loader import HuggingFaceModel, ModelSerializerException
from allspark.multimedia import MultiMediaInfo
from allspark.prompt_utils import PromptTemplate
from allspark.result_queue import GeneratedElements, GenerateRequestStatus, ResultQueue
from allspark.runtime_config import AsCacheMode, AsModelConfig, AsModelRuntimeConfigBuilder, TargetDevice
from allspark.status import AsStatus

__all__ = [
    "ASGenerationConfigBuilder",
    "AsCacheMode",
    "AsEngineStat",
    "AsModelConfig",
    "AsModelRuntimeConfigBuilder",
    "AsStatus",
    "Engine",
    "GenerateRequestStatus",
    "GeneratedElements",
    "HuggingFaceModel",
    "ModelSerializerException",
    "MultiMediaInfo",
    "PromptTemplate",
    "RequestHandle",
    "ResultQueue",
    "TargetDevice",
]
