"""An HTTP server that speaks OpenAI's protocol, on the engine: its limits, its metrics and its page."""
