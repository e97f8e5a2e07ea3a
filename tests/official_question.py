"""A question of a checkpoint's folder through transformers, which knows nothing of looking again."""

from types import SimpleNamespace

import numpy as np
import pytest


class Official:
    """One question through transformers, its tokenizer and its image processor."""

    def __init__(self, folder, images, question):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
        torch.set_num_threads(1)
        self.torch = torch
        load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tok = transformers.AutoTokenizer.from_pretrained(folder)
        self.pixels = pil.Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
        self.grids = [(h // 2, w // 2) for _, h, w in self.pixels["image_grid_thw"].tolist()]
        self.block = "".join(
            "<|vision_start|>" + "<|image_pad|>" * (rows * cols) + "<|vision_end|>" for rows, cols in self.grids
        )
        text = f"<|im_start|>user\n{self.block}{question}<|im_end|>\n<|im_start|>assistant\n"
        self.prompt = self.tok(text)["input_ids"]
        self.image, self.open, self.close = self.tok.convert_tokens_to_ids(
            ["<|image_pad|>", "<REFLECTION>", "</REFLECTION>"]
        )
        vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
        self.unsampled = [
            *self.tok.convert_tokens_to_ids(vision),
            *range(len(self.tok), self.model.config.text_config.vocab_size),
        ]
        self.stop = self.model.generation_config.eos_token_id

    def inputs(self, ids, times=1):
        ids_1xT = self.torch.tensor([ids])
        return {
            "input_ids": ids_1xT,
            "attention_mask": self.torch.ones_like(ids_1xT),
            "mm_token_type_ids": (ids_1xT == self.image).to(self.torch.int32),
            "pixel_values": self.pixels["pixel_values"].repeat(times, 1),
            "image_grid_thw": self.pixels["image_grid_thw"].repeat(times, 1),
        }

    def generate(self, tokens):
        with self.torch.no_grad():
            out = self.model.generate(
                **self.inputs(self.prompt), max_new_tokens=tokens, do_sample=False, suppress_tokens=self.unsampled
            )
        return out[0, len(self.prompt) :].tolist()

    def run(self, response, cap, kept=None):
        """The expanded prompt, where its response tokens stand, and what the model gives for it.

        `kept[e]` are the numbers of the visual tokens that insertion e shows; positions are those of the whole
        expansion, and what is not kept is then left out. None: all.
        """
        ids, slots, used, left_out = list(self.prompt), [], 0, set()
        for token in response:
            if token == self.open and used < cap:
                block = self.tok(self.block)["input_ids"]
                visual = [len(ids) + i for i, token in enumerate(block) if token == self.image]
                left_out |= {at for n, at in enumerate(visual) if kept is not None and n not in kept[used]}
                ids += block
                used += 1
            slots.append(len(ids))
            ids.append(token)
        stay = [i for i in range(len(ids)) if i not in left_out]
        given = {}
        decoder = self.model.model.language_model
        hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
        with self.torch.no_grad():
            out = self.model(**self.inputs(ids, 1 + used), output_attentions=True)
            hook.remove()
            logits = out.logits[0].numpy()
            if left_out:
                out = decoder(
                    inputs_embeds=given["inputs_embeds"][:, stay],
                    position_ids=given["position_ids"][..., stay],
                    attention_mask=self.torch.ones(1, len(stay), dtype=self.torch.int64),
                    output_attentions=True,
                )
                logits = None
        attention_TxT = self.torch.stack(out.attentions).mean((0, 2))[0].numpy()
        slots = [stay.index(slot) for slot in slots]
        return SimpleNamespace(ids=np.array(ids)[stay], slots=slots, stay=stay, logits=logits, attention=attention_TxT)

    def greedy(self, tokens, cap):
        """The images are given again as soon as a tag comes."""
        response = []
        while len(response) < tokens and not (response and response[-1] in self.stop):
            logits_V = self.run(response, cap).logits[-1]
            logits_V[self.unsampled] = -np.inf
            response.append(int(np.argmax(logits_V)))
        return response
