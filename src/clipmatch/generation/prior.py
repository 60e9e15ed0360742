"""The prior: an embedding -> the codes of a picture, painted in a dozen steps by a masked-token transformer.

In: unit rows [n, d] of the guide (of sentences or of pictures), a seed. Out: numbers of codes [n, t] of the VQGAN that
it was trained on. Knows nothing of pixels, words or training. The method is MaskGIT's (Chang et al., CVPR 2022), with
classifier-free guidance as in Muse (Chang et al., ICML 2023).

Convolutions look at neighbouring tokens, the transformer at the whole picture, a square of 2 x 2 tokens to a place: a
quarter of the places, and of the time. Both know what the codes mean to the VQGAN, so that codes which look alike need
not be learnt one by one. The embedding shifts and scales what each layer normalises (Peebles and Xie, DiT, ICCV 2023).

Letters: n pictures, t = y * y tokens of a picture, k codes of c numbers, d embedding width, w the transformer's width,
v that of the convolutions, l places (t / 4).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipmatch.config import from_json, require, to_json
from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import CONFIG, WEIGHTS, fingerprint_of, write_json
from clipmatch.trust import check_folder

KIND = "clipmatch prior"  # in a folder's config.json
SQUARE = 2  # side of the squares of tokens that share a place in the transformer


@dataclass(frozen=True)
class PriorConfig:
    """The architecture, and whose embeddings and codes it knows (fingerprints, for errors that say so)."""

    tokens: int  # of a picture: a square number
    codes: int
    code_width: int
    embed_dim: int
    width: int = 192
    local_width: int = 64  # of the convolutions
    layers: int = 6
    heads: int = 6
    guide: str = ""
    vqgan: str = ""

    def __post_init__(self) -> None:
        require(self.side**2 == self.tokens, "tokens must be a square number", self.tokens)
        require(self.side % SQUARE == 0, "a side of the pictures must be an even number of codes", self.side)
        require(self.width % self.heads == 0, "width must be a multiple of heads", self.width)

    @property
    def side(self) -> int:
        """Tokens along a side: y."""
        return math.isqrt(self.tokens)


class Prior(nn.Module):
    """A bidirectional transformer over the codes, those that are not painted yet masked, steered by an embedding.

    book: the VQGAN's codes [k, c]; not given for weights that are loaded, which have them.
    """

    book: Tensor
    fingerprint: str = ""  # of the weights, where they were loaded

    def __init__(self, config: PriorConfig, book: Tensor | None = None):
        super().__init__()
        self.config = config
        width, local, side = config.width, config.local_width, config.side // SQUARE
        self.mask = config.codes  # the number of the mask token
        book = torch.zeros(config.codes, config.code_width) if book is None else (book - book.mean(0)) / book.std()
        self.register_buffer("book", book)
        self.token, self.meaning = nn.Embedding(config.codes + 1, local), nn.Linear(config.code_width, local)
        self.before = nn.ModuleList(Neighbours(local, width) for _ in range(2))
        self.gather = nn.Conv2d(local, width, SQUARE, SQUARE)
        self.row, self.column = (nn.Parameter(torch.randn(side, width) * 0.02) for _ in range(2))
        self.condition = nn.Sequential(
            nn.Linear(config.embed_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.nothing = nn.Parameter(torch.zeros(config.embed_dim))  # the embedding of no prompt
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.spread = nn.ConvTranspose2d(width, local, SQUARE, SQUARE)
        self.after = nn.ModuleList(Neighbours(local, width) for _ in range(2))
        self.closing = nn.LayerNorm(local)
        self.head, self.likeness = nn.Linear(local, config.codes), nn.Linear(local, config.code_width)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Numbers of codes [n, t], some of them `mask`, and rows [n, d] -> logits [n, t, k]."""
        scale = self.config.embed_dim**0.5  # a unit row has small numbers
        asked = self.condition(embeddings * scale)  # [n, w]
        near = self.look_up(tokens)  # [n, v, y, y]
        for layer in self.before:
            near = layer(near, asked)
        places = (self.row[:, None] + self.column[None]).flatten(0, 1)  # [l, w]
        hidden = self.gather(near).flatten(2).transpose(1, 2) + places  # [n, l, w]
        for block in self.blocks:
            hidden = block(hidden, asked)
        grid = self.norm(hidden).transpose(1, 2).unflatten(2, (self.config.side // SQUARE, -1))  # [n, w, y / 2, y / 2]
        near = near + self.spread(grid)
        for layer in self.after:
            near = layer(near, asked)
        found = self.closing(near.flatten(2).transpose(1, 2))  # [n, t, v]
        logits: Tensor = self.head(found) + self.likeness(found) @ self.book.T  # [n, t, k]
        return logits

    def look_up(self, tokens: Tensor) -> Tensor:
        """Numbers of codes, some of them `mask` [n, t] -> [n, v, y, y]."""
        meaning = nn.functional.pad(self.meaning(self.book), (0, 0, 0, 1))  # [k + 1, v]; a mask means nothing
        vectors = (self.token.weight + meaning)[tokens]  # [n, t, v]
        grid: Tensor = vectors.transpose(1, 2).reshape(len(tokens), -1, self.config.side, self.config.side)
        return grid

    @torch.no_grad()
    def paint(
        self,
        embeddings: Tensor | None = None,
        steps: int = 12,
        guidance: float = 3.0,
        seed: int = 0,
        *,
        n: int = 1,
        temperature: float = 4.5,
    ) -> Tensor:
        """Unit rows [n, d] -> numbers of codes [n, t]; without rows, n pictures of anything.

        Each step keeps the most certain tokens, as many as a cosine says. guidance: how far the logits are pushed away
        from those of no prompt, growing over the steps as the masks go; 0: not at all. temperature: of the noise by
        which certainty is judged, falling to none; more is more varied and less exact. The seed decides the pictures:
        each draws from its own numbers, so it does not matter which others are painted along with it.
        """
        rows = self.nothing.expand(n, -1) if embeddings is None else embeddings.to(self.nothing)
        device, count = rows.device, self.config.tokens
        draws = [torch.Generator().manual_seed(seed + number) for number in range(len(rows))]
        tokens = torch.full((len(rows), count), self.mask, device=device)
        for step in range(steps):
            done = (step + 1) / steps
            logits = self.guided(tokens, rows, guidance * done if embeddings is not None else 0.0)  # [n, t, k]
            drawn = (logits + gumbel(logits.shape, draws).to(device)).argmax(dim=-1)  # a draw by their probabilities
            certain = logits.log_softmax(dim=-1).gather(2, drawn[:, :, None]).squeeze(2)  # [n, t]
            certain = certain + gumbel(certain.shape, draws).to(device) * temperature * (1 - done)
            known = tokens != self.mask
            drawn = torch.where(known, tokens, drawn)
            certain = certain.masked_fill(known, math.inf)
            left = int(count * math.cos(math.pi / 2 * done))
            tokens = drawn.scatter(1, certain.argsort(dim=1)[:, :left], self.mask)
        return tokens

    def guided(self, tokens: Tensor, rows: Tensor, guidance: float) -> Tensor:
        """Logits [n, t, k] for rows [n, d], pushed away from those of no prompt (Ho and Salimans 2022)."""
        if not guidance:
            return self(tokens, rows).float()  # type: ignore[no-any-return]
        both = self(tokens.repeat(2, 1), torch.cat([rows, self.nothing.expand_as(rows)])).float()
        with_prompt, without = both.chunk(2)
        pushed: Tensor = with_prompt + guidance * (with_prompt - without)
        return pushed


class Neighbours(nn.Module):
    """Two convolutions over neighbouring tokens, beside a residual; steered: width of what steers them."""

    def __init__(self, width: int, steered: int):
        super().__init__()
        self.norm, self.steer = nn.GroupNorm(1, width), steering(steered, 2 * width)
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, grid: Tensor, asked: Tensor) -> Tensor:
        """[n, v, y, y], [n, w] -> [n, v, y, y]."""
        shift, scale = self.steer(asked)[:, :, None, None].chunk(2, dim=1)
        found: Tensor = grid + self.layers(self.norm(grid) * (1 + scale) + shift)
        return found


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each after a norm and beside a residual, steered by the embedding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.steer = heads, steering(width, 6 * width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """[n, l, w], [n, w] -> [n, l, w]."""
        shift, scale, much, shift_out, scale_out, much_out = self.steer(asked)[:, None].chunk(6, dim=2)
        mixed = self.mix(self.norm_in(hidden) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1))
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # each [n, heads, l, w / heads]
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)  # [n, heads, l, l]
        hidden = hidden + (1 + much) * self.merge((weights @ value).transpose(1, 2).flatten(2))
        return hidden + (1 + much_out) * self.feed(self.norm_out(hidden) * (1 + scale_out) + shift_out)  # type: ignore[no-any-return]


