"""The length study of a released model on the embedded one: reasoning, looks, answers, resumption and the report.

Oracle: transformers' own model, tokenizer and image processor on the sequence that each arm stands for: nothing put in,
the image given once more, a blank or another one in its place, or ROUTE's tokens, the others masked.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import qwenla_jax
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.planner.chips import parse_topology
from qwenla_jax.planner.published import published_config
from qwenla_jax.study import released_prefix, released_run
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import BLANK, COPY, OTHER, ROUTE_50, TEXT
from qwenla_jax.study.released_plan import plan
from qwenla_jax.study.released_prefix import ANSWER, LEAD, OPENER, WAIT, filler
from qwenla_jax.study.released_report import write_released_report
from qwenla_jax.study.released_results import read_all_released
from qwenla_jax.study.released_run import Released, boxed, run_released
from qwenla_jax.text.special_tokens import TAGS, TokenIds
from qwenla_jax.text.tokenizer import Tokenizer

TINY = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
N, CHUNK, ANSWER_TOKENS = 24, 9, 6
COMMA = ","  # ends a response here, so that reasoning ends too early
QUESTIONS = (("How many circles are there?", "2"), ("What color is the big square?", "red"), ("Any circle?", "yes"))
SIZES = ((112, 112), (200, 112), (112, 200))  # other grids, so that another image has to be resized


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Settings, results' folder, images and lines of progress of a run."""
    folder = tmp_path_factory.mktemp("released")
    images = [make_scene(7, 5, i).image.resize(size) for i, size in enumerate(SIZES)]
    lines = []
    for i, ((question, answer), image) in enumerate(zip(QUESTIONS, images, strict=True)):
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "question": question, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    settings = Released(
        str(TINY), str(folder / "questions.jsonl"), lengths=(0, N), temperature=0.0, batch_size=2,
        max_prompt_tokens=128, max_pixels=112 * 112, dtype="float32",
    )  # fmt: skip
    notes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released_run, "CHUNK", CHUNK)
        patch.setattr(released_run, "ANSWER_TOKENS", ANSWER_TOKENS)
        (comma,) = Tokenizer.from_folder(TINY).encode(COMMA)
        patch.setattr(TokenIds, "stop", lambda self: (self.im_end, self.endoftext, comma))
        run_released(settings, folder / "results", notes.append)
    return settings, folder / "results", images, notes


