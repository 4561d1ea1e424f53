"""The documented examples, word for word but for the hosts, and the README's."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.conftest import ROOT
from tests.e2e.conftest import MODEL, picture
from tests.e2e.serving import Server

EXAMPLES = Path(__file__).parent / "examples"
TIMEOUT_S = 120.0
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def relocated(text: str, server: Server, pictures: str) -> str:
    """`text` with the documented hosts replaced by those of this test."""
    text = re.sub(r"https://farm\d\.staticflickr\.com", pictures, text)
    return text.replace("http://localhost:8000", server.address)


def loaded(text: str, folder: Path) -> str:
    """`text` with the documented model replaced by a tiny one, where it is loaded and not asked for."""
    return text.replace(f'VLM("{MODEL}")', f'VLM("{folder}")')


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@needs_curl
def test_the_documented_curl_command_describes_an_image(server: Server, pictures: str, tmp_path: Path) -> None:
    answer = json.loads(run(["bash", "-c", relocated((EXAMPLES / "curl.sh").read_text(), server, pictures)], tmp_path))
    choice = answer["choices"][0]
    assert answer["model"] == MODEL
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 1024


def test_the_documented_client_compares_two_images(server: Server, pictures: str, tmp_path: Path) -> None:
    program = relocated((EXAMPLES / "client.py.txt").read_text(), server, pictures)
    answer = json.loads(run([sys.executable, "-c", f"{program}\nprint(response.model_dump_json())"], tmp_path))
    assert answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


@needs_curl
def test_the_curl_command_of_the_readme_answers(server: Server, pictures: str, tmp_path: Path) -> None:
    (command,) = (block for block in readme("bash") if block.startswith("curl"))
    answer = json.loads(run(["bash", "-c", relocated(command, server, pictures)], tmp_path))
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("number", range(len(readme("python"))))
def test_a_python_program_of_the_readme_prints_an_answer(
    server: Server, pictures: str, model_folder: Path, tmp_path: Path, number: int
) -> None:
    (tmp_path / "picture.png").write_bytes(picture("red", "PNG"))
    program = loaded(relocated(readme("python")[number], server, pictures), model_folder)
    assert run([sys.executable, "-c", program], tmp_path)


def test_the_server_of_the_first_command_sees_what_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text().partition("### What the bundled model sees")[2]
    (shown,) = re.findall(r"!\[[^\]]*\]\((docs/images/\S+)\)", text)
    answers = dict(re.findall(r"^(\S[^\n]*[.?]) {2,}(\S[^\n]*)$", text, re.MULTILINE))
    assert answers
    server = Server("--port", "0", "--kv-cache-gib", "0.05")
    try:
        client = openai.OpenAI(base_url=f"{server.wait_ready()}/v1", api_key="EMPTY", max_retries=0)
        data = base64.b64encode((ROOT / shown).read_bytes()).decode()
        for question, answer in answers.items():
            content: list[openai.types.chat.ChatCompletionContentPartParam] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": question},
            ]
            reply = client.chat.completions.create(model="model", messages=[{"role": "user", "content": content}])
            assert reply.choices[0].message.content == answer
    finally:
        server.kill()


def test_the_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for block in readme("bash") for target in re.findall(r"^make (\S+)", block, re.MULTILINE)}
    assert targets >= {"serve", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_two_clients_at_once_get_what_each_gets_alone(server: Server, pictures: str) -> None:
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="EMPTY", max_retries=0)

    def ask(path: str) -> str | None:
        answer = client.chat.completions.create(
            model="model",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": pictures + path}},
                        {"type": "text", "text": "Describe the image."},
                    ],
                }
            ],
            max_completion_tokens=24,
            temperature=0,
        )
        return answer.choices[0].message.content

    paths = ["/3075/3168662394_7d7103de7d_z_d.jpg", "/1533/26541536141_41abe98db3_z_d.jpg"]
    alone = [ask(path) for path in paths]
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(ask, paths)) == alone


def test_a_broken_picture_is_answered_422_with_its_place(server: Server, pictures: str) -> None:
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="EMPTY", max_retries=0)
    content: list[openai.types.chat.ChatCompletionContentPartParam] = [
        {"type": "text", "text": "Describe the image."},
        {"type": "image_url", "image_url": {"url": f"{pictures}/broken.jpg"}},
    ]
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": content}])
    assert isinstance(error.value.body, dict)
    assert error.value.body["param"] == "messages[0].content[1].image_url.url"
    assert "truncated" in error.value.body["message"]