def steering(width: int, numbers: int) -> nn.Linear:
    """A layer that begins as if there were no embedding."""
    layer = nn.Linear(width, numbers)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def gumbel(shape: torch.Size, draws: list[torch.Generator]) -> Tensor:
    """Standard Gumbel noise, each row of the first dimension from a generator of its own."""
    uniform = torch.stack([torch.rand(shape[1:], generator=generator) for generator in draws])
    return -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()


# Folders


def save_prior(prior: Prior, folder: str | Path) -> None:
    """Write config.json and the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in prior.state_dict().items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, {"format": KIND, "prior": to_json(prior.config)})


def load_prior(folder: str | Path) -> Prior:
    """A folder that `save_prior` wrote -> the prior, frozen, in eval mode. Raises ClipmatchError if it is none."""
    folder = Path(folder).expanduser()
    check_folder(folder)
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if values.get("format") != KIND:
            raise ClipmatchError(f"{folder} holds no prior; train one with: clipmatch train-prior")
        prior = Prior(from_json(PriorConfig, values["prior"]))
        prior.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ClipmatchError(
            f"{folder} holds no prior that can be read; train one with: clipmatch train-prior"
        ) from error
    prior.fingerprint = fingerprint_of([folder / WEIGHTS], None)
    return prior.eval().requires_grad_(False)