class Official:
    """What transformers makes of a question and a response with images in it."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
        self.torch.set_num_threads(1)
        load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.model = load(TINY, dtype=self.torch.float32, attn_implementation="eager").eval()
        self.tok = transformers.AutoTokenizer.from_pretrained(TINY)
        self.processor = pil.Qwen2VLImageProcessorPil.from_pretrained(TINY)
        names = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", *TAGS]
        rows = self.model.config.text_config.vocab_size
        self.never = [*self.tok.convert_tokens_to_ids(names), *range(len(self.tok), rows)]
        self.image = self.tok.convert_tokens_to_ids("<|image_pad|>")
        self.stop = [*self.model.generation_config.eos_token_id, *self.ids(COMMA)]

    def ids(self, text):
        return self.tok(text)["input_ids"] if text else []

    def pixels(self, image, resize=True):
        return self.processor(images=[image], return_tensors="pt", do_resize=resize)

    def block(self, pixels):
        tokens = int(pixels["image_grid_thw"].prod()) // 4
        return self.ids("<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>")

    def prompt(self, pixels, question):
        asked = f"{question}\nThink step by step, then put the final answer into \\boxed{{}}."
        end = self.ids(f"{asked}<|im_end|>\n<|im_start|>assistant\n")
        return [*self.ids("<|im_start|>"), *self.ids("user\n"), *self.block(pixels), *end]

    def run(self, ids, shown, hidden=()):
        """Logits with what is never sampled left out, and the mean attention; `shown` images in their order."""
        torch = self.torch
        ids_1xT = torch.tensor([ids])
        mask_1xT = torch.ones_like(ids_1xT)
        kinds, grids = (ids_1xT == self.image).to(torch.int32), torch.cat([one["image_grid_thw"] for one in shown])
        position, _ = self.model.model.get_rope_index(
            ids_1xT, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask_1xT
        )
        mask_1xT[0, list(hidden)] = 0
        with torch.no_grad():
            out = self.model(
                input_ids=ids_1xT, attention_mask=mask_1xT, position_ids=position, mm_token_type_ids=kinds,
                pixel_values=torch.cat([one["pixel_values"] for one in shown]), image_grid_thw=grids,
                output_attentions=True,
            )  # fmt: skip
        logits_TxV = out.logits[0]
        logits_TxV[:, self.never] = -math.inf
        return logits_TxV, torch.stack(out.attentions).mean((0, 2))[0].numpy()

    def greedy(self, ids, tokens, *shown):
        found = []
        while len(found) < tokens and not (found and found[-1] in self.stop):
            found.append(int(self.run([*ids, *found], *shown)[0][-1].argmax()))
        return found

    def reasoning(self, ids, pixels):
        """Greedy; where it ends, WAIT stands in the place of the end."""
        found = []
        while len(found) < N:
            more = self.greedy([*ids, *found], N - len(found), [pixels])
            found += [*more[:-1], *self.ids(WAIT)] if more[-1] in self.stop else more
        return found[:N]


@pytest.fixture(scope="module")
def official():
    return Official()


def test_every_arm_is_what_transformers_makes_of_its_sequence(study, official):
    settings, folder, images, _ = study
    results = {(r.working, r.tokens, r.arm): r for r in read_all_released(folder)}
    assert len(results) == 15
    logged = [json.loads(line) for line in (folder / "tiny_reasoning.jsonl").read_text().splitlines()][1:]
    fill, after = filler(Tokenizer.from_folder(TINY), N), [*official.ids(OPENER), *official.ids(ANSWER)]
    assert official.tok.decode(fill).startswith("Line 1 of this text says") and len(fill) == N
    waited = 0
    for i, ((question, answer), image) in enumerate(zip(QUESTIONS, images, strict=True)):
        own = official.pixels(image)
        prompt = official.prompt(own, question)
        start, block = [*prompt, *official.ids(LEAD)], official.block(own)
        reasoning = official.reasoning(start, own)
        assert logged[i] == {"id": str(i), "ids": reasoning}
        waited += official.tok.decode(reasoning).count(WAIT)
        _, rows, cols = own["image_grid_thw"][0].tolist()
        other = official.pixels(images[(i + 1) % len(images)].resize((cols * 14, rows * 14)), resize=False)
        assert other["image_grid_thw"].tolist() == own["image_grid_thw"].tolist()
        blank = {**own, "pixel_values": official.torch.zeros_like(own["pixel_values"])}
        for working, said in (("chain", []), ("chain", reasoning), ("filler", fill)):
            before = [*start, *said]
            # What LEAD and reasoning attended to.
            _, attention_TxT = official.run(before, [own])
            first = prompt.index(official.image)
            received_M = attention_TxT[len(prompt) :, first : first + len(block) - 2].sum(0)
            kept = set(np.argsort(-received_M, kind="stable")[: math.ceil(len(received_M) / 2)].tolist())
            unseen = [len(before) + 1 + m for m in range(len(received_M)) if m not in kept]
            for arm, put_in, shown, hidden in (
                (TEXT, [], [own], []),
                (COPY, block, [own, own], []),
                (BLANK, block, [own, blank], []),
                (OTHER, block, [own, other], []),
                (ROUTE_50, block, [own, own], unseen),
            ):
                result, ids = results[working, len(said), arm], [*before, *put_in, *after]
                where = f"question {i}, {working} {len(said)}, {arm}"
                got = result.answers[i].removeprefix(f"{i}: {answer} | ")
                expected = official.greedy(ids, ANSWER_TOKENS, shown, hidden)
                assert got == official.tok.decode([token for token in expected if token not in official.stop]), where
                assert result.inserted[i] == len(put_in) - len(hidden), where
                right = official.ids(answer)
                logits_TxV, _ = official.run([*ids, *right], shown, hidden)
                logp_RxV = logits_TxV[len(ids) - 1 : -1].log_softmax(-1)
                assert result.logp_answer[i] == pytest.approx(
                    float(sum(logp_RxV[n, token] for n, token in enumerate(right))), abs=2e-3
                ), where
    assert waited, "the reasoning of this test is to end too early once"
    looked = [results["chain", N, arm].logp_answer for arm in (TEXT, COPY, BLANK, OTHER, ROUTE_50)]
    apart = [np.abs(a - b).max() for n, a in enumerate(looked) for b in looked[:n]]
    assert min(apart) > 0.01, "the arms are to differ by more than this test would forgive"


def test_what_is_there_is_kept_and_other_settings_are_refused(study, tmp_path, monkeypatch):
    settings, folder, _, notes = study
    monkeypatch.setattr(released_run, "build", lambda config: pytest.fail("nothing is missing"))
    again = []
    assert len(run_released(settings, folder, again.append)) == 15
    assert all(note.endswith("measured already") for note in again) and not any("already" in note for note in notes)
    with pytest.raises(StudyError, match=r"tiny_chain_0_text-only.json: made with another seed; expected the same"):
        run_released(dataclasses.replace(settings, seed=1), folder, again.append)
    for changes, message in (
        ({"lengths": (4, 4)}, "lengths: got"),
        ({"source": "none.jsonl"}, "source: .*none.jsonl"),
        ({"model": "none/here/x"}, "model: none/here/x"),
    ):
        with pytest.raises(StudyError, match=message):
            run_released(dataclasses.replace(settings, **changes), tmp_path, again.append)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("text-only", {"arm": COPY}, "reattention.mode='none', expected 'copy'"),
        ("copy", {"arm": ROUTE_50}, "COPY|ROUTE 50 was measured with reattention.mode='copy', expected 'route'"),
        ("copy", {"arm": BLANK}, "blank was measured with reattention.content='image', expected 'blank'"),
        ("copy", {"inserted": [0, 0, 0], "shown": ["nothing"] * 3}, "3 answers with other tokens put in than COPY"),
        ("blank", {"shown": ["own"] * 3}, "blank showed own, expected blank"),
        ("another-image", {"shown": ["other", "own", "other"]}, "another image showed own, expected other"),
        ("copy", {"prefix": "0"}, "expected the same reasoning before the insertion"),
        ("copy", {"of": {}}, "expected the same settings and questions"),
        ("copy", {"right": [1]}, "expected one a question"),
    ],
)
def test_broken_results_are_refused(study, tmp_path, name, changes, message):
    for path in study[1].glob("*.json"):
        content = json.loads(path.read_text())
        broken = path.name == f"tiny_chain_{N}_{name}.json"
        (tmp_path / path.name).write_text(json.dumps(content | changes if broken else content))
    with pytest.raises(StudyError, match=message):
        write_released_report(tmp_path, tmp_path / "report.md")


def test_the_report_tells_accuracy_and_differences(study, tmp_path):
    """COPY is made right in every answer, and the others in none."""
    for path in study[1].glob("*.json"):
        content = json.loads(path.read_text())
        content |= {"right": [int(content["arm"] == COPY)] * 3, "logp_answer": [-1.0 - content["tokens"]] * 3}
        (tmp_path / path.name).write_text(json.dumps(content))
    head = write_released_report(tmp_path, tmp_path / "new" / "report.md")
    assert f"tiny: whether COPY helps after {N} tokens of reasoning: **helps**" in head
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| right answers, % | COPY | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in text
    assert "| right answers, % | ROUTE 50 - COPY | -100.0 [-100.0, -100.0] |" in text
    assert "| log-probability of the answer, nats | text-only | -1.000 [-1.000, -1.000] | -25.000" in text
    assert "## tiny, filler" in text and f"* tiny, filler, N = {N}, ROUTE 50: `0: 2 | " in text


def test_answers_end_where_their_box_is_closed():
    assert boxed("B}") == "B" and boxed(r"\frac{1}{2}} and so on}") == r"\frac{1}{2}"
    assert boxed("no end {}") is None


def test_the_plan_is_the_size_of_a_count_by_hand():
    """Two operations a parameter and token; every token of the reasoning reads all parameters once a batch."""
    settings = Released("7b", "x.jsonl", size=64, lengths=(4096,), batch_size=8)
    one = plan(settings, published_config("7b"), parse_topology("h100:1"))
    assert one.rows == 8 and one.tensor == 1 and one.weights == pytest.approx(2 * 8.29e9, rel=0.01)
    flops, moved, seconds, bound = one.parts["reasoning"]
    decoder = 7.07e9  # of 28 layers and the head
    prefills = sum(334 + 128 + at for at in range(0, 4096, released_prefix.CHUNK))
    assert flops == pytest.approx(2 * decoder * 64 * (4096 + prefills), rel=0.15)
    cache = 64 * 4096 * (462 + 2048) * 2 * 28 * 4 * 128 * 2
    assert moved == pytest.approx(8 * 4096 * 2 * decoder + cache, rel=0.1)
    assert bound == "memory" and seconds == pytest.approx(moved / 3.35e12)
    small = plan(settings, published_config("7b"), parse_topology("v5e:2x4"))
    assert small.tensor > 1 and small.weights < 16e9 / 1.5
    with pytest.raises(ValueError, match="v5e:1x1: 16.6 GB of parameters"):
        plan(settings, published_config("7b"), parse_topology("v5e:1x1"))
