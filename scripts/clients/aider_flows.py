"""aider: its command line, on a folder of one file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from flows import Target, run

GREETING = "def greet():\n    print('hello')\n"
PARTING = GREETING.replace("hello", "goodbye")
QUIET = ("--yes-always", "--no-git", "--no-pretty", "--no-check-update", "--no-show-release-notes", "--no-analytics")
SMALL = ("--no-show-model-warnings", "--map-tokens", "0", "--no-detect-urls", "--no-gitignore", "--no-auto-lint")
COSTS = {"input_cost_per_token": 0, "output_cost_per_token": 0, "litellm_provider": "openai", "mode": "chat"}


def ask(target: Target, message: str, *flags: str, said: str = "") -> tuple[str, str]:
    """Return what aider prints and what it leaves of the file. `said`: what the model has to answer."""
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), f"openai/{target.model}"
        (folder / "greet.py").write_text(GREETING)
        # Without it aider looks for the model's size and price in the network.
        sizes = {"max_input_tokens": 4096, "max_output_tokens": 1024, **COSTS}
        (folder / ".aider.model.metadata.json").write_text(json.dumps({model: sizes}))
        body = {"structured_outputs": {"choice": [said]}} if said else {}
        extra = {"max_tokens": 100, "extra_body": body}
        settings = [{"name": model, "extra_params": extra, "use_temperature": False}]
        (folder / ".aider.model.settings.yml").write_text(json.dumps(settings))
        server = ("--openai-api-base", target.openai_url, "--openai-api-key", target.key)
        command = [sys.executable, "-m", "aider", "--model", model, *server, *QUIET, *SMALL, *flags]
        done = subprocess.run(
            [*command, "--message", message, "greet.py"], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "Error" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done.stdout, (folder / "greet.py").read_text()


def question(target: Target) -> None:
    printed, left = ask(target, "What is the capital of France?", "--chat-mode", "ask", "--no-stream")
    assert "Tokens:" in printed and left == GREETING, printed


def question_stream(target: Target) -> None:
    printed, left = ask(target, "What is the capital of France?", "--chat-mode", "ask", "--stream")
    assert "Tokens:" in printed and left == GREETING, printed


def edit_of_whole_file(target: Target) -> None:
    said = f"greet.py\n```\n{PARTING}```"
    printed, left = ask(target, "Say goodbye instead.", "--edit-format", "whole", said=said)
    assert left == PARTING, printed


def edit_by_blocks(target: Target) -> None:
    old, new = "    print('hello')", "    print('goodbye')"
    said = f"greet.py\n```\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```"
    printed, left = ask(target, "Say goodbye instead.", "--edit-format", "diff", said=said)
    assert left == PARTING, printed


if __name__ == "__main__":
    run("aider", question, question_stream, edit_of_whole_file, edit_by_blocks, package="aider-chat")
