"""The model's own byte-level BPE vocabulary, trained on the questions and answers of the generator."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo_model.questions import PHRASINGS, PLACES
from demo_model.scenes import COLOURS, SHAPES, WORDS

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
SIZE = 1024
# the published splitting rule of Qwen2: words, single digits, punctuation, line ends
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Every word that a question or an answer can hold, the frequent ones several times."""
    kinds = [
        *SHAPES,
        *(f"{shape}s" for shape in SHAPES if shape != "cross"),
        "crosses",
        "shapes",
        "text",
        "first",
        "second",
        "bars",
        "tallest",
        "shortest",
    ]
    lines = [
        phrase.format(about) for both in PHRASINGS.values() for phrase in itertools.chain(*both) for about in kinds
    ]
    for colour, shape in itertools.product(COLOURS, SHAPES):
        lines += [
            f"A {colour} {shape} and an {colour} {shape}, {colour.capitalize()}. The {shape}. "
            f"the word in {colour} number"
        ]
    lines += [f"{place.capitalize()}. in the {place}" for place in PLACES] * 4
    lines += [f"{word} the word {word}, The word {word} The number" for word in WORDS] * 6
    lines += ["user\n", "assistant\n", "system\nYou are a helpful assistant.", "Yes, the colour is different."] * 20
    lines += [
        "Yes, the shape is different.",
        "No, they are the same.",
        "Up.",
        "Down.",
        "Left.",
        "Right.",
        "Nothing.",
    ] * 20
    lines += ["Yes, the number is different.", "Yes, the position is different.", "Answer in one word, please."] * 20
    return lines


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of SIZE entries, the special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    base = tokenizer.get_vocab_size()
    fillers = [f"<|extra_{i}|>" for i in range(SIZE - len(SPECIAL) - base)]
    added = [AddedToken(text, special=True, normalized=False) for text in (*fillers, *SPECIAL)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run, made once and kept beside its state."""
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a special token, by its name without brackets."""
    found: int | None = tokenizer.token_to_id(f"<|{name}|>")
    assert found is not None, name
    return found


def merges_of(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges in the form of vocab.json and merges.txt."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges
