"""Records for the tests of the rewards; a token is a word here."""

from qwenla_jax.rewards import RewardRecord
from qwenla_jax.text.response_format import parse


def words(text: str) -> int:
    return len(text.split())


def record(response: str, answer: str = "3", **fields) -> RewardRecord:
    """A response with the counts that its text has."""
    values = {"id": "7", "question": "How many circles are there?", "kind": "count", "finished": True}
    values["reflection_tokens"] = tuple(words(section.text) for section in parse(response).reflections)
    values["num_tokens"] = words(response)
    return RewardRecord(response=response, answer=answer, **values | fields)
