"""Train only the new tokens: the lines marked with `# neq` are all that is added.

    python examples/new_tokens.py

A small language model, its head tied to its embedding, learns the characters of this very file.
Then its vocabulary gains one token, for the word `token`. Only the row of the new token is trained
from then on: its gradient is the only one that is computed for the table, the optimizer steps
nothing else, and the rows of the other tokens stay what they were, bit for bit, weight decay or
not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq_kernels as neq  # neq

CONTEXT = 8
WIDTH = 32
WORD = "token"


class Reader(nn.Module):
    """Predicts a token from the eight before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, WIDTH)
        self.mix = nn.Sequential(nn.Linear(CONTEXT * WIDTH, 128), nn.Tanh(), nn.Linear(128, WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.table(tokens).flatten(-2)))

    def grow(self) -> int:
        """Make room for one more token; returns it."""
        rows = self.table.weight.detach()
        table = torch.cat([rows, rows.mean(0, keepdim=True)])
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.head = nn.Linear(WIDTH, len(table), bias=False)
        self.head.weight = self.table.weight
        return len(rows)


def tokens_of(text: str, alphabet: str, word: int | None = None) -> list[int]:
    """Its characters, and the word as one token where it has one."""
    parts = [text] if word is None else text.split(WORD)
    spelt = [[alphabet.index(letter) for letter in part] for part in parts]
    tokens = spelt[0]
    for part in spelt[1:]:
        tokens += [word, *part]  # type: ignore[list-item]
    return tokens


def train(model: Reader, optimizer: torch.optim.Optimizer, text: list[int], epochs: int) -> float:
    """The loss of the last epoch."""
    windows = torch.tensor(text).unfold(0, CONTEXT + 1, 1)
    losses: Sequence[float] = []
    for _ in range(epochs):
        losses = []
        for batch in windows[torch.randperm(len(windows))].split(64):
            loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def loss_of(model: Reader, text: list[int], token: int) -> float:
    """Where the token is what comes next."""
    windows = torch.tensor(text).unfold(0, CONTEXT + 1, 1)
    windows = windows[windows[:, -1] == token]
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1]).item()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=positive, default=10, help="epochs before (10)")
    parser.add_argument("--epochs", type=positive, default=5, help="epochs of the new token (5)")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    text = Path(__file__).read_text()
    alphabet = "".join(sorted(set(text)))
    model = Reader(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = train(model, optimizer, tokens_of(text, alphabet), given.before)
    print(f"{len(alphabet)} characters: loss {loss:.3f}")

    new = model.grow()
    shortened = tokens_of(text, alphabet, new)
    rows = model.table.weight.detach().clone()
    print(f"the new token, untrained: loss {loss_of(model, shortened, new):.3f}")

    model.requires_grad_(False)
    model.table.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    neq.convert(model)  # neq
    model.table.channels.set([new])  # neq
    neq.attach(optimizer, model)  # neq

    train(model, optimizer, shortened, given.epochs)
    moved = (model.table.weight.detach() != rows).any(1).sum().item()
    print(f"the new token, trained: loss {loss_of(model, shortened, new):.3f}")
    print(f"{moved} of {len(rows)} rows moved")


if __name__ == "__main__":
    main()
