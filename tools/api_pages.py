#!/usr/bin/env python3
"""Write docs/api/*.md, the reference of the Python APIs, from the docstrings of the source; imports nothing of it.

    api_pages.py [--check]

With --check nothing is written; the exit code is 1 when a page is not what the source says.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
TARGET = ROOT / "docs" / "api"

PAGES = {
    "python.md": (
        "The Python API",
        "`from dashinfer_vlm import VLM, SamplingParams, GenerationParams, Grammar`; the rest comes from the module it is "  # noqa: E501
        "listed under.",
        (
            ("dashinfer_vlm/offline/vlm.py", ("VLM",)),
            ("dashinfer_vlm/offline/results.py", ("Result",)),
            ("dashinfer_vlm/frontend/answers.py", ("Answer",)),
            ("dashinfer_vlm/request.py", ("SamplingParams", "Grammar", "TokenLogprob")),
            ("dashinfer_vlm/frontend/params.py", ("GenerationParams",)),
            ("dashinfer_vlm/frontend/deltas.py", ("Delta", "Usage")),
            ("dashinfer_vlm/offline/inputs.py", ("ImageLike", "VideoLike", "Conversation", "Prompt")),
            ("dashinfer_vlm/offline/vectors.py", ("Vectors",)),
            ("dashinfer_vlm/offline/scores.py", ("Side", "Scores")),
            ("dashinfer_vlm/offline/encoder.py", ("Encoder", "EncodedPrompt")),
        ),
    ),
    "allspark.md": (
        "The allspark API",
        "`import allspark`, or `from dashinfer import allspark`: the documented DashInfer API over the same engine.",
        (
            ("allspark/engine.py", ("Engine", "RequestHandle")),
            ("allspark/engine_stat.py", ("AsEngineStat",)),
            ("allspark/status.py", ("AsStatus",)),
            (
                "allspark/runtime_config.py",
                ("AsModelRuntimeConfigBuilder", "AsModelConfig", "TargetDevice", "AsCacheMode"),
            ),
            ("allspark/generation_config.py", ("ASGenerationConfigBuilder",)),
            ("allspark/multimedia.py", ("MultiMediaInfo",)),
            ("allspark/result_queue.py", ("ResultQueue", "GeneratedElements", "GenerateRequestStatus")),
            ("allspark/model_loader.py", ("HuggingFaceModel", "ModelSerializerException")),
            ("allspark/prompt_utils.py", ("PromptTemplate",)),
        ),
    ),
}


def page(title: str, preamble: str, modules: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """One page, in the order in which names are listed."""
    blocks = [f"# {title}", "Made from the docstrings by `make docs`.", preamble]
    for path, names in modules:
        body = ast.parse((SOURCE / path).read_text(encoding="utf-8")).body
        found = {name: (node, doc) for name, node, doc in definitions(body)}
        module = path.removesuffix(".py").replace("/", ".")
        for name in names:
            node, doc = found[name]
            blocks += (
                class_blocks(node, module) if isinstance(node, ast.ClassDef) else value_blocks(name, node, doc, module)
            )
    return "\n\n".join(blocks) + "\n"


def definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt, str]]:
    """Every named thing of a body with its docstring; for an assignment, the string that follows it."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name, node, ast.get_docstring(node) or ""
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield name, node, following_string(following)


def following_string(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return inspect.cleandoc(text)
    return ""


def class_blocks(node: ast.ClassDef, module: str) -> list[str]:
    members = [member for member in definitions(node.body) if is_public(member[0])]
    init = next((n for name, n, _ in definitions(node.body) if name == "__init__"), None)
    heading = f"## `{node.name}{signature(init) if isinstance(init, ast.FunctionDef) else ''}`"
    blocks = [heading, f"`{module}`", ast.get_docstring(node) or ""]
    if isinstance(init, ast.FunctionDef) and (doc := ast.get_docstring(init)):
        blocks.append(doc)
    fields = [(name, n, doc) for name, n, doc in members if isinstance(n, ast.AnnAssign | ast.Assign)]
    if fields and not is_class_variable(fields[0][1]):
        blocks.append(field_list(fields))
    for _, member, doc in members:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not has_decorator(member, "overload"):
            blocks += [f"### `{method_heading(member)}`", doc]
    return [block for block in blocks if block]


def value_blocks(name: str, node: ast.stmt, doc: str, module: str) -> list[str]:
    assert isinstance(node, ast.AnnAssign | ast.Assign), name
    assert node.value is not None, name
    text = node.value.value if isinstance(node.value, ast.Constant) else ast.unparse(node.value)
    return [f"## `{name}`", f"`{module}`", f"`{text}`", doc]


def is_public(name: str) -> bool:
    return not name.startswith("_")


def is_class_variable(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation)


def has_decorator(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    return any(ast.unparse(decorator) == name for decorator in node.decorator_list)


def method_heading(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if has_decorator(node, "property"):
        return f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix}{node.name}{signature(node)}{returns}"


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameters without `self`."""
    text = ast.unparse(node.args)
    return f"({text.removeprefix('self').removeprefix(', ')})"


def field_list(fields: list[tuple[str, ast.stmt, str]]) -> str:
    lines = []
    for _, node, doc in fields:
        told = ast.unparse(node).replace("\n", " ")
        lines.append(f"- `{told}`" + (f": {' '.join(doc.split())}" if doc else ""))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    TARGET.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, content in PAGES.items():
        path, text = TARGET / name, page(*content)
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(path.relative_to(ROOT))
        elif not check:
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} is not what the source says; run make docs", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
