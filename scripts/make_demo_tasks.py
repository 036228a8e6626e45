"""Two lm-eval tasks from a novel: the rest of a sentence among four, and a passage's last word.

    python scripts/make_demo_tasks.py --text lpserve/demo/heldout.txt --out lpserve/demo/tasks

`continuation.jsonl`: a context of some 50 words up to the middle of a sentence, its second half,
and second halves of three sentences of about its length from elsewhere in the text.
`last_word.jsonl`, as LAMBADA (Paperno et al. 2016, arXiv 1606.06031) has it: passages whose last
word has come before in them, so that it can be guessed from the context. No person has checked that
it can: the figures compare models with each other, they are not LAMBADA's. The same text and seed
give the same files.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np

CONTEXT_WORDS = 50
SENTENCE_WORDS = (10, 24)
CHOICES = 4
LEAST_LETTERS = 4


def sentences_of(text: str) -> list[str]:
    """Sentences of the text's running prose, in order."""
    paragraphs = [p for p in re.split(r"\n+", text) if len(p.split()) > 30]
    return [s.strip() for p in paragraphs for s in re.split(r"(?<=[.!?])\s+", p) if s.strip()]


def before(sentences: list[str], index: int) -> str:
    """The last `CONTEXT_WORDS` words before a sentence."""
    words: list[str] = []
    while index and len(words) < CONTEXT_WORDS:
        index -= 1
        words = sentences[index].split() + words
    return " ".join(words[-CONTEXT_WORDS:])


def halved(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def continuations(sentences: list[str], count: int, rng: np.random.Generator) -> list[dict]:
    """Documents with `context`, `choices` and `gold`."""
    low, high = SENTENCE_WORDS
    lengths = np.array([len(s.split()) for s in sentences])
    fitting = np.flatnonzero((lengths >= low) & (lengths <= high))
    documents = []
    for index in rng.permutation(fitting[fitting > 20])[:count].tolist():
        alike = fitting[
            (np.abs(lengths[fitting] - lengths[index]) <= 2) & (np.abs(fitting - index) > 20)
        ]
        halves = [halved(sentences[i]) for i in rng.choice(alike, CHOICES - 1, replace=False)]
        choices = [second for _, second in halves]
        first, second = halved(sentences[index])
        gold = int(rng.integers(CHOICES))
        choices.insert(gold, second)
        context = f"{before(sentences, index)} {first}"
        documents.append({"context": context, "choices": choices, "gold": gold})
    return documents


def last_words(sentences: list[str], count: int, rng: np.random.Generator) -> list[dict]:
    """Documents with `context` and `word`."""
    documents = []
    for index in rng.permutation(np.arange(20, len(sentences))).tolist():
        passage = f"{before(sentences, index)} {sentences[index]}"
        context, _, end = passage.rpartition(" ")
        word = re.sub(r"[^A-Za-z]+$", "", end)
        seen = {re.sub(r"[^a-z]", "", w.lower()) for w in context.split()}
        if word.isalpha() and len(word) >= LEAST_LETTERS and word.lower() in seen:
            documents.append({"context": context, "word": word})
        if len(documents) == count:
            break
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sentences = sentences_of(Path(arguments.text).read_text(encoding="utf-8"))
    folder = Path(arguments.out)
    for name, make in (("continuation", continuations), ("last_word", last_words)):
        documents = make(sentences, arguments.documents, np.random.default_rng(arguments.seed))
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(documents)} documents")


if __name__ == "__main__":
    main()
