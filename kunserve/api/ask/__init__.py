"""From JSON to what the engine is asked: calls, messages, tools, structures, prompts."""
