"""Responses in which images stand again, through transformers, which knows nothing of either COPY or ROUTE.

COPY is the image given once more in the prompt: transformers computes positions, visual tokens and logits of the
expanded prompt by itself. ROUTE is that sequence with some of the visual tokens left out: transformers takes embeddings
and position ids of what is kept, and its own attention weights say what that is. Gradients flow through both.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import plain
import torch

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.reinsertion import reinserted_images
from qwenla_jax.types import ReinsertedImages

CAP = 3  # insertions of a response


def ids_of(arch):
    """<REFLECTION> and </REFLECTION>: two ordinary tokens stand for them."""
    return arch.vocab - 5, arch.vocab - 6


class Ids(NamedTuple):
    """Ids of an image's tokens and of <REFLECTION>."""

    image: int
    start: int
    end: int
    tag: int

    @classmethod
    def of(cls, arch):
        return cls(arch.vocab - 1, arch.vocab - 3, arch.vocab - 4, ids_of(arch)[0])


def with_block(batch, arch, oracle):
    """The prompts with their images' blocks, padded by some slots."""
    blocks = []
    for q, grids in enumerate(oracle.cases[arch.case]):
        n = batch.length_Q[q]
        own = batch.prompts.visual_QxP[q, :n], batch.prompts.pos_QxPx3[q, :n]
        blocks.append(reinserted_images(*own, grids, ReattentionOptions()))
    Q, X = len(blocks), max(len(b.source_X) for b in blocks) + 3
    N = max(len(grids) for grids in oracle.cases[arch.case])
    block = ReinsertedImages(
        np.full((Q, X), -1, np.int32),
        np.zeros((Q, X, 3), np.int32),
        np.zeros((Q, X), np.int32),
        np.array([len(b.source_X) for b in blocks], np.int32),
        np.array([b.span for b in blocks], np.int32),
        np.zeros((Q, N), np.int32),
    )
    for q, (b, grids) in enumerate(zip(blocks, oracle.cases[arch.case], strict=True)):
        n = len(b.source_X)
        block.source_QxX[q, :n], block.pos_QxXx3[q, :n], block.moves_QxX[q, :n] = b.source_X, b.pos_Xx3, b.moves_X
        block.tokens_QxN[q, : len(grids)] = [r * c for r, c in grids]
    return batch.prompts.replace(block=block)


def responses(arch, rows, length, seed):
    """Random responses in which 1 to 4 tags stand at different places in every row; int32 [rows, length]."""
    rng = np.random.default_rng([2308, seed])
    out = rng.integers(0, arch.vocab - 6, (rows, length)).astype(np.int32)
    for row in out:
        row[rng.choice(length - 1, int(rng.integers(1, 5)), replace=False)] = ids_of(arch)[0]
    return out


