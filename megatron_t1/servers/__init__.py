"""The lives of the vLLM servers: started, found, watched, started again (servers.Servers is what others hold)."""
