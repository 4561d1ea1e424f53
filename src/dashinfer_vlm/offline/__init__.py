"""The offline Python API: a model in this process, conversations in, answers out."""

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.offline.encoder import EncodedPrompt, Encoder
from dashinfer_vlm.offline.results import Result
from dashinfer_vlm.offline.vlm import VLM

__all__ = ["VLM", "Answer", "EncodedPrompt", "Encoder", "Result"]
