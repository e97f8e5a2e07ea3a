"""MMHal-Bench. Oracles: hand-computed ratings; a judge that is a small server in this process."""

import http.server
import json
import threading

import pytest

from qwenla_jax.cli import evaluate
from qwenla_jax.evals.benchmarks.mmhal import rating, replies_of, score_mmhal
from qwenla_jax.evals.table_files import Row
from qwenla_jax.evals.task import Answer, Item, Settings


@pytest.mark.parametrize(
    ("reply", "number"),
    [("Rating: 4", 4), ("... RATING: 0.", 0), ("rating:3", None), ("Rating: 3 ... rating: 3", 3), ("", None)]
    + [("Rating: 2, no, rating: 5", None), ("Rating: 7", None), ("Rating: 60", 6)],
)
def test_rating_as_officially(reply, number):
    assert rating(reply) == number


def test_numbers_by_hand():
    answers = [
        Answer(Item(str(n), answer="x", kind=kind), "t") for n, kind in enumerate(("attribute", "other", "other"))
    ]
    replies = {"0": "Rating: 6", "1": "Rating: 2", "2": "nothing"}
    result = score_mmhal(answers, Settings(replies=replies))
    assert result.figures["rating"].value == pytest.approx(8 / 3)
    assert result.figures["hallucination"].value == pytest.approx(200 / 3)
    assert result.figures["rating/other"].value == 1.0 and result.counts["replies_without_one_rating"] == 1
    with pytest.raises(ValueError, match="no reply of the judge for '1'"):
        score_mmhal(answers, Settings(replies={"0": "Rating: 6", "2": ""}))
    with pytest.raises(ValueError, match="needs a judge's replies"):
        score_mmhal(answers, Settings())


def test_saved_completions():
    row = Row("f: row 1", 1, "f", {"id": "chatcmpl-7", "choices": [{"message": {"content": "Rating: 5"}}]})
    assert replies_of([row, Row("f", 4, "f", {"id": "x", "reply": "r"})]) == {"1": "Rating: 5", "x": "r"}
    with pytest.raises(ValueError, match="holds no reply"):
        replies_of([Row("f: row 1", 0, "f", {"id": "x"})])


@pytest.mark.parametrize("text", ["{question} {x}", "{question} {}", '{"rating": 1}', "{question.x}", "{", b"\xff"])
def test_instructions_that_cannot_be_filled_are_refused_before_anything_is_asked(tmp_path, capsys, text):
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "said.json").write_text(json.dumps([{"question": "q", "gt_answer": "a", "model_answer": "b"}]))
    arguments = ["--task=mmhal", f"--score={tmp_path / 'said.json'}", "--judge_url=http://127.0.0.1:9/v1"]
    arguments += ["--judge_model=m", f"--judge_log={tmp_path / 'log'}", f"--judge_instruction={tmp_path / 'a.txt'}"]
    assert evaluate.main(arguments) == 2
    assert "a.txt: " in capsys.readouterr().err and not (tmp_path / "log").exists()


def test_judge_is_asked_once(tmp_path, capsys):
    asked = []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            said = f"Rating: {4 + len(asked)}"
            data = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    rows = [
        {"question": f"q{n}?", "gt_answer": f"right{n}", "image_content": ["cat", "mat"], "model_answer": f"said{n}"}
        for n in range(2)
    ]
    (tmp_path / "responses.json").write_text(json.dumps(rows))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = [
        "--task=mmhal", f"--score={tmp_path / 'responses.json'}", f"--judge_url=http://127.0.0.1:{server.server_port}/v1",
        "--judge_model=m", f"--judge_log={tmp_path / 'log.jsonl'}", "--json",
    ]  # fmt: skip
    try:
        for _ in range(2):
            assert evaluate.main(arguments) == 0
            assert json.loads(capsys.readouterr().out)["figures"]["rating"]["value"] == 5.5
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) == 2 and asked[0]["temperature"] == 0.0
    (part,) = asked[0]["messages"][0]["content"]
    assert part["type"] == "text" and all(word in part["text"] for word in ("q0?", "right0", "cat, mat", "said0"))
