"""KunServe: an LLM server whose replicated weights become KV cache when a burst comes."""
