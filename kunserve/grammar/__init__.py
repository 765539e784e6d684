"""Structured output, beside the request flow: untrusted schemas and grammars, compiled and followed in processes.

The library that compiles them (llguidance) is native code: a long chain of references overflows its stack, a short
one of doubling rules takes minutes or gigabytes, and either would end the server with the streams of all clients. So
no structure is ever looked at in the server's process. It starts a *fork server* (`fork_main.py`), which imports the
library, reads the vocabulary once and forks a process for each structure: two milliseconds, and the vocabulary's
memory is shared. There the kernel holds the limits (`child.py`): CPU time, memory, no core dump. What dies is one
structure's process, so the culprit is known without guessing.

A process has a *matcher* for each request that follows its structure. The server keeps the tokens of every matcher,
so that any of them can be made again in another process, exactly, by replaying them (`matcher.py`). A process can
therefore end at any time: killed by somebody, ended because it was idle, or to make room.

| module | what it is |
| --- | --- |
| `pool` | in the server: compiles on request, in fair turns; remembers what was refused |
| `compiled` | in the server: one structure that was compiled, and the processes that hold it |
| `matcher`, `process`, `fork_server` | in the server: one request's position, one process, what forks them |
| `fork_main`, `vocabulary` | in the fork server: no torch, no asyncio, nothing of a client's |
| `child`, `source`, `schema.finite`, `finite_lark` | in a structure's process: likewise |
| `schema` | there, too: schemas as people write them |
| `wire` | what they say to each other |

Rejected: threads (a crash is the server's); one process for all structures (who is guilty?); a pool of workers that
are started ahead (each reads the vocabulary, 0.3 s and 60 MB); a process for each request (a popular schema would be
compiled, or forked, hundreds of times).
"""
