"""Folders as the pipeline leaves them, with numbers that a test chooses."""

import json

from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.study.collect import FINISHED, SAVED, SYSTEMS

QUESTIONS = 40
EDGES = [0, 8, 16, 24]
WORDS = ("caption", "last look", "answer")
REASONED = "<REASONING>x: {0}</REASONING><REFLECTION>look again</REFLECTION><CONCLUSION>{1}</CONCLUSION>"


def response(verdict, conclusion):
    return REASONED.format(verdict, conclusion)


def line(record, right=True, objects=((4, True), (12, False)), tokens=30, **numbers):
    """One answer; objects are (token, right)."""
    said = record.answer if right else "nothing"
    row = {"id": record.id, "question": record.question, "answer": record.answer, "kind": record.kind}
    row |= {"response": response("nothing", said), "right": right, "well_formed": True, "tokens": tokens}
    row |= {"inserted": 1, "skipped": 0, "inserted_tokens": 18, "reflections": 1, "reflection_tokens": 10}
    row |= {"objects": [list(one) for one in objects], "named": len(objects), "missed": 1}
    row |= {"details": 2, "wrong_details": 1}
    row |= {"invented": sum(not ok for _, ok in objects)}
    return row | numbers


def attention(early=0.4, middle=0.3, late=0.2, before=0.3, inside=0.15, after=0.15, even=0.25, count=QUESTIONS):
    """Every question has 8 tokens in each bin and in each part, with these means."""

    def sums(means, put_in):
        return {
            "tokens": [[8.0] * 3] * count,
            "original": [[8 * mean * (1 - put_in) for mean in means]] * count,
            "inserted": [[8 * mean * put_in for mean in means]] * count,
            "even": [[8 * even] * 3] * count,
        }

    return {
        "ids": [str(i) for i in range(count)],
        "edges": EDGES,
        "positions": sums((early, middle, late), 0.25),
        "parts": sums((before, inside, after), 0.25),
    }


ATTENTION = attention()


def heat(count=3):
    grid = [[0.01, 0.02], [0.03, 0.04]]
    words = [{"part": p, "word": p, "token": 5, "original": grid, "inserted": grid} for p in WORDS]
    return [{"id": str(i), "response": "", "words": words} for i in range(count)]


def records(seed, count=QUESTIONS):
    source = SceneSource(7000 + seed, "held_out", count)
    return [source[i] for i in range(count)]


def write_system(folder, name, lines, seed=0, attention=None, batch_s=(0.5, 0.5, 0.5), maps=None, mode="none"):
    """One evaluated system of a run."""
    place = folder / "evaluate" / name.replace(" ", "_")
    place.mkdir(parents=True, exist_ok=True)
    of = {"saved": SAVED, "source": "scenes", "options": {"reattention": {"mode": mode, "keep_ratio": 0.5}}}
    scores = {"timing": {"rows": 10, "batch_s": list(batch_s)}}
    saved = {"of": of, "name": name, "scenes_seed": 7000 + seed, "scores": scores}
    (place / "scores.json").write_text(json.dumps(saved))
    (place / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (place / "attention.json").write_text(json.dumps(attention or ATTENTION))
    (place / "heat.json").write_text(json.dumps(heat() if maps is None else maps))
    return place


def write_curve(folder, steps=60, evaluated=((0, 0.25), (30, 0.5), (60, 0.75)), size=64):
    """Reflections rise by 0.01 a step and are 10 tokens long each."""
    place = folder / "brpo"
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "eval/accuracy": share, "eval/size": size} for step, share in evaluated]
    rows += [
        {"step": s, "train/reflection/count_mean": 0.01 * s, "train/reflection/tokens_mean": 0.1 * s}
        | {"train/rewards/accuracy/mean": 0.5}
        for s in range(1, steps + 1)
    ]
    rows.sort(key=lambda row: row["step"])
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, seed=0, systems=SYSTEMS, right=None, count=QUESTIONS, **system):
    """A finished run.

    Args:
      folder: of the run.
      seed: of its questions.
      systems: names.
      right: name -> how many of the first questions it answers right (default: all).
      count: questions.
      system: name -> further arguments of `write_system`, "lines" among them.
    """
    asked = records(seed, count)
    for name in systems:
        more = dict(system.get(name.replace(" ", "_").replace("-", "_").replace("+", "and"), {}))
        number = (right or {}).get(name, count)
        lines = more.pop("lines", None) or [line(record, i < number) for i, record in enumerate(asked)]
        write_system(folder, name, lines, seed, **more)
    write_curve(folder)
    (folder / FINISHED).write_text("{}")
    return folder
