"""The HTTP server: OpenAI's endpoints on an `AsyncEngine`. Runs in: server. Nothing else imports it."""
