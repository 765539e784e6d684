"""HTTP in another process than the engine (`--api-workers`): what the two say to each other, and either end of it.

A worker has the routes of clients, the tokenizer and all text; the engine's process has the queue, the structures, the
stored responses and the routes of operators, which workers pass on. Token ids cross, in one message a step.
"""
