"""Small models of tokens for the tests: what a scenario with losses needs of a model, and nothing else."""

import torch
from torch import nn
from torch.nn import functional as F

from clbench.models.weights import state_sha256


class Bigram(nn.Module):
    """One attention-free block: the next token from this one. Blocks are numbered, so that halves can be chosen."""

    def __init__(self, vocab: int, width: int, context: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab, width)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"norm": nn.LayerNorm(width), "attn_out": nn.Linear(width, width), "up": nn.Linear(width, width)})
                for _ in range(2)
            )
            self.head = nn.Linear(width, vocab, bias=False)
        self.identity = {"name": "bigram", "source": "none", "width": width, "depth": 0, "vocab": vocab, "context": context}
        self.identity["state_sha256"] = state_sha256(self.state_dict())

    def forward(self, tokens):
        """Logits: tokens [B, L] -> [B, L, V]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block["up"](block["attn_out"](block["norm"](x))))
        return self.head(x)

    def loss(self, tokens):
        """Nats: tokens [B, L + 1] -> [B, L]."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)

    @torch.no_grad()
    def sample(self, first, draws, temperature=1.0):
        """Texts: first tokens [B], uniform draws [B, L] -> [B, L + 1], as `Decoder.sample`."""
        written = [first]
        for draw in draws.unbind(1):
            edges = torch.softmax(self(written[-1][:, None])[:, 0].double() / temperature, -1).cumsum(-1)
            written.append((edges <= draw[:, None] * edges[:, -1:]).sum(-1).clamp(max=edges.shape[1] - 1))
        return torch.stack(written, 1)


def build_bigram(*, name: str = "bigram", vocab: int | None = None, width: int = 16, context: int | None = None, seed: int = 0):
    """The model of a configuration node."""
    return Bigram(vocab or 8, width, context or 8, seed)