class Official:
    """One prompt at a time through transformers, as a sequence that grows."""

    def __init__(self, model, ids, batch, grids_Q):
        model.set_attn_implementation("eager")  # the others return no weights
        self.model, self.ids = model, ids
        self.rows = []
        pixels, thw = batch.hf["pixel_values"], batch.hf["image_grid_thw"]
        counts = [int(n) for n in thw.prod(-1)]
        firsts = [0, *itertools.accumulate(counts)]
        number = 0
        for q, grids in enumerate(grids_Q):
            n = batch.length_Q[q]
            own = range(number, number + len(grids))
            number += len(grids)
            self.rows.append(
                SimpleNamespace(
                    prompt=batch.prompts.ids_QxP[q, :n].tolist(),
                    grids=grids,
                    pixels=[pixels[firsts[i] : firsts[i + 1]] for i in own],
                    thw=[thw[i] for i in own],
                )
            )

    def expand(self, q, response, tags=CAP):
        """Token ids of prompt and response with the images before the first tags, and the slot of each token."""
        row, ids, slots, used = self.rows[q], list(self.rows[q].prompt), [], 0
        for token in response:
            if token == self.ids.tag and used < tags and row.grids:
                for r, c in row.grids:
                    ids += [self.ids.start, *[self.ids.image] * (r * c), self.ids.end]
                used += 1
            slots.append(len(ids))
            ids.append(int(token))
        return ids, slots, used

    def logits(self, q, response, tags=CAP):
        """COPY: what predicts each token of the response, and the token after it: float32 [R + 1, V]."""
        row = self.rows[q]
        ids, slots, used = self.expand(q, response, tags)
        ids_1xT = torch.tensor([ids])
        inputs = {}
        if row.grids:
            inputs = {
                "pixel_values": torch.cat(row.pixels * (1 + used)),
                "image_grid_thw": torch.stack(row.thw * (1 + used)),
            }
        out = self.model(
            input_ids=ids_1xT,
            attention_mask=torch.ones_like(ids_1xT),
            mm_token_type_ids=(ids_1xT == self.ids.image).to(torch.int32),
            **inputs,
        ).logits[0]
        return out[[len(row.prompt) - 1, *slots]].float()

    def kept_logits(self, q, response, kept):
        """ROUTE: logits as above where insertion e shows the visual tokens `kept[e]` alone.

        Positions are those that transformers computes for the whole expansion; what is not kept is then left out.

        Returns:
          the logits, and float64 [R, M]: attention that each token of the response pays to each visual token of the
          prompt, its mean over layers and heads.
        """
        row, image = self.rows[q], self.ids.image
        ids, slots, used = self.expand(q, response)
        ids_1xT = torch.tensor([ids])
        x_TxD = self.model.get_input_embeddings()(ids_1xT)[0]
        at_image = [i for i, token in enumerate(ids) if token == image]
        M = len(at_image) // (1 + used)
        features = []
        if row.grids:
            result = self.model.model.get_image_features(torch.cat(row.pixels), torch.stack(row.thw))
            again = lambda parts: torch.cat(list(parts)).repeat(1 + used, 1)  # noqa: E731
            x_TxD = x_TxD.index_put((torch.tensor(at_image),), again(result.pooler_output))
            features = [again(parts) for parts in getattr(result, "deepstack_features", None) or ()]
        pos_3x1xT, _ = self.model.model.get_rope_index(
            ids_1xT,
            (ids_1xT == image).to(torch.int32),
            torch.stack(row.thw * (1 + used)) if row.grids else None,
            attention_mask=torch.ones_like(ids_1xT),
        )
        left_out = {i for n, i in enumerate(at_image) if n >= M and n % M not in kept[n // M - 1]}
        stay = [i for i in range(len(ids)) if i not in left_out]
        back = {i: n for n, i in enumerate(stay)}
        slots = [back[s] for s in slots]
        deepstack = {}
        if features:
            kept_M = [n for n, i in enumerate(at_image) if i not in left_out]
            deepstack = {
                "visual_pos_masks": torch.tensor([[ids[i] == image for i in stay]]),
                "deepstack_visual_embeds": [x[kept_M] for x in features],
            }
        out = self.model.model.language_model(
            **deepstack,
            inputs_embeds=x_TxD[None, stay],
            position_ids=pos_3x1xT[:, :, stay],
            attention_mask=torch.ones(1, len(stay), dtype=torch.int64),
            output_attentions=True,
        )
        logits = self.model.lm_head(out.last_hidden_state)[0].float()
        attention_TxT = torch.stack(out.attentions).detach().double().mean((0, 2))[0].numpy()
        return logits[[len(row.prompt) - 1, *slots]], attention_TxT[slots][:, at_image[:M]]

    def routed(self, q, response, share):
        """ROUTE by its definition (paper, equation 5).

        Returns:
          logits as above; for each insertion the visual tokens that are kept, as a set; and their scores, float64 [M]:
          attention received from the tokens before the tag, summed.
        """
        tags = [t for t, token in enumerate(response) if token == self.ids.tag][:CAP]
        kept, scores = [], []
        for t in tags if self.rows[q].grids else []:
            score_M = self.kept_logits(q, response[:t], kept)[1].sum(0)
            count = plain.share_of(share, len(score_M))
            kept.append(set(np.argsort(-score_M, kind="stable")[:count].tolist()))
            scores.append(score_M)
        return self.kept_logits(q, response, kept)[0], kept, scores

    @torch.no_grad()
    def greedy(self, q, tokens, logit_bias_V, share=None):
        """Greedy continuation, the images given again as soon as a tag comes; no cache; ROUTE with a share."""
        response = []
        for _ in range(tokens):
            # The tag that comes last has no block of its own yet when the next token is predicted: it gets it first.
            out = self.logits(q, response) if share is None else self.routed(q, response, share)[0]
            response.append(int(np.argmax(out[-1].numpy() + logit_bias_V)))
        return response
