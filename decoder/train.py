"""Trains the small decoder of the pages on the notes, character by character.

    make decoder    writes docs/assets/decoder-<hash>.pt and names it in the pages

The file holds what a page needs: the sizes for `DecoderLM(**sizes)`, the vocabulary,
the text, and the weights, rounded to float16. It is named after its own digest, as
`torch.hub.load_state_dict_from_url(..., check_hash=True)` wants it.
"""

import hashlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from snippets.kv_cache.cache import DecoderLM

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs/assets"
SIZES = {"dim": 48, "num_heads": 3, "num_layers": 3, "max_length": 256}
STEPS, BATCH, WINDOW, RATE = 600, 8, 128, 0.01


def read() -> tuple[str, str, Tensor]:
    """The text of the notes, its characters, and the text as their indices."""
    text = (ROOT / "notes.md").read_text(encoding="utf-8")
    vocabulary = "".join(sorted(set(text)))
    return text, vocabulary, torch.tensor([vocabulary.index(c) for c in text])


def train(steps: int = STEPS) -> dict:
    """What the file holds. Deterministic on one machine; the same loss on another."""
    text, vocabulary, ids = read()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), **SIZES}
    model = DecoderLM(**sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (BATCH, 1))
        windows = ids[starts + torch.arange(WINDOW + 1)]  # (B, T + 1)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    return {"sizes": sizes, "vocabulary": vocabulary, "text": text, "weights": weights}


def write(saved: dict, folder: Path) -> Path:
    """Writes the file, named after its digest."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    file = folder / f"decoder-{digest[:8]}.pt"
    file.write_bytes(buffer.getvalue())
    return file


def main() -> None:
    torch.set_num_threads(1)
    new = write(train(), ASSETS)
    for old in set(ASSETS.glob("decoder-*.pt")) - {new}:
        old.unlink()
        for page in (ROOT / "docs").rglob("*.md"):
            text = page.read_text(encoding="utf-8")
            if old.name in text:
                page.write_text(text.replace(old.name, new.name), encoding="utf-8")
    print(f"{new.name}: make outputs renews what the pages show")


if __name__ == "__main__":
    main()
