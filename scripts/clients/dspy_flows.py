"""dspy: the language model itself, and predictions by its chat and JSON adapters."""

from __future__ import annotations

from typing import Any, Literal

import dspy
from flows import Target, run

QUESTION = "What is the capital of France?"


class Sort(dspy.Signature):
    """Say whether a text is kind."""

    text: str = dspy.InputField()
    is_kind: Literal["yes", "no"] = dspy.OutputField()


def model_of(target: Target) -> Any:
    return dspy.LM(
        f"openai/{target.model}",
        api_base=target.openai_url,
        api_key=target.key,
        max_tokens=64,
        cache=False,
        num_retries=0,
    )


def chat(target: Target) -> None:
    [answer] = model_of(target)(QUESTION)
    assert "Paris" in str(answer), answer


def multi_turn(target: Target) -> None:
    turns = [("user", QUESTION), ("assistant", "Paris."), ("user", "And what is the capital of Italy?")]
    [answer] = model_of(target)(messages=[{"role": role, "content": content} for role, content in turns])
    assert "Rome" in str(answer), answer


def structured_output(target: Target) -> None:
    with dspy.context(lm=model_of(target), adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Sort)(text="Thank you, dear friend!").is_kind in ("yes", "no")


def stream(target: Target) -> None:
    with dspy.context(lm=model_of(target), adapter=dspy.JSONAdapter()):
        predict = dspy.streamify(dspy.Predict(Sort), async_streaming=False)
        pieces = list(predict(text="Thank you, dear friend!"))
    assert len(pieces) > 1 and pieces[-1].is_kind in ("yes", "no"), pieces


if __name__ == "__main__":
    run("dspy", chat, multi_turn, structured_output, stream)
