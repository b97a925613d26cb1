"""Slow and obvious versions of what the package does fast. Nothing here is shared with it."""

import math

import numpy as np
from torch import Tensor, nn


def keys_seen(kind: str, q: int, text: int, grid: int, kernel: int) -> set[int]:
    """The slots that slot q may attend to, found by walking over the picture."""
    if q < text:
        return set(range(q + 1))
    row, column = divmod(q - text, grid)
    match kind:
        case "row":  # back along the raster to the cell right above
            cells = [(row, column - back) for back in range(grid + 1)]
        case "column":
            cells = [(above, column) for above in range(row + 1)]
        case "conv":
            half = kernel // 2
            around = range(-half, half + 1)
            cells = [(row + down, column + right) for down in around for right in around]
        case _:
            raise ValueError(kind)
    # A column off the left edge is the end of the row above, off the right edge the start of the row below.
    flat = {text + r * grid + c for r, c in cells}
    return set(range(text)) | {k for k in flat if text <= k <= q}


def kind_of_layer(layer: int, depth: int) -> str:
    """Layers are counted from 1: columns at 2, 6, 10, …; the last is convolutional."""
    if layer == depth:
        return "conv"
    return "column" if layer in range(2, depth, 4) else "row"


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: list[set[int]]) -> np.ndarray:
    """Softmax attention, one head and one query at a time; q, k, v: (heads, slots, channels)."""
    out = np.zeros_like(v)
    for head in range(q.shape[0]):
        for slot in range(q.shape[1]):
            scores = {
                s: math.exp(float(q[head, slot] @ k[head, s]) / math.sqrt(q.shape[2])) for s in seen[slot]
            }
            for s, score in scores.items():
                out[head, slot] += score / sum(scores.values()) * v[head, s]
    return out


class Prior:
    """The prior for one caption and one picture, in float64, from the weights' names alone."""

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, name: str, kind: str, x: np.ndarray) -> np.ndarray:
        c = self.config
        q, k, v = (
            part.reshape(len(x), c.heads, -1).transpose(1, 0, 2)
            for part in np.split(self.linear(f"{name}.qkv", x), 3, axis=1)
        )
        seen = [keys_seen(kind, slot, c.text_length, c.grid, c.kernel) for slot in range(len(x))]
        return self.linear(f"{name}.out", attend(q, k, v, seen).transpose(1, 0, 2).reshape(len(x), -1))

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        y = self.linear(f"{name}.up", x)
        return self.linear(f"{name}.down", y / (1 + np.exp(-1.702 * y)))

    def code(self, part: str, table: str, code: int) -> np.ndarray:
        """A code's row of a table, and what the MLP of code vectors adds to it where there is one."""
        w, row = self.weights, self.weights[table][code]
        if not self.config.code_channels:
            return row
        y = self.linear("code_vectors.up", w["code_vectors.vectors"][code])
        return row + w[f"code_vectors.{part}.weight"] @ (y / (1 + np.exp(-1.702 * y)))

    def inputs(self, tokens: list[int], codes: list[int]) -> np.ndarray:
        """What enters the first layer, slot by slot."""
        c, w = self.config, self.weights
        rows = []
        for slot in range(c.text_length):
            if slot == 0:
                entry = w["start_of_text"]
            elif tokens[slot - 1] == -1:
                entry = w["padding.weight"][slot]
            else:
                entry = w["text_tokens.weight"][tokens[slot - 1]]
            rows.append(entry + w["text_positions.weight"][slot])
        for cell in range(c.grid**2):
            before = codes[cell - 1]
            entry = (
                w["start_of_image"] if cell == 0 else self.code("embedding", "image_tokens.weight", before)
            )
            rows.append(entry + w["rows.weight"][cell // c.grid] + w["columns.weight"][cell % c.grid])
        return np.stack(rows)

    def logits(self, tokens: list[int], codes: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of every text slot over the text tokens, and of every image slot over the codes."""
        c = self.config
        x = self.inputs(tokens, codes)
        for layer in range(c.depth):
            kind, name = kind_of_layer(layer + 1, c.depth), f"layers.{layer}"
            x = x + self.attention(f"{name}.attention", kind, self.norm(f"{name}.attention_norm", x))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))
        x = self.norm("norm", x)
        head = np.stack([self.code("head", "image_head.weight", code) for code in range(c.image_vocab)])
        image = x[c.text_length :] @ head.T + self.weights["image_head.bias"]
        return self.linear("text_head", x[: c.text_length]), image

    def draw(
        self,
        tokens: list[int],
        uniform: list[float],
        temperature: float = 1.0,
        top_k: int | None = None,
        guidance: float = 1.0,
    ) -> list[int]:
        """A picture's codes without any cache: the whole sequence anew for every cell."""
        codes: list[int] = []
        for u in uniform:
            known = codes + [0] * (self.config.grid**2 - len(codes))
            captioned = self.logits(tokens, known)[1][len(codes)]
            bare = self.logits([-1] * len(tokens), known)[1][len(codes)]
            logits = guidance * captioned + (1 - guidance) * bare
            codes.append(pick(logits, u, temperature=temperature, top_k=top_k))
        return codes


def pick(
    logits: np.ndarray,
    u: float,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """The code in whose share of [0, 1) the number u falls."""
    if temperature == 0:
        return int(np.argmax(logits))
    p = {code: math.exp((x - max(logits)) / temperature) for code, x in enumerate(logits)}
    p = {code: share / sum(p.values()) for code, share in p.items()}
    likeliest = sorted(p, key=lambda code: -p[code])[: top_k or len(p)]
    total, kept = 0.0, set()
    for code in likeliest:
        if top_p is None or total < top_p * sum(p[c] for c in likeliest):
            kept.add(code)
        total += p[code]
    whole, reached = sum(p[code] for code in kept), 0.0
    for code in sorted(kept):
        reached += p[code] / whole
        if u < reached:
            return code
    return max(kept)


def cross_entropy(logits: np.ndarray, target: int) -> float:
    """−ln softmax(logits)[target]."""
    return math.log(sum(math.exp(x) for x in logits)) - float(logits[target])


def numbers(tensor: Tensor) -> list[int]:
    """A row of integers as Python has them."""
    return [int(value) for value in tensor]


def scales_of_the_paper(overflowed: list[bool]) -> list[float]:
    """One gradient scale after every update (M = 1), in logarithms; its first value is the start."""
    log2, last_division, seen = 13.0, -math.inf, [2.0**13]
    for update, bad in enumerate(overflowed):
        if not bad:
            log2 += 1 / 1000
        elif update - last_division >= 125:
            log2, last_division = log2 - 1 / 2, update
        log2 = max(7.0, min(24.0, log2))
        seen.append(2.0**log2)
    return seen
