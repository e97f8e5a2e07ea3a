"""The slow, obvious way: sequences written out in full, and a decoder in numpy whose attention matrices can be seen.

Nothing here shares code with what it checks, but for the rule of positions and the image's tokens themselves, which
are checked against transformers elsewhere.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from models import END, IMAGE, OPEN, START

from qwenla_jax.data.batching.mrope_positions import visual_positions


class Written(NamedTuple):
    """One row written out: prompt, response, and the images wherever they stand again.

    Attributes:
      ids_T, visual_T, pos_Tx3: as in `types.TokenBatch`.
      slot_R: where each response token stands.
      prompt: tokens of the prompt.
      shown: for each insertion the slots of its visual tokens.
    """

    ids_T: np.ndarray
    visual_T: np.ndarray
    pos_Tx3: np.ndarray
    slot_R: list[int]
    prompt: int
    shown: list[list[int]]


def write_out(prompts, grids, q, response, allowed, kept=None, delimiters=True) -> Written:
    """Question `q` with a response that may look `allowed` times; `kept[e]` are the visual tokens shown, None for all.

    Positions are those of the whole expansion; what is not kept is left out of it afterwards.
    """
    n = int(prompts.length_Q[q])
    own = [int(i) for i in prompts.visual_QxP[q, :n] if i >= 0]
    ids, visual = prompts.ids_QxP[q, :n].tolist(), prompts.visual_QxP[q, :n].tolist()
    left_out, slots, shown, used = set(), [], [], 0
    for number, token in enumerate(response):
        if token == OPEN and used < allowed and grids[q] and number + 1 < len(response):
            shown.append([])
            j = 0
            for r, c in grids[q]:
                ids, visual = ids + [START] * delimiters, visual + [-1] * delimiters
                for _ in range(r * c):
                    if kept is not None and j not in kept[used]:
                        left_out.add(len(ids))
                    else:
                        shown[-1].append(len(ids))
                    ids.append(IMAGE)
                    visual.append(own[j])
                    j += 1
                ids, visual = ids + [END] * delimiters, visual + [-1] * delimiters
            used += 1
        slots.append(len(ids))
        ids.append(int(token))
        visual.append(-1)
    pos, _ = visual_positions(ids, IMAGE, -1, grids[q] * (1 + used), 1)
    stay = [i for i in range(len(ids)) if i not in left_out]
    back = {i: at for at, i in enumerate(stay)}
    return Written(
        np.array(ids, np.int32)[stay],
        np.array(visual, np.int32)[stay],
        pos[stay],
        [back[s] for s in slots],
        n,
        [[back[s] for s in slots_] for slots_ in shown],
    )


def stack(rows: list[Written], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows padded on the right: ids [B, T], positions [B, T, 3], visual indexes [B, T]."""
    ids = np.zeros((len(rows), length), np.int32)
    visual = np.full((len(rows), length), -1, np.int32)
    pos = np.zeros((len(rows), length, 3), np.int32)
    for b, row in enumerate(rows):
        n = len(row.ids_T)
        ids[b, :n], visual[b, :n], pos[b, :n] = row.ids_T, row.visual_T, row.pos_Tx3
    return ids, pos, visual


def attention(params, cfg, visual_ZxD, row: Written) -> np.ndarray:
    """Attention of every layer and head over one row, float64 [L, N, T, T], by the textbook.

    With norms of queries and keys the model is a Qwen3-VL: features for DeepStack are behind the visual tokens.
    """
    p = {name: np.asarray(leaf, np.float64) for name, leaf in _flat(params["decoder"])}
    T, N, K, H = len(row.ids_T), cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    x = p["embed/embedding"][row.ids_T]
    visual_TxC = (row.visual_T >= 0)[:, None] * np.asarray(visual_ZxD, np.float64)[np.maximum(row.visual_T, 0)]
    visual_TxD, *features = np.split(visual_TxC, visual_TxC.shape[1] // cfg.hidden_size, axis=1)
    x = np.where((row.visual_T >= 0)[:, None], visual_TxD, x)
    frequency = cfg.rope_theta ** -(np.arange(0, H, 2) / H)
    qwen3 = "layers/attn/q_norm/scale" in p
    axes = [(n, a) for a, count in enumerate(cfg.mrope_section) for n in range(count)]
    axis = [a for _, a in (sorted(axes) if qwen3 else axes)]  # in turn, or in chunks
    angle = np.tile(row.pos_Tx3[:, axis] * frequency, 2)[:, None]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.rms_norm_eps) * scale

    def turn(x):
        return x * np.cos(angle) + np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], -1) * np.sin(angle)

    result = []
    for layer in range(cfg.num_layers):
        w = {name.removeprefix("layers/"): leaf[layer] for name, leaf in p.items() if name.startswith("layers/")}
        h = norm(x, w["input_norm/scale"])
        heads = {"q": N, "k": K, "v": K}
        bias = lambda n, w=w: 0 if qwen3 else w[f"attn/{n}/bias"]  # noqa: E731
        q, k, v = ((h @ w[f"attn/{n}/kernel"] + bias(n)).reshape(T, heads[n], H) for n in "qkv")
        if qwen3:
            q, k = norm(q, w["attn/q_norm/scale"]), norm(k, w["attn/k_norm/scale"])
        q, k, v = turn(q), np.repeat(turn(k), N // K, 1), np.repeat(v, N // K, 1)
        s = np.einsum("tnh,snh->nts", q, k) / math.sqrt(H)
        s = np.where(np.tril(np.ones((T, T), bool)), s, -np.inf)
        a = np.exp(s - s.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        result.append(a)
        x = x + np.einsum("nts,snh->tnh", a, v).reshape(T, N * H) @ w["attn/o/kernel"]
        h = norm(x, w["post_norm/scale"])
        g = h @ w["mlp/gate/kernel"]
        x = x + (g / (1 + np.exp(-g)) * (h @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]
        x = x + (features[layer] if layer < len(features) else 0)
    return np.stack(result)


def share_of(share: float, tokens: int) -> int:
    """ceil(share * tokens) in exact numbers; the share is the fraction that was meant."""
    return math.ceil(Fraction(share).limit_denominator(1000) * tokens)


def sample_token(params, cfg, visual_ZxD, prompts, grids, q, response, allowed, share) -> list[set[int]]:
    """ROUTE by its definition (paper, equation 5): what each insertion of a response keeps."""
    tags = [t for t, token in enumerate(response) if token == OPEN and t + 1 < len(response)]
    kept = []
    for t in tags[:allowed] if grids[q] else []:
        # One token more than what was generated: a tag in the last place would get no image.
        row = write_out(prompts, grids, q, list(response[:t]) + [0], allowed, kept)
        mean_TxT = attention(params, cfg, visual_ZxD, row).mean((0, 1))
        own = [i for i in range(row.prompt) if row.visual_T[i] >= 0]
        score_M = mean_TxT[row.slot_R[:-1]][:, own].sum(0)
        kept.append(set(np.argsort(-score_M, kind="stable")[: share_of(share, len(own))].tolist()))
    return kept


def _flat(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield "/".join((*path, name)), value
