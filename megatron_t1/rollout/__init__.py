"""Asking for responses: vLLM servers by token ids (client), chat endpoints by messages (endpoint)."""
