"""A batch made by several hosts against the same batch made by one."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.collate import collate_sft
from qwenla_jax.data.hosts import Host, agreed
from qwenla_jax.train.options import DataOptions, OptimOptions, ReattentionOptions, RunOptions
from qwenla_jax.train.runtime import build, make_run_source

ANSWER = "<SUMMARY>a</SUMMARY><CAPTION>a</CAPTION><REASONING>a</REASONING>{}<CONCLUSION>1</CONCLUSION>"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """Pictures of many sizes, questions and answers of many lengths, some broken ones, in two parts of four rows."""
    folder = tmp_path_factory.mktemp("hosts")
    rng = np.random.default_rng(3)
    rows = []
    for n in range(40):
        sides = rng.integers(56, 200, 2)
        Image.fromarray(rng.integers(0, 255, (*sides, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        if n % 9 == 4:
            (folder / f"{n}.png").write_text("nothing")
        looks = "".join(f"<REFLECTION>{'look ' * int(k)}</REFLECTION>" for k in rng.integers(0, 3, rng.integers(0, 3)))
        question = "how many " * int(rng.integers(1, 12))
        row = {"id": str(n), "image": f"{n}.png", "question": question, "answer": "1"}
        rows.append(row | {"response": ANSWER.format(looks)})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataOptions(
        source=str(folder / "data.jsonl"),
        batch_size=8,
        min_pixels=56 * 56,
        max_pixels=200 * 200,
        max_prompt_tokens=160,
        max_response_tokens=96,
        max_broken=5,
        length_group=2,
    )
    options = RunOptions(stage="sft", data=data, optim=OptimOptions(accumulation=2))
    return build(options)[0]


def batches(runtime, kind, host, start=0, count=4):
    source = make_run_source(runtime.options, "cold_start")
    collate = {"sft": collate_sft, "prompts": runtime.collate_prompts, "look": runtime.collate_responses}[kind]
    usable = runtime.usable(source, kind != "prompts")
    found = list(itertools.islice(runtime.batches(usable, collate, start, host), count))
    return [([jax.tree.map(np.asarray, part) for part in batch], [r.id for r in records], met)
            for batch, records, met in found]  # fmt: skip


def looking(runtime, mode="copy"):
    return dataclasses.replace(
        runtime, options=dataclasses.replace(runtime.options, reattention=ReattentionOptions(mode=mode))
    )


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("kind", ["sft", "prompts", "look"])
def test_the_parts_of_all_hosts_are_the_batch_of_one(runtime, kind, hosts):
    runtime = looking(runtime) if kind == "look" else runtime
    one = batches(runtime, kind, Host())
    parts = [batches(runtime, kind, Host(index, hosts)) for index in range(hosts)]
    for step, (whole, names, met) in enumerate(one):
        mine = [part[step] for part in parts]
        assert {each[2] for each in mine} == {met}
        # Rows of a part (a leading axis of two) are shared out: each host's ids, part by part.
        shares = np.array([each[1] for each in mine]).reshape(hosts, 2, -1)
        assert shares.transpose(1, 0, 2).reshape(-1).tolist() == names
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *[each[0] for each in mine])
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(joined), strict=True):
            np.testing.assert_array_equal(a, b)
    assert sum(met for _, _, met in one) > 0


@pytest.mark.parametrize("host", [Host(), Host(1, 2)])
def test_a_restarted_host_goes_on_exactly(runtime, host):
    whole, later = batches(runtime, "sft", host), batches(runtime, "sft", host, start=3, count=1)
    assert whole[3][1:] == later[0][1:]
    assert jax.tree.all(jax.tree.map(np.array_equal, whole[3][0], later[0][0]))


def test_hosts_with_few_pictures_make_room_for_those_with_many(runtime):
    """One host's records all have two pictures, the other's none: the same shapes, and each row sees its own."""
    make = runtime.example(with_response=False)
    source = runtime.usable(make_run_source(runtime.options, "cold_start"), True)
    records = [source[i].record for i in range(4)]
    two = [dataclasses.replace(r, images=r.images * 2) for r in records[:2]]
    none = [dataclasses.replace(r, images=()) for r in records[2:]]
    examples = [make(record) for record in two + none]
    buckets = dataclasses.replace(runtime.buckets(2), frames=(2, 4), prompts=(320,))
    fixed = agreed(examples, buckets, 2, 0)
    assert fixed.frames == (4,) and fixed.least[0] == 2
    looks = looking(runtime)
    first, second = (looks.collate_prompts(examples[part], fixed) for part in (slice(0, 2), slice(2, 4)))
    shapes = [jax.tree.map(np.shape, each) for each in (first, second)]
    assert shapes[0] == shapes[1] and (second[1].visual_QxP == -1).all()


def test_rows_that_do_not_divide_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="5 rows do not divide over 2 processes"):
        Host(0, 2).share(5)
    for index, count in ((2, 2), (-1, 1)):
        with pytest.raises(ValueError, match=f"process_index must be 0 to {count - 1}, got {index}"):
            Host(index, count)
    assert Host.of() == Host(0, 1) and Host.of(1, 3) == Host(1, 3)
